"""Pieces of arrays -> chunks of a file -> a manifest."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import numpy as np

from checkpoint.cells import Grid, digests, grid_of, pack
from checkpoint.compression import compressed, decompress
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
class Block:
    """The bytes of one chunk as its file has them: ``raw`` [nbytes] uint8, cell by cell, and the table of its cells.

    table: None until it is computed (where ``grid`` has one cell there is none: b"").
    """

    logical: Logical
    start: tuple[int, ...]
    shape: tuple[int, ...]
    grid: Grid
    raw: np.ndarray
    table: bytes | None = None


def blocks_of(pieces: Iterable[Piece], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Block]:
    """Pieces as chunks of at most ``chunk_bytes``."""
    for piece in pieces:
        raw, position = piece.data.reshape(-1).view(np.uint8), 0
        for start, shape in split(piece.data.shape, piece.data.itemsize, chunk_bytes):
            nbytes = math.prod(shape) * piece.data.itemsize
            part = raw[position : position + nbytes].view(piece.data.dtype).reshape(shape)
            grid = grid_of(shape, piece.logical.shape, piece.data.itemsize)
            at = tuple(a + b for a, b in zip(piece.start, start, strict=True))
            yield Block(piece.logical, at, shape, grid, pack(part, grid))
            position += nbytes


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
    """Appends chunks with their digests to one file after the other, those in ``known`` excepted.

    create: opens a new file by name. name: of a file, by its number. file_bytes: a file gets no more chunks once it has
    that many bytes. known: chunks that are there already, in ``files``; one of the same box and bytes is taken in place
    of a new one. zstd: level at which chunks are compressed.
    """

    def __init__(
        self,
        create: Callable[[str], AbstractContextManager[BinaryIO]],
        name: Callable[[int], str],
        file_bytes: int | None = None,
        known: Mapping[Key, Chunk] | None = None,
        files: Files | None = None,
        zstd: int | None = None,
    ):
        self._zstd = zstd
        self._create, self._name_of, self._limit = create, name, file_bytes
        self._known, self._files = known or {}, files
        self._there = np.empty(0, np.uint8)
        self._open: AbstractContextManager[BinaryIO] | None = None
        self._count = self._offset = 0
        self.chunks: dict[str, list[Chunk]] = defaultdict(list)
        self.nbytes = self.kept_bytes = 0

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._open is not None:
            context, self._open = self._open, None
            context.__exit__(*exc)

    def add(self, block: Block) -> None:
        """Write a chunk, if it is not known. Its memory may be used again afterwards."""
        table = block.table
        if table is None:
            table = digests(block.raw, block.grid) if math.prod(block.grid) > 1 else b""
        digest_, grid = digest(table or block.raw.data), block.grid if table else None
        name = block.logical.name
        old = self._known.get((name, block.start, block.shape))
        same = old is not None and (old.digest, old.grid) == (digest_, grid)
        if old is not None and same and self._is_there(old, block.raw, table):
            self.kept_bytes += block.raw.nbytes
            self.chunks[name].append(old)
            return
        file, offset = self._file(), self._offset
        frame = compressed(block.raw, table, self._zstd) if self._zstd is not None else None
        for data in (block.raw.data, table) if frame is None else (frame,):
            done = file.write(data)
            self.nbytes, self._offset = self.nbytes + done, self._offset + done
        zstd = None if frame is None else (len(frame), digest(frame))
        place = self._name, offset, block.raw.nbytes, digest_
        self.chunks[name].append(Chunk(block.start, block.shape, *place, grid, zstd))

    def _file(self) -> BinaryIO:
        if self._open is not None and self._limit is not None and self._offset >= self._limit:
            self.__exit__(None, None, None)
        if self._open is None:
            self._name = self._name_of(self._count)
            self._open, self._count, self._offset = self._create(self._name), self._count + 1, 0
            self._stream = self._open.__enter__()
        return self._stream

    def _is_there(self, old: Chunk, raw: np.ndarray, table: bytes) -> bool:
        """Whether the file has these bytes indeed: damage is not to spread to this step, but to be mended by it."""
        assert self._files is not None
        if len(self._there) < old.whole_bytes + old.stored_bytes:
            self._there = np.empty(old.whole_bytes + old.stored_bytes, np.uint8)
        there, stored = self._there[: old.whole_bytes], self._there[old.whole_bytes :][: old.stored_bytes]
        try:
            self._files.read_into(old.file, old.offset, (there if old.zstd is None else stored).data)
        except (CorruptError, OSError):
            return False
        if old.zstd is not None and (digest(stored.data) != old.zstd[1] or decompress(stored, there)):
            return False
        return np.array_equal(there[: raw.nbytes], raw) and there[raw.nbytes :].tobytes() == table


def data_file(index: int, mark: str = "", number: int = 0) -> str:
    """The name of a chunk file that process ``index`` writes; ``mark`` tells attempts apart."""
    return f"data-{index:05d}{'-' * bool(mark)}{mark}{f'-{number}' if number else ''}.bin"


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
