"""One model out of any source: as a native checkpoint, or as a Hugging Face directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import checkpoint
from checkpoint.formats.safetensors import SafetensorsDir
from checkpoint.reshard import narrow
from checkpoint.writer import Piece
from jaxsys import configuration
from jaxsys.console import Console
from jaxsys.hub import ModelSource, is_native, resolve
from jaxsys.models.pretrained import DTYPES, OPTIMIZER, Pretrained, expected_weights, export_hf
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError
from parallelism.layout import Logical


def to_native(source: str, destination: Path, dtype: str | None, parameters_only: bool, console: Console) -> int:
    """Writes ``source`` as the new checkpoint directory ``destination``, its tokenizer inside; returns bytes of arrays.

    dtype: of the parameters; as they are if not given, float32 where the source is no checkpoint. A native source is
    streamed, with the optimizer state, in its own dtypes, unless ``parameters_only``.
    Raises UserError as its parts do, and leaves nothing then.
    """
    found = _resolve(source, destination)
    tokenizer = Tokenizer.of(found)

    def add_tokenizer(directory: Path) -> None:
        tokenizer.save(directory / "tokenizer")

    if found.kind == "native":
        _copy(found.path, destination, dtype, parameters_only, add_tokenizer, console)
    else:
        pretrained = Pretrained.open(found)
        target = DTYPES[dtype or "float32"]
        specs = {n: dataclasses.replace(s, dtype=target) for n, s in expected_weights(pretrained.config).items()}
        pieces = (
            Piece(specs[logical.name], (0,) * array.ndim, narrow(array, target, logical.name))
            for logical, array in _arrays(pretrained, console)
        )
        meta = {"model": configuration.to_dict(pretrained.config)}
        checkpoint.write(destination, 0, meta, specs.values(), pieces, add_files=add_tokenizer)
    return checkpoint.open_checkpoint(destination).manifest.nbytes


def to_hugging_face(source: str, destination: Path, dtype: str | None, console: Console) -> int:
    """Writes the parameters of ``source`` as the new Hugging Face directory ``destination``; returns bytes of arrays.

    dtype: of the weights, float32 if not given. One array is in memory at a time.
    Raises UserError as its parts do, and leaves nothing then.
    """
    found = _resolve(source, destination)
    pretrained, tokenizer = Pretrained.open(found), Tokenizer.of(found)
    ids = {"bos": tokenizer.bos_id, "eos": list(tokenizer.eos_ids), "pad": tokenizer.pad_id}
    export_hf(
        destination,
        pretrained.config,
        ((logical.name, array) for logical, array in _arrays(pretrained, console)),
        dtype=dtype or "float32",
        token_ids={name: value for name, value in ids.items() if value not in (None, [])},
        save_tokenizer=tokenizer.save,
    )
    return sum(info.nbytes for info in SafetensorsDir(destination).values())


def _resolve(source: str, destination: Path) -> ModelSource:
    """The files of ``source``. Raises UserError for a destination that exists, or lies in the run that is read."""
    if destination.exists():
        raise UserError(f"{destination} exists already: give a new directory, or remove it first")
    found = resolve(source)
    path = found.path.resolve()
    # A step, the checkpoints of a run, the run: what a run holds is its own, and it would resume from what it finds.
    owned = [place for place in (path, *path.parents[:2]) if is_native(place) or is_native(place / "checkpoints")]
    if owned and destination.resolve().is_relative_to(owned[-1]):
        raise UserError(f"{destination} lies inside its source {owned[-1]}: give a directory elsewhere")
    return found


def _arrays(pretrained: Pretrained, console: Console) -> Iterator[tuple[Logical, np.ndarray]]:
    """Every array of a model, whole and in float32, one at a time."""
    weights = expected_weights(pretrained.config)
    with console.bar("export", len(weights)) as advance:
        for logical in weights.values():
            yield logical, pretrained.reader(logical, logical.box)
            advance(1, logical.name)


def _copy(
    source: Path,
    destination: Path,
    dtype: str | None,
    parameters_only: bool,
    add_files: Callable[[Path], None],
    console: Console,
) -> None:
    """Streams one native checkpoint into another."""
    with console.bar("reshard", 100) as advance:
        shown = 0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            percent = 100 * done // max(total, 1)
            advance(percent - shown, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
            shown = percent

        def is_state(name: str) -> bool:
            return name.startswith(OPTIMIZER)

        checkpoint.copy(
            source,
            destination,
            dtype=dtype,
            keep_dtype=is_state,
            select=(lambda name: not is_state(name)) if parameters_only else None,
            progress=progress,
            add_files=add_files,
        )
