"""Directories of torch.distributed.checkpoint (DCP), read in place where torch is installed.

``.metadata`` is a pickle that lists tensors, the chunks that they were saved in, and where each lies: a range of a
``*.distcp`` file that is what ``torch.save`` made of the chunk. A pickle runs whatever it names, so this one is read by
an unpickler that knows a few names and makes plain records of them all; chunks are read by torch with
``weights_only=True``.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.header import ArrayHeader, Headers, bounded, check_shape, is_file_name
from checkpoint.manifest import DTYPES, Array, Chunk, CorruptError, check_coverage
from checkpoint.reader import Box, intersect, slices
from parallelism.errors import UserError

METADATA = ".metadata"

_NOT_IN_TORCH = {"float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float4_e2m1fn", "int2", "int4", "uint2", "uint4"}
_DTYPES = DTYPES.keys() - _NOT_IN_TORCH


class _Record:
    """Stands for an object of torch: what was given to make it, and its attributes."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Tensor(_Record):
    """Of TensorStorageMetadata."""

    properties: Any
    size: tuple[int, ...]
    chunks: list[Any]


class _Bytes(_Record):
    """Of BytesStorageMetadata: a Python object, not an array."""


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Tensor,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): _Bytes,
    ("torch", "Size"): tuple,
    **dict.fromkeys(
        [
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            # Where Python 3.13 has them.
            ("pathlib._local", "PosixPath"),
            ("pathlib._local", "WindowsPath"),
        ],
        _Record,
    ),
    ("collections", "OrderedDict"): dict,
}


_DTYPE = re.compile(r"bool|(q?u?int|b?float|complex|bits)\d\w*")


class _Unpickler(pickle._Unpickler):
    """The one in Python: the one in C takes as much memory as a damaged file says."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no list of tensors needs")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects elsewhere")


class DCPDir(Headers[ArrayHeader]):
    """The tensors of a DCP directory.

    Maps each name (keys of the state dictionary joined by dots, as DCP has them) to its shape and dtype. Python
    objects among them are not arrays and not here.

    Raises UserError if the directory is none, it is damaged, names something that a list of tensors has no use for,
    or torch is missing. A chunk whose bytes are damaged is found by ``read``, unless torch was told to save without
    checksums.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._torch = _torch()
        where = self.path / METADATA
        try:
            with open(where, "rb") as file:
                metadata = _Unpickler(file).load()
            self._places = {
                (index.fqn, tuple(index.offset)): place
                for index, place in metadata.storage_data.items()
                if getattr(index, "offset", None) is not None
            }
            self._arrays, self._chunks = {}, {}
            for name, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, _Tensor):
                    self._arrays[name], self._chunks[name] = _tensor(name, entry, str(where))
                elif not isinstance(entry, _Bytes):
                    raise ValueError(f"{name!r} is neither a tensor nor an object")
            for name, chunks in self._chunks.items():
                for start, _ in chunks:
                    _check_place(name, self._places[name, start])
        except OSError as error:
            raise UserError(f"{where}: not a DCP directory: the file cannot be read ({error.strerror})") from error
        except UserError:
            raise
        except Exception as error:  # what a damaged pickle leads to may raise nearly anything
            said = f"{type(error).__name__}: {error}"
            raise CorruptError(f"{where}: damaged or of another kind ({said}); use another checkpoint") from error
        self._last: tuple[tuple[str, tuple[int, ...]], np.ndarray] | None = None

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
        """A new array in its own dtype: all of ``name``, or what ``box`` (one slice a dimension) selects.

        Reads the chunks that the box meets, whole, one at a time; the last one is kept for the next box. Raises
        CorruptError if one is missing or damaged.
        """
        info = self._arrays.get(name)
        if info is None:
            raise UserError(f"{self.path}: no tensor {name!r} among the {len(self)} there")
        selected = bounded(name, info.shape, box)
        wanted: Box = tuple(s.start for s in selected), tuple(s.stop - s.start for s in selected)
        out = np.empty(wanted[1], info.dtype)
        for chunk in self._chunks[name]:
            if (shared := intersect(wanted, chunk)) is not None:
                out[slices(*shared, wanted[0])] = self._read_chunk(name, chunk)[slices(*shared, chunk[0])]
        return out

    def _read_chunk(self, name: str, chunk: Box) -> np.ndarray:
        start, shape = chunk
        last = self._last  # which another thread may replace
        if last is not None and last[0] == (name, start):
            return last[1]
        self._last = last = None  # freed before the next one is read
        place = self._places[name, start]
        where, dtype = self.path / place.relative_path, self._arrays[name].dtype
        try:
            with open(where, "rb") as file:
                file.seek(place.offset)
                raw = file.read(place.length)
        except OSError as error:
            raise CorruptError(f"{where}: cannot be read ({error.strerror}); use another checkpoint") from error
        problem = f"{where}: the chunk of tensor {name!r} at {start}"
        if len(raw) != place.length:
            raise CorruptError(f"{problem} is cut short: {len(raw)} bytes of {place.length}; use another checkpoint")
        try:
            _check_sums(raw)
            tensor = self._torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several, and some over many lines
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CorruptError(f"{problem} is damaged ({reason}); use another checkpoint") from error
        found = getattr(tensor, "dtype", None), tuple(getattr(tensor, "shape", ()))
        if found != (getattr(self._torch, dtype.name, None), shape):
            raise CorruptError(
                f"{problem} is {found[0]} of shape {found[1]}, expected {dtype.name} of {shape}; use another checkpoint"
            )
        tensor = tensor.detach().resolve_conj().resolve_neg()  # views that are conjugated or negated as they are read
        array = tensor.contiguous().reshape(-1).view(self._torch.uint8).numpy().view(dtype).reshape(shape)
        self._last = (name, start), array
        return array


