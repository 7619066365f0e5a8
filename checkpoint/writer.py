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


@dataclasses.dataclass
class _Open:
    """A file being written."""

    name: str
    context: AbstractContextManager[BinaryIO]
    file: BinaryIO
    offset: int = 0


class ChunkWriter:
    """Appends chunks with their digests to one file after the other, those in ``known`` excepted.

    create: opens a new file by name. name: of a file, by its number. file_bytes: a file gets no more chunks once it has
    that many bytes. known: chunks that are there already; one of the same box and bytes is taken in place of a new one.
    files: where they are read back and compared before; None: the same digest will do. settled: chunks that are there,
    too, and are to be written again: those that are the same now go to files of their own, of which later steps can
    share all. zstd: level at which chunks are compressed.
    """

    def __init__(
        self,
        create: Callable[[str], AbstractContextManager[BinaryIO]],
        name: Callable[[int], str],
        file_bytes: int | None = None,
        known: Mapping[Key, Chunk] | None = None,
        files: Files | None = None,
        settled: Mapping[Key, Chunk] | None = None,
        zstd: int | None = None,
    ):
        self._settled, self._zstd = settled or {}, zstd
        self._create, self._name_of, self._limit = create, name, file_bytes
        self._known, self._files = known or {}, files
        self._there = np.empty(0, np.uint8)
        self._count = 0
        self._open: dict[bool, _Open] = {}  # of chunks that stay the same, and of the others
        self.chunks: dict[str, list[Chunk]] = defaultdict(list)
        self.nbytes = self.kept_bytes = 0

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._close(list(self._open), exc)

    def _close(self, which: list[bool], exc: tuple[Any, ...] = (None, None, None)) -> None:
        if which:
            try:
                self._open.pop(which[0]).context.__exit__(*exc)
            finally:
                self._close(which[1:], exc)

    def add(self, block: Block) -> None:
        """Write a chunk, if it is not known. Its memory may be used again afterwards."""
        table = block.table
        if table is None:
            table = digests(block.raw, block.grid) if math.prod(block.grid) > 1 else b""
        digest_, grid = digest(table or block.raw.data), block.grid if table else None
        name = block.logical.name
        key = name, block.start, block.shape
        old, settled = self._known.get(key), self._settled.get(key)
        if old is not None and old.holds(digest_, grid) and self._is_there(old, block.raw, table):
            self.kept_bytes += block.raw.nbytes
            self.chunks[name].append(old)
            return
        to = self._file(settled is not None and settled.holds(digest_, grid))
        frame = compressed(block.raw, table, self._zstd) if self._zstd is not None else None
        place = to.name, to.offset, block.raw.nbytes, digest_
        for data in (block.raw.data, table) if frame is None else (frame,):
            done = to.file.write(data)
            self.nbytes, to.offset = self.nbytes + done, to.offset + done
        to.file.flush()  # or what is said to be there may not be, where the disk is full
        zstd = None if frame is None else (len(frame), digest(frame))
        self.chunks[name].append(Chunk(block.start, block.shape, *place, grid, zstd))

    def _file(self, settled: bool) -> _Open:
        found = self._open.get(settled)
        if found is not None and self._limit is not None and found.offset >= self._limit:
            self._close([settled])
            found = None
        if found is None:
            name = self._name_of(self._count)
            context = self._create(name)
            self._open[settled] = found = _Open(name, context, context.__enter__())
            self._count += 1
        return found

    def _is_there(self, old: Chunk, raw: np.ndarray, table: bytes) -> bool:
        """Whether the file has these bytes indeed: damage is not to spread to this step, but to be mended by it."""
        if self._files is None:
            return True
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
