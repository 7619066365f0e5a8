"""One model out of any source: as a native checkpoint, or as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import checkpoint
from checkpoint.writer import Piece
from jaxsys import configuration
from jaxsys.console import Console
from jaxsys.hub import resolve
from jaxsys.models.pretrained import Pretrained, export_hf
from jaxsys.models.state import build
from jaxsys.tokenizer import Tokenizer

OPTIMIZER = "optimizer."


def export_native(source: str, destination: Path, dtype: str | None, parameters_only: bool, console: Console) -> int:
    """Writes ``source`` as the checkpoint directory ``destination``, its tokenizer inside; returns bytes of arrays.

    A native source is streamed, optimizer state included unless ``parameters_only``.
    Raises UserError as its parts do; what was begun is for the caller to remove.
    """
    found = resolve(source)
    if found.kind == "native":
        with console.bar("reshard", 100) as advance:
            shown = 0

            def progress(done: int, total: int) -> None:
                nonlocal shown
                percent = 100 * done // max(total, 1)
                advance(percent - shown, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
                shown = percent

            keep = (lambda name: not name.startswith(OPTIMIZER)) if parameters_only else None
            checkpoint.copy(found.path, destination, dtype=dtype, select=keep, progress=progress)
    else:
        pretrained = Pretrained.open(found.path)
        specs = build(pretrained.config, dtype=dtype or "float32", storage="listed").layout.logical
        pieces = (Piece(spec, (0,) * len(spec.shape), pretrained.reader(spec, spec.box)) for spec in specs.values())
        checkpoint.write(destination, 0, {"model": configuration.to_dict(pretrained.config)}, specs.values(), pieces)
    Tokenizer.of(found).save(destination / "tokenizer")
    return checkpoint.open_checkpoint(destination).manifest.nbytes


def export_hf_directory(source: str, destination: Path, dtype: str | None, console: Console) -> int:
    """Writes the parameters of ``source`` as a Hugging Face directory; returns bytes of arrays.

    dtype: of the weights, float32 if not given. One array is in memory at a time.
    """
    found = resolve(source)
    pretrained, tokenizer = Pretrained.open(found.path), Tokenizer.of(found)
    model = build(pretrained.config, dtype="float32", storage="listed")
    total = 0
    with console.bar("export", len(model.layout.logical)) as advance:

        def arrays() -> Iterator[tuple[str, np.ndarray]]:
            nonlocal total
            for name, logical in model.layout.logical.items():
                array = pretrained.reader(logical, logical.box)
                total += array.size * (4 if dtype in (None, "float32") else 2)
                yield name, array
                advance(1, name)

        ids = {"bos": tokenizer.bos_id, "eos": list(tokenizer.eos_ids), "pad": tokenizer.pad_id}
        export_hf(
            destination,
            pretrained.config,
            arrays(),
            dtype=dtype or "float32",
            token_ids={name: value for name, value in ids.items() if value not in (None, [])},
            save_tokenizer=tokenizer.save,
        )
    return total
