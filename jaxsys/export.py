"""One checkpoint or model out of any other: ``jaxsys reshard``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.conversion import Progress, Sink, Source, convert, stream
from checkpoint.formats.gguf_sink import TYPES, GGUFSink, tensor_type
from checkpoint.formats.native import NativeSink, NativeSource
from checkpoint.formats.orbax import OrbaxDir, write_orbax
from checkpoint.formats.safetensors_sink import SafetensorsSink, SafetensorsSource, state_metadata
from checkpoint.formats.tensors import FilesSource, Tensor, identity_of, plain
from checkpoint.rules import Chosen, Rules
from checkpoint.storage import directory_of, place_of, refuse_existing
from jaxsys import configuration
from jaxsys.console import Console
from jaxsys.gguf_vocabulary import tokenizer_to_gguf
from jaxsys.hub import ModelSource, is_native, resolve
from jaxsys.models.config import ModelConfig
from jaxsys.models.families import gguf_family
from jaxsys.models.pretrained import (
    CONFIG,
    DTYPES,
    OPTIMIZER,
    Pretrained,
    config_of_meta,
    expect_expressed,
    expected_weights,
    file_shape,
    hf_config,
    hf_tensors,
)
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError, unknown_name
from parallelism.layout import Logical


@dataclasses.dataclass(frozen=True)
class Asked:
    """What ``reshard`` is to write.

    format: a key of FORMATS. dtype: of parameters; None keeps what a source of one of STATES has, where the format is
    one of those, and is float32 otherwise; "q8_0" is for gguf. parameters_only: no optimizer state. select,
    exclude, rename: as in ``checkpoint.rules.Rules``.
    """

    format: str = "native"
    dtype: str | None = None
    parameters_only: bool = False
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()


class _Model:
    """The weights of a model in files that are no checkpoint of ours, in float32, as a source."""

    step = 0
    verified = False

    def __init__(self, found: ModelSource):
        pretrained = Pretrained.open(found)
        self._read, self.where = pretrained.streamed, str(found.path)
        self.meta: Mapping[str, Any] = {"model": configuration.to_dict(pretrained.config)}
        self.arrays: Mapping[str, Logical] = expected_weights(pretrained.config)
        files = [found.path] if found.path.is_file() else sorted(p for p in found.path.rglob("*") if p.is_file())
        self.identity: Any = identity_of(files)

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        return self._read(self.arrays[name], box)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A source with its tokenizer (None where it is no model's), what was chosen of it, and where it goes."""

    source: Source
    tokenizer: Tokenizer | None
    chosen: dict[str, Chosen]
    asked: Asked
    destination: Path
    progress: Progress

    def convert(self, sink: Sink, add_files: Callable[[Path], None] | None = None) -> int:
        return convert(self.source, self.chosen, sink, self.destination, add_files=add_files, progress=self.progress)

    def add_tokenizer(self, directory: Path) -> None:
        """To a format that holds whole states."""
        if self.tokenizer is not None:
            self.tokenizer.save(directory / "tokenizer")

    def model(self) -> tuple[ModelConfig, Tokenizer]:
        """For a format that holds a model and nothing else: what was chosen must be one, whole."""
        what = f"{self.asked.format} holds whole models"
        if "model" not in self.source.meta or self.tokenizer is None:
            raise UserError(f"{self.source.where} is no language model, and {what}; write native or safetensors")
        config = config_of_meta(self.source.meta, self.source.where)
        expected = expected_weights(config)
        missing = [name for name in expected if name not in self.chosen]
        left_over = [name for name in self.chosen if name not in expected]
        other = [n for n, e in expected.items() if n in self.chosen and self.chosen[n].logical.shape != e.shape]
        for names, wrong in ((missing, "missing"), (left_over, "not of the model"), (other, "of another shape")):
            if names:
                raise UserError(
                    f"{what}, but of what is chosen {len(names)} arrays are {wrong} ({', '.join(names[:3])}); choose "
                    "all of the model, or write native or safetensors"
                )
        return config, self.tokenizer

    def cast(self, name: str, dtype: np.dtype) -> Logical:
        """Have a chosen array made in ``dtype``."""
        chosen = self.chosen[name]
        self.chosen[name] = dataclasses.replace(chosen, logical=dataclasses.replace(chosen.logical, dtype=dtype))
        return self.chosen[name].logical


