"""A training run small enough for tests: a byte tokenizer, a folder of text, a configuration, a recipe file."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from checkpoint import open_checkpoint
from jaxsys.console import Console
from jaxsys.models.config import ModelConfig
from jaxsys.models.pretrained import export_hf
from jaxsys.models.state import build
from jaxsys.optim import Constant, OptimConfig
from jaxsys.tokenizer import Tokenizer
from jaxsys.train import CheckpointConfig, DataConfig, TrainConfig

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(
    "llama", vocab_size=257, d_model=16, n_layers=1, n_heads=9, n_kv_heads=3, head_dim=4, d_ff=24, max_seq_len=64,
    tie_embeddings=True,
)  # fmt: skip


def write_tokenizer(directory: Path) -> None:
    """One token a byte, and an eos token."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    Tokenizer(backend, eos_ids=[256]).save(directory)


def write_text(directory: Path) -> None:
    directory.mkdir()
    for i in range(40):
        (directory / f"{i:02}.txt").write_text(f"Document {i}. " + "The quick brown fox jumps. " * (2 + i % 5))


def make_config(run: Path, material: Path, **changes) -> TrainConfig:
    """material: a directory with ``tokenizer`` and ``text``."""
    config = TrainConfig(
        run=str(run),
        model=MODEL,
        data=DataConfig(
            source=str(material / "text"), tokenizer=str(material / "tokenizer"), batch_size=4, seq_len=32, heldout=0.2
        ),
        optim=OptimConfig(schedule=Constant(), learning_rate=3e-3),
        checkpoint=CheckpointConfig(every=2, keep=10),
        steps=6,
        compute_dtype="float32",
        eval_every=0,
        eval_batches=1,
    )
    return dataclasses.replace(config, **changes)


def write_model(directory: Path, material: Path, seed: int = 0, model: ModelConfig = MODEL) -> dict[str, np.ndarray]:
    """A model as a Hugging Face directory; returns its arrays."""
    rng = np.random.default_rng(seed)
    logical = build(model, storage="listed").layout.logical
    arrays = {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in logical.items()}
    export_hf(directory, model, arrays.items(), dtype="float32", token_ids={})
    for path in (material / "tokenizer").iterdir():
        shutil.copy(path, directory)
    return arrays


def quiet() -> Console:
    """A console whose lines are kept: ``console.lines``."""
    console = Console()
    console.lines = []
    console.line = console.lines.append
    return console


def state_bytes(run: Path, step: int) -> dict[str, bytes]:
    """Every logical array of a checkpoint."""
    reader = open_checkpoint(Path(run) / "checkpoints" / f"step-{step:08}")
    return {name: reader.read(name).tobytes() for name in reader.manifest.arrays}


def start(*arguments, before: str = "", **environment: str) -> subprocess.Popen:
    """``jaxsys`` in another process with two devices, compiled as ``tiny_models.quickly_compiled`` does. before: Python
    to run first."""
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # recipes import this module
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**os.environ, **quickly, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": paths, **environment}
    code = f"import sys\n{before}\nfrom jaxsys.cli.main import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def write_recipe(path: Path, material: Path) -> str:
    """A recipe file; returns what ``--config`` takes."""
    path.write_text(
        "from pathlib import Path\n"
        "from tiny_runs import make_config\n"
        "def tiny():\n"
        f"    return make_config(Path({str(path.parent / 'run')!r}), Path({str(material)!r}))\n"
    )
    return f"{path}:tiny"
