"""Memory and time of ``jaxsys reshard``: a checkpoint of random weights to every format, each in a process of its own.

    python scripts/bench/reshard.py --gigabytes 4

Prints, for each format, the peak of resident memory (VmHWM), seconds, and bytes written. Needs three times the room
of the checkpoint in ``--directory``.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from models import byte_tokenizer

import checkpoint
from checkpoint.writer import Piece
from jaxsys import configuration
from jaxsys.models.config import ModelConfig
from jaxsys.models.pretrained import expected_weights

RUNS = {
    "native": ["--format", "native"],
    "native bfloat16": ["--format", "native", "--dtype", "bfloat16"],
    "safetensors": ["--format", "safetensors"],
    "orbax": ["--format", "orbax"],
    "hf": ["--format", "hf"],
    "gguf float16": ["--format", "gguf", "--dtype", "float16"],
    "gguf q8_0": ["--format", "gguf", "--dtype", "q8_0"],
}
CODE = """
import sys
from jaxsys.malloc import restart_with_tunables
restart_with_tunables()
from jaxsys.cli.main import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Args:
    gigabytes: float = 4.0
    """Of the checkpoint, in float32."""
    directory: Path | None = None
    """Where to write; a new one under the system's for temporary files if not given."""
    back: bool = False
    """Also from each of safetensors, orbax, hf and gguf to native."""


def write_source(directory: Path, gigabytes: float) -> None:
    config = ModelConfig(
        "llama", vocab_size=32768, d_model=2048, n_layers=1, n_heads=16, n_kv_heads=16, head_dim=128, d_ff=5632,
        max_seq_len=4096, tie_embeddings=True,
    )  # fmt: skip
    embed, layer = 32768 * 2048, 4 * 2048 * 2048 + 3 * 2048 * 5632
    config = dataclasses.replace(config, n_layers=max(1, round((gigabytes * 1e9 / 4 - embed) / layer)))
    arrays, random = expected_weights(config), np.random.default_rng(0)
    pieces = (Piece(a, (0,) * len(a.shape), random.standard_normal(a.shape, np.float32)) for a in arrays.values())
    checkpoint.write(directory, 0, {"model": configuration.to_dict(config)}, arrays.values(), pieces)
    byte_tokenizer().save(directory / "tokenizer")


def measure(what: str, source: Path, destination: Path, flags: list[str]) -> None:
    start = time.perf_counter()
    command = [sys.executable, "-c", CODE, "reshard", str(source), str(destination), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        sys.exit(f"{what}: exit code {done.returncode}")
    paths = [destination] if destination.is_file() else [p for p in destination.rglob("*") if p.is_file()]
    written = sum(path.stat().st_size for path in paths)
    peak, seconds = int(done.stdout) / 1024, time.perf_counter() - start
    print(f"{what:20} {peak:6.0f} MiB {seconds:6.1f} s {written / 1e9:6.2f} GB", flush=True)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    root = Path(tempfile.mkdtemp(prefix="reshard-", dir=args.directory))
    try:
        write_source(root / "source", args.gigabytes)
        for what, flags in RUNS.items():
            measure(what, root / "source", root / "out", flags)
            if args.back and what in ("safetensors", "orbax", "hf", "gguf q8_0"):
                measure(f"{what} to native", root / "out", root / "back", [])
                shutil.rmtree(root / "back")
            os.unlink(root / "out") if (root / "out").is_file() else shutil.rmtree(root / "out")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
