"""GGUF model files, read in place.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here rather than
by ``gguf.GGUFReader``, which makes a memory-map view for every string of the vocabulary and so takes seconds to
open a file whose tensors nobody has asked for yet; dequantisation is the library's.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import DTypeLike

from checkpoint.header import MAX_DIMENSIONS, check_disjoint, check_shape, unique
from parallelism.errors import UserError

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file.

    shape: in numpy order (the file lists the fastest dimension first).
    type: the quantisation type's name, such as ``Q4_1`` or ``F32``.
    start, nbytes: where its blocks lie, in bytes from the start of the file.
    """

    shape: tuple[int, ...]
    type: str
    start: int
    nbytes: int


class GGUFHeader(Protocol):
    """What a GGUF file says of a model without its weights: of one that is there, or is to be written."""

    path: Path
    metadata: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """A tensor that is no weight, in float32."""


class GGUFFile:
    """A GGUF file (versions 2 and 3, little-endian).

    metadata: key -> int, float, bool, str or a list of these.
    tensors: name -> TensorInfo, in the order of the file.

    Raises UserError if the file is missing, truncated or not such a file.
    """

    metadata: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise UserError(f"{self.path}: the file is empty, expected a GGUF model")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    header = _Header(data, self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot read the GGUF model ({error.strerror}); check the path") from error
        self.metadata, self.tensors = header.metadata, header.tensors
        last = max(self.tensors.values(), key=lambda t: t.start + t.nbytes, default=None)
        if last is not None and last.start + last.nbytes > size:
            raise UserError(
                f"{self.path}: truncated GGUF file: {size} bytes found, {last.start + last.nbytes} expected; "
                "fetch the file again"
            )

    def read(self, name: str, dtype: DTypeLike = np.float32, rows: slice = slice(None)) -> np.ndarray:
        """The tensor ``name``, dequantised through float32 into ``dtype``: a new array of ``tensors[name].shape``.

        rows: what to read of the first axis (step 1); only its bytes are read. Safe to use from several threads.
        Raises UserError for a name that is not in the file and for a quantisation type outside SUPPORTED_TYPES.
        """
        info = self.tensors.get(name)
        if info is None:
            raise UserError(f"{self.path}: no tensor {name!r} among the {len(self.tensors)} of the file")
        if info.type not in SUPPORTED_TYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} has quantisation type {info.type}, supported are "
                f"{', '.join(SUPPORTED_TYPES)}; convert the file to one of these"
            )
        shape, start, nbytes = info.shape, info.start, info.nbytes
        if len(shape) > 1:  # a vector is one row of blocks
            first, stop, _ = rows.indices(shape[0])
            row = nbytes // (shape[0] or 1)
            shape, start, nbytes = (stop - first, *shape[1:]), start + first * row, (stop - first) * row
        if not nbytes:
            return np.zeros(shape, dtype)[rows if len(shape) == 1 else ...]
        with open(self.path, "rb") as file:
            file.seek(start)
            raw = np.fromfile(file, np.uint8, nbytes)
        if raw.nbytes < nbytes:
            raise UserError(f"{self.path}: truncated since it was opened: tensor {name!r} ends early; fetch it again")
        blocks = raw.reshape(math.prod(shape[:-1]), -1)
        found = dequantize(blocks, GGMLQuantizationType[info.type]).reshape(shape).astype(dtype, copy=False)
        return found[rows] if len(shape) == 1 else found


class _Header:
    """Metadata and tensor table of a GGUF file, read front to back."""

    def __init__(self, data: mmap.mmap, path: Path):
        self._data, self._path, self._at = data, path, 0
        if data[:4] != b"GGUF":
            raise UserError(f"{path}: not a GGUF file: it starts with {data[:4]!r}, expected b'GGUF'")
        self._at = 4
        try:
            version = self._scalar("I")
            if version not in (2, 3):
                raise UserError(f"{path}: GGUF version {version} found, 2 or 3 (little-endian) expected")
            tensor_count, pair_count = self._scalar("Q"), self._scalar("Q")
            self.metadata = unique((self._string(), self._value(self._scalar("I"))) for _ in range(pair_count))
            alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
            if type(alignment) is not int or alignment < 1 or alignment % 8:
                raise ValueError(f"general.alignment is {alignment!r:.80}, expected a multiple of 8")
            tensors = unique(self._tensor(alignment) for _ in range(tensor_count))
            check_disjoint({name: (t.start, t.start + t.nbytes) for name, t in tensors.items()})
        except (struct.error, IndexError) as error:
            raise UserError(
                f"{path}: truncated GGUF file: its {len(data)} bytes end inside the header; fetch the file again"
            ) from error
        except UserError:
            raise
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: damaged GGUF header near byte {self._at} ({error}); fetch the file again"
            ) from error
        # Offsets count from where the data begins, which is known now.
        base = -(-self._at // alignment) * alignment
        self.tensors = {name: dataclasses.replace(t, start=base + t.start) for name, t in tensors.items()}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise IndexError
        return self._data[start : self._at].decode()

    def _value(self, kind: int) -> Any:
        kind = GGUFValueType(kind)
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = GGUFValueType(self._scalar("I")), self._scalar("Q")
        if item == GGUFValueType.STRING:
            return [self._string() for _ in range(count)]
        if item == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays")
        # One array of scalars at once: token scores and types are as many as the vocabulary.
        array = np.dtype("<" + _SCALARS[item])
        start, self._at = self._at, self._at + count * array.itemsize
        if self._at > len(self._data):
            raise IndexError
        return np.frombuffer(self._data, array, count, start).tolist()

    def _tensor(self, alignment: int) -> tuple[str, TensorInfo]:
        """A name, and its tensor with ``start`` counted from where the data begins."""
        name, dimensions = self._string(), self._scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dimensions)]))
        kind, offset = GGMLQuantizationType(self._scalar("I")), self._scalar("Q")
        block, nbytes = GGML_QUANT_SIZES[kind]
        check_shape(name, shape, 4)  # what is dequantised comes as float32
        if (row := shape[-1] if shape else 1) % block:
            raise ValueError(f"tensor {name!r} of type {kind.name} has rows of {row}, no multiple of {block}")
        if offset % alignment:
            raise ValueError(f"tensor {name!r} begins at {offset}, no multiple of {alignment}")
        return name, TensorInfo(shape, kind.name, offset, math.prod(shape) // block * nbytes)
