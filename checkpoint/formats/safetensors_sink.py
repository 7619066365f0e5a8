"""safetensors files as a source and a sink of conversions: whole states by logical names, or the weights of a model."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.conversion import Part
from checkpoint.formats.safetensors import CODES, INDEX, SINGLE, SafetensorsDir, shard_name
from checkpoint.formats.tensors import FilesSource, Tensor, identity_of
from checkpoint.storage import durable, write_at
from parallelism.errors import UserError
from parallelism.layout import Logical

METADATA = "jaxsys"
"""What safetensors files of a state have in their metadata: JSON with step, meta and the axes of each array."""


def state_metadata(step: int, meta: Mapping[str, Any], arrays: Mapping[str, Logical]) -> dict[str, str]:
    """What ``SafetensorsSource`` finds again beside the arrays."""
    axes = {name: array.axes for name, array in arrays.items()}
    return {METADATA: json.dumps({"step": step, "meta": meta, "axes": axes})}


class SafetensorsSource(FilesSource):
    """safetensors files by the names in them, of any program; step and meta are there where jaxsys wrote them.

    Raises UserError as ``SafetensorsDir`` does, and for metadata that jaxsys did not write so.
    """

    def __init__(self, path: str | os.PathLike[str]):
        files = SafetensorsDir(path)
        try:
            state = json.loads((files.metadata or {}).get(METADATA, '{"step": 0, "meta": {}, "axes": {}}'))
            step, meta, axes = int(state["step"]), dict(state["meta"]), dict(state["axes"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: damaged metadata {METADATA!r} ({error!r}); fetch the files again") from error
        super().__init__(files, str(path), identity_of(files.files), step, meta, axes)


class SafetensorsSink:
    """A directory of a safetensors file, or of several of at most ``max_bytes`` of arrays (or one array) and an index.

    metadata: for the header of each file. Raises UserError for a dtype that the format lacks.
    """

    only_file: str | None = None

    def __init__(
        self,
        format: str,
        tensors: Sequence[Tensor],
        *,
        metadata: Mapping[str, str] | None = None,
        max_bytes: int = 5 * 10**9,
    ):
        self.format = format
        for tensor in tensors:
            if tensor.array.dtype not in CODES:
                raise UserError(
                    f"array {tensor.array.name!r} has dtype {tensor.array.dtype}, safetensors has no such type; "
                    "exclude it or write another format"
                )
            if tensor.name == "__metadata__":
                raise UserError("an array named '__metadata__' cannot be in a safetensors file; rename it")
        shards: list[list[Tensor]] = [[]]
        room = max_bytes
        for tensor in tensors:
            nbytes = _nbytes(tensor)
            if shards[-1] and nbytes > room:
                shards.append([])
                room = max_bytes
            shards[-1].append(tensor)
            room -= nbytes
        count = len(shards)
        self._files = {SINGLE if count == 1 else shard_name(i, count): shard for i, shard in enumerate(shards)}
        self._heads = {file: _head(shard, metadata or {}) for file, shard in self._files.items()}
        self.parts: Sequence[Part] = list(self._plan())

    def _plan(self) -> Iterator[Part]:
        for file, tensors in self._files.items():
            offset = len(self._heads[file])
            for tensor in tensors:
                for start, shape in tensor.boxes():
                    nbytes = math.prod(shape) * tensor.array.dtype.itemsize
                    yield Part(tensor.array.name, start, shape, file, offset, nbytes)
                    offset += nbytes

    def encode(self, part: Part, data: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def finish(self, directory: Path, digests: Sequence[str]) -> None:
        for file, head in self._heads.items():
            write_at(directory / file, 0, head)
        if len(self._files) > 1:
            total = sum(_nbytes(tensor) for shard in self._files.values() for tensor in shard)
            weight_map = {tensor.name: file for file, shard in self._files.items() for tensor in shard}
            with durable(directory / INDEX) as out:
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                out.write(f"{json.dumps(index, indent=2)}\n".encode())
        SafetensorsDir(directory)


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.array.dtype.itemsize


def _head(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    """What a file has before its arrays, a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset := offset + _nbytes(tensor)]
        header[tensor.name] = {"dtype": CODES[tensor.array.dtype], "shape": tensor.shape, "data_offsets": offsets}
    data = json.dumps(header).encode()
    data = data.ljust(-(-len(data) // 8) * 8)
    return struct.pack("<Q", len(data)) + data
