"""Models in files: checkpoints, Hugging Face directories and GGUF files read strictly, Hugging Face ones written.

Checkpoints are native ones, Orbax's and torch DCP's; the latter two hold logical arrays, or Hugging Face tensors.

Strictly: every weight that the configuration calls for is there, in its shape, and every weight that is there is used
or is checked to repeat one that is. See docs/models.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from checkpoint import find_checkpoint, open_checkpoint
from checkpoint.formats.dcp import DCPDir
from checkpoint.formats.gguf import GGUFFile
from checkpoint.formats.orbax import OrbaxDir
from checkpoint.formats.safetensors import SafetensorsDir, write_safetensors
from checkpoint.formats.safetensors_sink import SafetensorsSource
from checkpoint.formats.tensors import Tensor
from checkpoint.header import ArrayHeader
from checkpoint.reshard import narrow
from jaxsys import configuration
from jaxsys.hub import ModelSource, resolve
from jaxsys.models.config import ModelConfig
from jaxsys.models.families import Family, family, gguf_family
from jaxsys.models.state import build
from parallelism.errors import UserError, unknown_name
from parallelism.layout import Logical

Box = tuple[slice, ...]
Reader = Callable[[Logical, Box], np.ndarray]

CONFIG = "config.json"
OPTIMIZER = "optimizer."  # what names of arrays begin with that a checkpoint holds beside the model's
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""What weights are written in, and (with float64) read from, by the name in config.json."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model in files, opened and checked; no weight is in memory until it is read.

    config: the model. reader: ``reader(logical, box)`` is that box (one slice of step 1 a dimension) of the
    logical array, in ``logical.dtype``: what ``parallelism.put`` takes. It holds one tensor of the files at a time at
    most, so ask for one array's boxes one after the other; not for several threads at once. What it returns may be
    read-only.
    """

    path: Path
    config: ModelConfig
    reader: Reader

    @property
    def streamed(self) -> Reader:
        """``reader`` for several threads at once, which holds nothing but the rows that a box lies in."""
        return self.reader.rows if isinstance(self.reader, _Whole) else self.reader

    @classmethod
    def open(cls, source: ModelSource | str | os.PathLike[str]) -> Pretrained:
        """A native, Orbax or DCP checkpoint, a Hugging Face directory (config.json and safetensors), safetensors of a
        checkpoint, or a GGUF file.

        source: as ``hub.resolve`` gives it, or what it takes.
        Raises UserError for files that are missing or damaged, an architecture or a configuration that is not
        supported, and a weight that is missing, not used, of another shape, or not of a float type.
        """
        if not isinstance(source, ModelSource):
            source = resolve(source)
        openers = {
            "native": _open_native, "hf": _open_hf, "gguf": _open_gguf, "safetensors": _open_safetensors,
            "orbax": _open_orbax, "dcp": _open_dcp,
        }  # fmt: skip
        return openers[source.kind](source)


def expected_weights(config: ModelConfig) -> dict[str, Logical]:
    """Every logical array of the model by name, in float32."""
    # Layers of a kind are alike: one is described, the others follow.
    kinds = {}
    for experts in {config.experts_of(i) for i in range(config.n_layers)}:
        plain = experts and dataclasses.replace(experts, dense_layers=())
        one = dataclasses.replace(config, n_layers=1, windows=(), experts=plain)
        kinds[experts] = build(one, storage="listed").layout.logical
    first, weights = "layers.0.", {}
    for i in range(config.n_layers):
        for name, logical in kinds[config.experts_of(i)].items():
            full = f"layers.{i}.{name.removeprefix(first)}" if name.startswith(first) else name
            weights[full] = dataclasses.replace(logical, name=full)
    return weights


# ------------------------------------------------------------------------------------------------------------ reading