def reshard(source: str, destination: Path, asked: Asked, console: Console) -> int:
    """Writes ``source`` as the new ``destination``; returns bytes of arrays. Memory, interrupts: as ``convert``.

    Raises UserError as its parts do.
    """
    if asked.format not in FORMATS:
        raise unknown_name("format", asked.format, FORMATS)
    if asked.dtype is not None and asked.dtype not in (TYPES if asked.format == "gguf" else DTYPES):
        raise UserError(f"--dtype {asked.dtype} is for gguf alone; give one of {', '.join(DTYPES)}")
    if isinstance(url := place_of(destination), str):
        raise UserError(
            f"{url} is a URL, expected a directory or a file; give a directory, and copy the checkpoint from there: "
            f"jaxsys checkpoint copy DIR {url}"
        )
    refuse_existing(destination)
    try:
        str(destination).encode()
    except UnicodeEncodeError as e:  # libraries that write there know of no other names
        raise UserError(f"{str(destination)!r} is not UTF-8; choose another destination") from e
    with _shown(console) as progress:
        _refuse_inside(source, destination)
        opened, tokenizer = open_source(source, lambda done, total: progress.bytes_done("source", done, total))
        if isinstance(opened, NativeSource):
            console.line(f"step {opened.step} of {opened.where}")
        if not opened.verified:
            console.line(f"{opened.where} has no digests: what is read of it is taken as it is")
        job = _Job(opened, tokenizer, _chosen(opened, asked), asked, destination, progress)
        return FORMATS[asked.format](job)


def _chosen(source: Source, asked: Asked) -> dict[str, Chosen]:
    keeps = asked.format in STATES and not isinstance(source, _Model)
    rules = Rules(
        select=asked.select,
        exclude=asked.exclude,
        rename=asked.rename,
        dtype=None if keeps and asked.dtype is None else "float32" if asked.dtype in (None, "q8_0") else asked.dtype,
        keep_dtype=lambda name: name.startswith(OPTIMIZER),
    )
    state = not asked.parameters_only and asked.format in STATES
    arrays = {name: array for name, array in source.arrays.items() if state or not name.startswith(OPTIMIZER)}
    return rules.apply(arrays, source.where)


def _refuse_inside(source: str, destination: Path) -> None:
    """Raises UserError for a destination that lies in the run that is read."""
    path = Path(source).expanduser().resolve()
    # A step, the checkpoints of a run, the run: what a run holds is its own, and it would resume from what it finds.
    owned = [place for place in (path, *path.parents[:2]) if is_native(place) or is_native(place / "checkpoints")]
    if owned and destination.resolve().is_relative_to(owned[-1]):
        raise UserError(f"{destination} lies inside its source {owned[-1]}: give a directory elsewhere")


def open_source(source: str, progress: Callable[[int, int], None] | None = None) -> tuple[Source, Tokenizer | None]:
    """What ``hub.resolve`` finds, as arrays by name, and the tokenizer of a model.

    Checkpoints are as they are, with their optimizer state where the format has names of ours; models in other files
    are in float32. progress: of verifying a native one, in bytes. Raises UserError as those do that read it.
    """
    found = resolve(source)
    opened: Source
    if found.kind == "native":
        opened = NativeSource(found.path, progress)
    elif found.kind == "safetensors":
        opened = SafetensorsSource(found.path)
    elif found.kind == "orbax" and "model" in (arrays := OrbaxDir(found.path)).meta:
        identity = identity_of(sorted(path for path in arrays.path.rglob("*") if path.is_file()))
        opened = FilesSource(arrays, str(found.path), identity, meta=arrays.meta)
    else:
        opened = _Model(found)
    if "model" not in opened.meta:
        return opened, None
    # Arrays of a model may be all that somebody has in safetensors.
    bare = found.kind == "safetensors" and not any((place / "tokenizer").is_dir() for place in found.places)
    return opened, None if bare else Tokenizer.of(found)


