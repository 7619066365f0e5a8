"""Pieces of arrays -> chunks of a file -> a manifest."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from checkpoint.cells import digests, grid_of, pack
from checkpoint.manifest import CHUNK_BYTES, Array, Chunk, CorruptError, Manifest, check_coverage, digest, split
from checkpoint.storage import Files
from parallelism.layout import Logical


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of one logical array on the host: ``start`` in elements, ``data`` C-contiguous with the array's dtype."""

    logical: Logical
    start: tuple[int, ...]
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class WriteMetrics:
    """One process's share of writing one checkpoint to one place.

    nbytes: written. kept_bytes: of chunks that were there already, from an earlier step. seconds include the sync and
    the commit.
    """

    seconds: float
    nbytes: int
    kept_bytes: int = 0


_WRITER = re.compile(r"data-(\d{5,})[^/]*$")

Key = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Array, start and shape of a chunk."""


class ChunkWriter:
    """Appends pieces to one file as digested chunks of at most ``chunk_bytes``, those in ``known`` excepted.

    known: chunks that are there already, in ``files``; one of the same box and bytes is taken in place of a new one.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        chunk_bytes: int = CHUNK_BYTES,
        known: Mapping[Key, Chunk] | None = None,
        files: Files | None = None,
    ):
        self._file, self._name, self._limit, self._known, self._files = file, name, chunk_bytes, known or {}, files
        self._there = np.empty(0, np.uint8)
        self.chunks: dict[str, list[Chunk]] = defaultdict(list)
        self.nbytes = self.kept_bytes = 0

    def add(self, piece: Piece) -> None:
        raw = piece.data.reshape(-1).view(np.uint8)
        position = 0
        for start, shape in split(piece.data.shape, piece.data.itemsize, self._limit):
            nbytes = int(np.prod(shape, dtype=np.int64)) * piece.data.itemsize
            part = raw[position : position + nbytes]
            at = tuple(a + b for a, b in zip(piece.start, start, strict=True))
            self.chunks[piece.logical.name].append(self._chunk(part, at, shape, piece.logical))
            position += nbytes

    def _chunk(self, raw: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...], array: Logical) -> Chunk:
        """The chunk at ``start`` whose row-major bytes are ``raw``, written if it is not known."""
        grid, table = grid_of(shape, array.shape, array.dtype.itemsize), b""
        if math.prod(grid) > 1:
            raw = pack(raw.view(array.dtype).reshape(shape), grid)
            table = digests(raw, grid)
        digest_ = digest(table or raw.data)
        old = self._known.get((array.name, start, shape))
        same = old is not None and (old.digest, old.grid) == (digest_, grid if table else None)
        if old is not None and same and self._is_there(old, raw, table):
            self.kept_bytes += raw.nbytes
            return old
        offset = self.nbytes
        for data in (raw.data, table):
            self.nbytes += self._file.write(data)
        return Chunk(start, shape, self._name, offset, raw.nbytes, digest_, grid if table else None)

    def _is_there(self, old: Chunk, raw: np.ndarray, table: bytes) -> bool:
        """Whether the file has these bytes indeed: damage is not to spread to this step, but to be mended by it."""
        assert self._files is not None
        if len(self._there) < old.stored_bytes:
            self._there = np.empty(old.stored_bytes, np.uint8)
        there = self._there[: old.stored_bytes]
        try:
            self._files.read_into(old.file, old.offset, there.data)
        except (CorruptError, OSError):
            return False
        return np.array_equal(there[: raw.nbytes], raw) and there[raw.nbytes :].tobytes() == table


def data_file(index: int, mark: str = "") -> str:
    """The name of the chunk file that process ``index`` writes; ``mark`` tells attempts apart."""
    return f"data-{index:05d}{'-' * bool(mark)}{mark}.bin"


def writer_of(file: str) -> int:
    """The process that wrote a chunk file; 0 where its name does not say."""
    match = _WRITER.search(file)
    return int(match[1]) if match else 0


def manifest_of(
    step: int, meta: Mapping[str, Any], specs: Iterable[Logical], chunks: Mapping[str, Sequence[Chunk]]
) -> Manifest:
    """The manifest of arrays whose chunks are written. Raises CorruptError if they do not hold the arrays."""
    arrays = {s.name: Array(s.dtype, s.shape, s.axes, tuple(chunks.get(s.name, ()))) for s in specs}
    for name, array in arrays.items():
        check_coverage(name, array, f"step {step}")
    return Manifest(step, meta, arrays)