class Tensors(Protocol):
    """Opened files that hold arrays by name: the directories of ``checkpoint.formats``."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def __getitem__(self, name: str, /) -> ArrayHeader: ...

    def read(self, name: str, box: Box | None = None) -> np.ndarray: ...


def _open_native(source: ModelSource) -> Pretrained:
    path = source.path
    checkpoint = open_checkpoint(find_checkpoint(path))
    config = config_of_meta(checkpoint.manifest.meta, checkpoint.where)
    _check_logical(path, config, {name: array.shape for name, array in checkpoint.manifest.arrays.items()})

    def read(logical: Logical, rows: slice) -> np.ndarray:
        return checkpoint.read(logical.name, (rows, *logical.box[1:]))

    return Pretrained(path, config, _Whole(read))


def config_of_meta(meta: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the ``meta`` of a checkpoint says. Raises UserError naming the checkpoint ``where``."""
    where = f"{where}: meta"
    if not isinstance(meta.get("model"), dict):
        raise UserError(f"{where} has no 'model': not a checkpoint of a model; give a run's or an exported one")
    values = dict(meta["model"])
    return _config(lambda: configuration.from_dict(ModelConfig, values, "model."), where)


def _check_logical(path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless a checkpoint holds the model's logical arrays and, at most, an optimizer's state."""
    found = {name: shape for name, shape in shapes.items() if not name.startswith(OPTIMIZER)}
    _check(path, {name: logical.shape for name, logical in expected_weights(config).items()}, found)


def _open_orbax(source: ModelSource) -> Pretrained:
    arrays = OrbaxDir(source.path)
    if not isinstance(arrays.meta.get("model"), dict):
        return _open_beside(source, arrays, "'model' in its custom_metadata, or ")
    return _open_logical(source.path, config_of_meta(arrays.meta, str(arrays.path)), arrays)


def _open_safetensors(source: ModelSource) -> Pretrained:
    meta = SafetensorsSource(source.path).meta
    if "model" not in meta:
        raise UserError(
            f"{source.path}: does not say which model it is of: expected {CONFIG} beside the weights, or files that "
            f"jaxsys reshard wrote; put the model's {CONFIG} there"
        )
    return _open_logical(source.path, config_of_meta(meta, str(source.path)), SafetensorsDir(source.path))


def _open_logical(path: Path, config: ModelConfig, arrays: Tensors) -> Pretrained:
    """Files with the logical arrays of a model."""
    _check_logical(path, config, {name: arrays[name].shape for name in arrays})

    def read(logical: Logical, box: Box) -> np.ndarray:
        return arrays.read(logical.name, box).astype(logical.dtype, copy=False)

    return Pretrained(path, config, read)


def _open_dcp(source: ModelSource) -> Pretrained:
    return _open_beside(source, DCPDir(source.path), "")


def _open_beside(source: ModelSource, arrays: Tensors, other: str) -> Pretrained:
    """Hugging Face tensors in a checkpoint, with config.json in it or beside it. other: than that, for messages."""
    found = [place / CONFIG for place in source.places if (place / CONFIG).is_file()]
    if not found:
        raise UserError(
            f"{source.path}: does not say which model it is of: expected {other}{CONFIG} in it or beside it; copy the "
            f"model's {CONFIG} there"
        )
    kind, config = _described(found[0])
    prefix = _prefix(source.path, arrays, _file_shapes(config, kind.weight_names(config)))
    if not prefix:
        return _open_tensors(source.path, str(source.path), kind, config, arrays)
    return _open_tensors(source.path, f"{source.path} under {prefix!r}", kind, config, _Subtree(arrays, prefix))


def _open_hf(source: ModelSource) -> Pretrained:
    kind, config = _described(source.path / CONFIG)
    return _open_tensors(source.path, str(source.path), kind, config, SafetensorsDir(source.path))


def _described(where: Path) -> tuple[Family, ModelConfig]:
    """The model that a config.json describes."""
    try:
        values = json.loads(where.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot read the model's configuration ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); fetch the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds {type(values).__name__}, expected an object with a 'model_type'")
    kind = family(values.get("model_type"), str(where))
    config = _config(lambda: kind.config_from_hf(values, str(where)), str(where))
    return kind, config


def _open_tensors(path: Path, place: str, kind: Family, config: ModelConfig, arrays: Tensors) -> Pretrained:
    """Hugging Face tensors, which are checked to be the model's. place: of the tensors, for messages."""
    infos = {name: arrays[name] for name in arrays}
    for name, info in infos.items():
        if info.dtype not in (*DTYPES.values(), np.float64):
            raise UserError(f"{place}: weight {name!r} has dtype {info.dtype}, expected a float of 16 to 64 bits")
    names = kind.weight_names(config)
    shapes = {name: info.shape for name, info in infos.items()}
    extras = _check(place, _file_shapes(config, names), shapes, functools.partial(kind.redundant_weights, config))

    def read(logical: Logical, box: Box) -> np.ndarray:
        name, box = names[logical.name], _bounded(box, logical.shape)
        if isinstance(name, tuple):
            data = np.empty([s.stop - s.start for s in box], logical.dtype)
            for i, one in enumerate(name[box[0]]):
                data[i] = read_one(one, _slice(logical), box[1:])
            return data
        return read_one(name, logical, box).astype(logical.dtype, copy=False)

    def read_one(name: str, logical: Logical, box: Box) -> np.ndarray:
        merged = _merge_box(logical, box)
        if merged is None:
            return arrays.read(name).reshape(logical.shape)[box]
        return arrays.read(name, merged).reshape([s.stop - s.start for s in box])

    _check_extras(place, extras, arrays.read, names)
    return Pretrained(path, config, read)


class _Subtree:
    """The arrays under a prefix, by what follows it."""

    def __init__(self, arrays: Tensors, prefix: str):
        self._arrays, self._prefix = arrays, prefix

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._arrays if name.startswith(self._prefix))

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._arrays

    def __getitem__(self, name: str) -> ArrayHeader:
        return self._arrays[self._prefix + name]

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        return self._arrays.read(self._prefix + name, box)


