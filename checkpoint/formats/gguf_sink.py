"""GGUF files as a sink of conversions (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3)."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from checkpoint.conversion import Part
from checkpoint.formats.gguf import GGUFFile, TensorInfo
from checkpoint.formats.tensors import Tensor
from checkpoint.storage import write_at
from parallelism.errors import UserError

TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""By what a user asks for: the type of matrices, and what the file is then said to be."""
FILE = "model.gguf"

_VALUES: list[tuple[type, GGUFValueType, str]] = [
    (bool, GGUFValueType.BOOL, "?"),
    (int, GGUFValueType.UINT32, "I"),
    (float, GGUFValueType.FLOAT32, "f"),
]
_ITEMS: list[tuple[type, GGUFValueType, str]] = [
    (int, GGUFValueType.INT32, "<i4"),
    (float, GGUFValueType.FLOAT32, "<f4"),
]


def tensor_type(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """What a tensor is written as where ``dtype``, a key of TYPES, is asked for.

    Vectors stay float32, and rows that are not made of whole blocks become float16, as llama.cpp has them.
    """
    kind, _ = TYPES[dtype]
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


class GGUFSink:
    """One GGUF file, ``FILE`` of its draft; beforehand it is a ``GGUFHeader``.

    path: of the file, for messages. metadata: str, bool, int (uint32), float (float32), or lists of str, int (int32)
    or float, by key; what says the type of the file is added.
    tensors: of matrices, arrays in the dtypes of ``tensor_type``, Q8_0 from float32. dtype: a key of TYPES.
    constants: float32 tensors that are no array of a conversion. rows: ``rows(array's name, rows of its tensor)`` are
    the rows as the file has them.
    """

    format = "gguf"
    only_file: str | None = FILE

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[Tensor],
        dtype: str,
        constants: Mapping[str, np.ndarray],
        rows: Callable[[str, np.ndarray], np.ndarray],
    ):
        self.path, self._rows, self._constants = path, rows, constants
        self.metadata = {**metadata, "general.file_type": int(TYPES[dtype][1]), "general.quantization_version": 2}
        self._tensors = {tensor.array.name: tensor for tensor in tensors}
        kinds = {name: (array.shape, GGMLQuantizationType.F32) for name, array in constants.items()}
        kinds |= {tensor.name: (tensor.shape, tensor_type(tensor.shape, dtype)) for tensor in tensors}
        infos: dict[str, TensorInfo] = {}
        offset = 0
        for name, (shape, kind) in kinds.items():
            block, nbytes = GGML_QUANT_SIZES[kind]
            infos[name] = TensorInfo(shape, kind.name, offset, math.prod(shape) // block * nbytes)
            offset = _aligned(offset + infos[name].nbytes)
        self.tensors: Mapping[str, TensorInfo] = infos
        head = self._header()
        self._base = len(head)
        for name, array in constants.items():
            head = head.ljust(self._base + self.tensors[name].start) + np.asarray(array, "<f4").tobytes()
        self._head = head
        self.parts: Sequence[Part] = list(self._plan())

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._constants[name], np.float32)

    def _plan(self) -> Iterator[Part]:
        for tensor in self._tensors.values():
            info = self.tensors[tensor.name]
            offset, elements = self._base + info.start, math.prod(info.shape)
            for start, shape in tensor.boxes(rows=True):
                nbytes = info.nbytes * math.prod(shape) // elements
                yield Part(tensor.array.name, start, shape, FILE, offset, nbytes)
                offset += nbytes

    def encode(self, part: Part, data: np.ndarray) -> np.ndarray:
        tensor = self._tensors[part.array]
        rows = self._rows(part.array, data.reshape(-1, *tensor.shape[1:]))
        if self.tensors[tensor.name].type == "Q8_0":
            rows = quantize(rows, GGMLQuantizationType.Q8_0)
        return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)

    def finish(self, directory: Path, digests: Sequence[str]) -> None:
        path = directory / FILE
        last = max(info.start + info.nbytes for info in self.tensors.values())
        write_at(path, 0, self._head)
        os.truncate(path, self._base + _aligned(last))
        if GGUFFile(path).tensors.keys() != self.tensors.keys():
            raise AssertionError(f"{path} is not read back as it was written")

    def _header(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))]
        for key, value in self.metadata.items():
            out += [_string(key), _value(key, value)]
        for name, info in self.tensors.items():
            sizes = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
            out += [_string(name), sizes, struct.pack("<IQ", GGMLQuantizationType[info.type], info.start)]
        data = b"".join(out)
        return data.ljust(_aligned(len(data)), b"\0")


def _aligned(n: int) -> int:
    return -(-n // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if not isinstance(value, list):
        kind, code = next((kind, code) for of, kind, code in _VALUES if isinstance(value, of))
        try:
            return struct.pack(f"<I{code}", kind, value)
        except struct.error:
            raise UserError(f"{key} is {value}, which a GGUF file has no room for") from None
    head = struct.pack("<I", GGUFValueType.ARRAY)
    if all(isinstance(item, str) for item in value):
        return head + struct.pack("<IQ", GGUFValueType.STRING, len(value)) + b"".join(map(_string, value))
    item, dtype = next((kind, dtype) for of, kind, dtype in _ITEMS if isinstance(value[0], of))
    return head + struct.pack("<IQ", item, len(value)) + np.asarray(value, dtype).tobytes()