def _check_sums(raw: bytes) -> None:
    """Raises BadZipFile if a checksum in what ``torch.save`` made is wrong, which torch does not look at.

    Where it was told to save none, they are 0.
    """
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for member in filter(lambda member: member.CRC, archive.infolist()):
            with archive.open(member) as file:
                while file.read(1 << 20):
                    pass


def _tensor(name: str, entry: _Tensor, where: str) -> tuple[ArrayHeader, list[Box]]:
    """What the metadata says of a tensor, and its chunks. Raises ValueError and the like if that makes no sense."""
    dtype = entry.properties.state[0]
    if isinstance(dtype, str) and dtype not in _DTYPES and _DTYPE.fullmatch(dtype) and hasattr(_torch(), dtype):
        raise UserError(f"{where}: tensor {name!r} has dtype {dtype}, which is not read here; save it in another")
    if dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r:.80}")
    info = ArrayHeader(tuple(entry.size), DTYPES[dtype])
    check_shape(name, info.shape, info.dtype.itemsize)
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    if any(type(n) is not int for box in boxes for n in (*box[0], *box[1])):
        raise ValueError(f"tensor {name!r} has a chunk at {boxes!r:.80}")
    boxes = [box for box in boxes if 0 not in box[1]]
    chunks = [Chunk(*box, METADATA, 0, math.prod(box[1]) * info.dtype.itemsize, "") for box in boxes]
    check_coverage(name, Array(info.dtype, info.shape, (None,) * len(info.shape), tuple(chunks)), where)
    return info, boxes


def _check_place(name: str, place: Any) -> None:
    if not is_file_name(place.relative_path):
        raise ValueError(f"tensor {name!r} lies in {place.relative_path!r:.80}, not the name of a file beside it")
    if type(place.offset) is not int or type(place.length) is not int or min(place.offset, place.length) < 0:
        raise ValueError(f"tensor {name!r} lies at {place.offset!r:.80}, {place.length!r:.80} bytes")
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"tensor {name!r} is stored by {place.transform_descriptors}, which is not read here")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "DCP directories need torch, which is not installed; install it with: pip install 'jaxsys[dcp]'"
        ) from error
    return torch