def _prefix(path: Path, arrays: Tensors, expected: Collection[str]) -> str:
    """What the names of the expected arrays begin with, such as ``model.``: the rest is another part of a run's state.

    The empty one if all are there without any, else the one that has all; where none has, the one that has most.
    """
    found: Counter[str] = Counter()
    for name in arrays:
        cuts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
        found.update(name[:cut] for cut in cuts if name[cut:] in expected)
    whole = sorted(prefix for prefix, count in found.items() if count == len(expected))
    if len(whole) > 1 and whole[0]:
        raise UserError(
            f"{path}: holds the model's weights under {' and '.join(map(repr, whole))}, expected one: save them apart"
        )
    return whole[0] if whole else max(found, key=found.__getitem__, default="")


def _open_gguf(source: ModelSource) -> Pretrained:
    path = source.path
    file = GGUFFile(path)
    kind = gguf_family(file.metadata.get("general.architecture"), str(path))
    config = _config(lambda: kind.config_from_gguf(file), str(path))
    names = kind.gguf_names(config)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    extras = _check(path, _file_shapes(config, names), shapes, functools.partial(kind.redundant_gguf, config))
    _check_extras(path, extras, file.read, names)

    def read(logical: Logical, rows: slice) -> np.ndarray:
        inner = math.prod(_merged_dimensions(logical, logical.shape)[0][1:])  # rows of a head
        array = file.read(names[logical.name], rows=slice(rows.start * inner, rows.stop * inner))
        return kind.undo_gguf(config, logical.name, array).reshape(-1, *logical.shape[1:])

    return Pretrained(path, config, _Whole(read))


class _Whole:
    """A reader of files that give whole rows at best (dequantised, or verified by digests): all once for its boxes.

    read: a range of the first dimension of a logical array.
    """

    def __init__(self, read: Callable[[Logical, slice], np.ndarray]):
        self._read = read
        self._last: tuple[str, np.ndarray] | None = None

    def __call__(self, logical: Logical, box: Box) -> np.ndarray:
        if self._last is None or self._last[0] != logical.name:
            self._last = None  # freed before the next one is read
            array = self._read(logical, slice(0, logical.shape[0]))
            array.flags.writeable = False  # boxes may be views of it
            self._last = (logical.name, array)
        return self._last[1][box].astype(logical.dtype, copy=False)

    def rows(self, logical: Logical, box: Box) -> np.ndarray:
        """The same, of the rows of this box alone, and nothing is kept."""
        first, *rest = _bounded(box, logical.shape)
        return self._read(logical, first)[(slice(None), *rest)].astype(logical.dtype, copy=False)


