"""jaxsys' own format as a source of conversions and as a sink (docs/checkpoint-format.md)."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.cells import DIGEST_BYTES, Grid, digests, grid_of, pack
from checkpoint.conversion import Part, boxes
from checkpoint.manifest import MANIFEST, Chunk, digest
from checkpoint.reader import CheckpointReader, Progress, find_checkpoint, open_checkpoint
from checkpoint.rules import Chosen
from checkpoint.storage import LocalFiles, durable
from checkpoint.writer import data_file, manifest_of
from parallelism.layout import Logical


class CheckpointSource:
    """A native checkpoint, in chunks with digests."""

    def __init__(self, reader: CheckpointReader):
        self.reader, self.where = reader, reader.where
        self.arrays: Mapping[str, Logical] = {
            name: Logical(name, array.shape, array.dtype, array.axes) for name, array in reader.manifest.arrays.items()
        }

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        return self.reader.read(name, box)


class NativeSource(CheckpointSource):
    """A checkpoint directory, or the newest good one of a run's root, which is verified meanwhile.

    Raises as ``find_checkpoint`` does.
    """

    verified = True

    def __init__(self, path: str | os.PathLike[str], progress: Progress | None = None):
        super().__init__(open_checkpoint(find_checkpoint(path, progress)))
        manifest = self.reader.manifest
        self.step, self.meta = manifest.step, manifest.meta
        self.identity: Any = digest(manifest.encode())  # which has those of all chunks


class NativeSink:
    """A checkpoint directory of one chunk file."""

    format = "native"
    only_file: str | None = None

    def __init__(self, chosen: Mapping[str, Chosen], step: int, meta: Mapping[str, Any]):
        self._arrays = {name: array.logical for name, array in chosen.items()}
        self._step, self._meta = step, meta
        self.parts: Sequence[Part] = list(self._plan())

    def _plan(self) -> Iterator[Part]:
        offset = 0
        for array in self._arrays.values():
            for start, shape in boxes(array.shape, array.dtype.itemsize):
                nbytes = math.prod(shape) * array.dtype.itemsize
                nbytes += DIGEST_BYTES * math.prod(grid) if (grid := self._grid(array, shape)) else 0
                yield Part(array.name, start, shape, data_file(0), offset, nbytes)
                offset += nbytes

    @staticmethod
    def _grid(array: Logical, shape: tuple[int, ...]) -> Grid | None:
        grid = grid_of(shape, array.shape, array.dtype.itemsize)
        return grid if math.prod(grid) > 1 else None

    def encode(self, part: Part, data: np.ndarray) -> np.ndarray:
        grid = self._grid(self._arrays[part.array], part.shape)
        raw = pack(data, grid or (1,) * data.ndim)
        return raw if grid is None else np.concatenate([raw, np.frombuffer(digests(raw, grid), np.uint8)])

    def finish(self, directory: Path, digests_: Sequence[str]) -> None:
        chunks = defaultdict(list)
        for part, digest_ in zip(self.parts, digests_, strict=True):
            grid = self._grid(self._arrays[part.array], part.shape)
            nbytes = part.nbytes
            if grid is not None:  # the chunk's digest is its table's
                table = bytearray(DIGEST_BYTES * math.prod(grid))
                nbytes -= len(table)
                LocalFiles(directory).read_into(part.file, part.offset + nbytes, memoryview(table))
                digest_ = digest(table)
            chunks[part.array].append(Chunk(part.start, part.shape, part.file, part.offset, nbytes, digest_, grid))
        with durable(directory / MANIFEST) as file:
            file.write(manifest_of(self._step, self._meta, self._arrays.values(), chunks).encode())
        CheckpointReader(LocalFiles(directory))