def _native(job: _Job) -> int:
    name, expected = job.destination.name, directory_of(job.source.step)
    if name.startswith("step-") and name != expected:  # who reads it there would take it for damaged
        raise UserError(f"{job.destination} is to hold step {job.source.step}: call it {expected}, or not step-...")
    return job.convert(NativeSink(job.chosen, job.source.step, job.source.meta), job.add_tokenizer)


def _safetensors(job: _Job) -> int:
    arrays = {name: chosen.logical for name, chosen in job.chosen.items()}
    metadata = state_metadata(job.source.step, job.source.meta, arrays)
    return job.convert(SafetensorsSink("safetensors", plain(arrays.values()), metadata=metadata), job.add_tokenizer)


def _hugging_face(job: _Job) -> int:
    config, tokenizer = job.model()
    dtype = job.asked.dtype or "float32"
    ids = {"bos": tokenizer.bos_id, "eos": list(tokenizer.eos_ids), "pad": tokenizer.pad_id}
    known = {name: value for name, value in ids.items() if value not in (None, [])}
    values = hf_config(config, dtype, known, str(job.destination))
    arrays = {name: job.cast(name, DTYPES[dtype]) for name in job.chosen}

    def add_files(directory: Path) -> None:
        (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        tokenizer.save(directory)

    return job.convert(SafetensorsSink("hf", hf_tensors(config, arrays)), add_files)


def _gguf(job: _Job) -> int:
    config, tokenizer = job.model()
    family, dtype = gguf_family(config.family, str(job.destination)), job.asked.dtype or "float32"
    weights, tensors = expected_weights(config), []
    for name, theirs in family.gguf_names(config).items():
        shape = file_shape(weights[name])
        made = {"F16": "float16", "BF16": "bfloat16"}.get(tensor_type(shape, dtype).name, "float32")
        tensors.append(Tensor(theirs, shape, job.cast(name, DTYPES[made])))
    metadata: dict[str, Any] = {"general.architecture": config.family}
    metadata |= {f"{config.family}.{key}": value for key, value in family.config_to_gguf(config).items()}
    metadata |= tokenizer_to_gguf(tokenizer, config.vocab_size)
    constants = {name: value for name, value in family.redundant_gguf(config).items() if isinstance(value, np.ndarray)}

    def rows(name: str, array: np.ndarray) -> np.ndarray:
        return family.to_gguf(config, name, array)

    sink = GGUFSink(job.destination, metadata, tensors, dtype, constants, rows)
    expect_expressed(config, family.config_from_gguf(sink), f"{job.destination}: a GGUF file of {config.family}")
    return job.convert(sink)


def _orbax(job: _Job) -> int:
    arrays = stream(job.source, job.chosen, job.progress)
    write_orbax(job.destination, arrays, job.source.meta, add_files=job.add_tokenizer)
    return sum(chosen.logical.nbytes for chosen in job.chosen.values())


FORMATS: dict[str, Callable[[_Job], int]] = {
    "native": _native,
    "safetensors": _safetensors,
    "hf": _hugging_face,
    "gguf": _gguf,
    "orbax": _orbax,
}
"""Writes what was chosen, by the name of the format; returns bytes of arrays."""
STATES = ("native", "safetensors", "orbax")
"""The formats that hold any arrays by any names, optimizer state too."""


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[Progress]:
    """A bar for each phase, one after the other."""
    with contextlib.ExitStack() as bar:
        now, percent, advance = "", 0, None

        def bytes_done(phase: str, done: int, total: int) -> None:
            nonlocal now, percent, advance
            if phase != now:
                bar.close()
                now, percent, advance = phase, 0, bar.enter_context(console.bar(phase, 100))
            assert advance is not None
            step = 100 * done // max(total, 1) - percent
            advance(step, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
            percent += step

        yield Progress(bytes_done, console.line)