def _config(make: Callable[[], ModelConfig], where: str) -> ModelConfig:
    try:
        return make()
    except configuration.BadValue as error:
        raise UserError(f"{where}: {error}") from error
    except UserError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:  # fields missing, or valid only one by one
        raise UserError(f"{where}: these fields make no model: {error}") from error


def file_shape(logical: Logical) -> tuple[int, ...]:
    """The shape in files: [H, h, ...] there is [H * h, ...]."""
    return tuple(math.prod(sizes) for sizes in _merged_dimensions(logical, logical.shape))


def _merged_dimensions(logical: Logical, values: Iterable[Any]) -> list[list[Any]]:
    """``values``, one a logical dimension, by the file's dimensions: what is of a head goes with the heads before."""
    groups: list[list[Any]] = []
    for axis, value in zip(logical.axes, values, strict=True):
        if groups and axis in ("head_dim", "norm"):
            groups[-1].append(value)
        else:
            groups.append([value])
    return groups


def _bounded(box: Box, shape: tuple[int, ...]) -> Box:
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(box, shape, strict=True))


def _merge_box(logical: Logical, box: Box) -> Box | None:
    """``box`` in the file's dimensions; None where it is no box there, as it cuts heads in two."""
    merged = []
    for pairs in _merged_dimensions(logical, zip(box, logical.shape, strict=True)):
        (first, _), *rest = pairs
        if any((s.start, s.stop) != (0, n) for s, n in rest):
            return None
        inner = math.prod(n for _, n in rest)
        merged.append(slice(first.start * inner, first.stop * inner))
    return tuple(merged)


def _slice(logical: Logical) -> Logical:
    """One of the slices of a logical array along its first dimension."""
    return dataclasses.replace(logical, shape=logical.shape[1:], axes=logical.axes[1:])


def _file_shapes(config: ModelConfig, names: Mapping[str, str | tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, logical in expected_weights(config).items():
        theirs = names[name]
        if isinstance(theirs, tuple):
            shapes |= dict.fromkeys(theirs, file_shape(_slice(logical)))
        else:
            shapes[theirs] = file_shape(logical)
    return shapes


def _check(
    path: Path | str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    redundant: Callable[[], Mapping[str, str | np.ndarray]] = dict,
) -> dict[str, str | np.ndarray]:
    """Raises UserError unless files and model agree on names and shapes; returns the redundant weights found.

    redundant: called once the shapes agree, as it computes arrays of the sizes that the configuration claims.
    """
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{path}: missing {_listing(missing)}: the files are incomplete, or of another model")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{path}: weight {name!r} has shape {found[name]}, the configuration calls for {shape}")
    known = redundant()
    if unused := [name for name in found if name not in expected and name not in known]:
        raise UserError(f"{path}: not used: {_listing(unused)}: the configuration is of another model")
    return {name: source for name, source in known.items() if name in found}


def _check_extras(
    path: Path | str,
    extras: Mapping[str, str | np.ndarray],
    read: Callable[[str], np.ndarray],
    names: Mapping[str, str | tuple[str, ...]],
) -> None:
    """Raises UserError for a redundant weight that says something else than what it repeats."""
    for name, source in extras.items():
        value = read(name)
        if isinstance(source, str):
            repeated = names[source]
            assert isinstance(repeated, str)
            same, what = np.array_equal(value, read(repeated)), f"weight {repeated!r}, which it should repeat"
        else:
            # Computed in the file's own precision, whichever that was.
            rounding = 4 * float(ml_dtypes.finfo(value.dtype).eps) + 1e-5
            wide = value.astype(np.float64)
            same = value.shape == source.shape and np.allclose(wide, source, rtol=rounding, atol=1e-7)
            what = "what the configuration gives"
        if not same:
            raise UserError(f"{path}: weight {name!r} differs from {what}")


def _listing(names: list[str], most: int = 3) -> str:
    shown = ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"{'weight' if len(names) == 1 else 'weights'} {shown}"


# ------------------------------------------------------------------------------------------------------------ writing


def export_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    arrays: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    token_ids: Mapping[str, int | list[int]],
    save_tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face model directory that transformers, vLLM and ``Pretrained.open`` load as the same model.

    directory: new or empty; it appears when all is written, and after an error it is not there.
    arrays: each logical array once, by name, in its logical shape and in any order; one is held at a time.
    dtype: of the weights written, one of DTYPES. token_ids: ``bos``, ``eos`` (one or more) and ``pad``, as far as the
    tokenizer has them. save_tokenizer: called with the directory to write the tokenizer's files into.
    Raises UserError if the directory is not empty, if a config.json cannot express ``config``, for an array that is
    missing, unknown, given twice or of another shape, a value too large for ``dtype``, and a full disk.
    """
    directory = Path(os.path.abspath(directory))
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; choose another or remove it")
    values = hf_config(config, dtype, token_ids, str(directory))
    names = family(config.family, "model").weight_names(config)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        write_safetensors(temporary, _renamed(directory, config, names, arrays, DTYPES[dtype]))
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        if save_tokenizer is not None:
            save_tokenizer(temporary)
        temporary.rename(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot write the model ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)


def hf_config(config: ModelConfig, dtype: str, token_ids: Mapping[str, int | list[int]], where: str) -> dict[str, Any]:
    """The config.json of a model whose weights are written in ``dtype``; ``token_ids`` as for ``export_hf``.

    Raises UserError, after ``where``, if it cannot express ``config``.
    """
    if wrong := token_ids.keys() - {"bos", "eos", "pad"}:
        raise ValueError(f"token_ids has {sorted(wrong)}, expected bos, eos and pad")
    kind = family(config.family, "model")
    values = kind.config_to_hf(config)
    expect_expressed(config, kind.config_from_hf(values, f"{where}: {CONFIG}"), f"{where}: a {config.family} {CONFIG}")
    ids = {f"{name}_token_id": token_ids.get(name) for name in ("bos", "eos", "pad")}
    return {**values, "dtype": dtype, "torch_dtype": dtype, **ids}


def expect_expressed(config: ModelConfig, back: ModelConfig, what: str) -> None:
    """Raises UserError unless ``back``, as read from what a file would say, is the same model."""
    if (found := vars(back.inference)) != (wanted := vars(config.inference)):
        different = ", ".join(name for name in wanted if found[name] != wanted[name])
        raise UserError(f"{what} cannot express this model's {different}")


def hf_tensors(config: ModelConfig, arrays: Mapping[str, Logical]) -> list[Tensor]:
    """The tensors of a Hugging Face directory, of the model's arrays in the dtypes to write."""
    names, tensors = family(config.family, "model").weight_names(config), []
    for name, logical in expected_weights(config).items():
        theirs = names[name]
        if isinstance(theirs, tuple):
            shape = file_shape(_slice(logical))
            tensors += [Tensor(one, shape, arrays[name], i) for i, one in enumerate(theirs)]
        else:
            tensors.append(Tensor(theirs, file_shape(logical), arrays[name]))
    return tensors


def _renamed(
    directory: Path,
    config: ModelConfig,
    names: Mapping[str, str | tuple[str, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype,
) -> Iterable[tuple[str, np.ndarray]]:
    left = expected_weights(config)
    for name, array in arrays:
        logical = left.pop(name, None)
        if logical is None:
            raise UserError(f"{directory}: array {name!r} is given twice or is none of the model's")
        if array.shape != logical.shape:
            raise UserError(f"{directory}: array {name!r} has shape {array.shape}, the model's is {logical.shape}")
        theirs = names[name]
        if isinstance(theirs, tuple):
            for one, part in zip(theirs, array, strict=True):
                yield one, narrow(np.ascontiguousarray(part).reshape(file_shape(_slice(logical))), dtype, name)
        else:
            yield theirs, narrow(np.ascontiguousarray(array).reshape(file_shape(logical)), dtype, name)
    if left:
        raise UserError(f"{directory}: missing {_listing(list(left))}: the checkpoint is incomplete")
