"""Pieces of arrays -> chunks of a draft -> a committed checkpoint."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np

from checkpoint.cells import digests, grid_of, pack
from checkpoint.manifest import (
    CHUNK_BYTES,
    MANIFEST,
    Array,
    Chunk,
    Manifest,
    check_coverage,
    chunk_from_json,
    digest,
    split,
)
from checkpoint.storage import Draft, Storage
from parallelism.coordinator import Coordinator, together
from parallelism.layout import Logical


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of one logical array on the host: ``start`` in elements, ``data`` C-contiguous with the array's dtype."""

    logical: Logical
    start: tuple[int, ...]
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class WriteMetrics:
    """One process's share of writing one checkpoint to one place; seconds include the sync and the commit."""

    seconds: float
    nbytes: int


class ChunkWriter:
    """Appends pieces to one file as digested chunks of at most ``chunk_bytes``."""

    def __init__(self, file: BinaryIO, name: str, chunk_bytes: int = CHUNK_BYTES):
        self._file, self._name, self._limit = file, name, chunk_bytes
        self.chunks: dict[str, list[Chunk]] = defaultdict(list)
        self.nbytes = 0

    def add(self, piece: Piece) -> None:
        raw = piece.data.reshape(-1).view(np.uint8)
        position = 0
        for start, shape in split(piece.data.shape, piece.data.itemsize, self._limit):
            nbytes = int(np.prod(shape, dtype=np.int64)) * piece.data.itemsize
            part = raw[position : position + nbytes]
            at = tuple(a + b for a, b in zip(piece.start, start, strict=True))
            self.chunks[piece.logical.name].append(self._append(part, at, shape, piece.logical))
            position += nbytes

    def _append(self, raw: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...], array: Logical) -> Chunk:
        """Write the chunk at ``start`` whose row-major bytes are ``raw``."""
        grid, offset, table = grid_of(shape, array.shape, array.dtype.itemsize), self.nbytes, b""
        if math.prod(grid) > 1:
            raw = pack(raw.view(array.dtype).reshape(shape), grid)
            table = digests(raw, grid)
        for data in (raw.data, table):
            self.nbytes += self._file.write(data)
        return Chunk(start, shape, self._name, offset, raw.nbytes, digest(table or raw.data), grid if table else None)


def data_file(index: int) -> str:
    """The name of the chunk file that process ``index`` writes."""
    return f"data-{index:05d}.bin"


def write_chunks(
    draft: Draft, pieces: Iterable[Piece], *, index: int = 0, chunk_bytes: int = CHUNK_BYTES
) -> dict[str, list[Chunk]]:
    """Write this process's chunk file and return its chunks by logical name."""
    name = data_file(index)
    with draft.write(name) as file:
        writer = ChunkWriter(file, name, chunk_bytes)
        for piece in pieces:
            writer.add(piece)
    return dict(writer.chunks)


def write_manifest(
    draft: Draft, step: int, meta: Mapping[str, Any], specs: Iterable[Logical], chunks: Mapping[str, list[Chunk]]
) -> None:
    """Write the manifest of a draft whose chunk files are complete."""
    arrays = {s.name: Array(s.dtype, s.shape, s.axes, tuple(chunks.get(s.name, ()))) for s in specs}
    for name, array in arrays.items():
        check_coverage(name, array, f"step {step}")
    encoded = Manifest(step, meta, arrays).encode()
    with draft.write(MANIFEST) as file:
        file.write(encoded)


def write_checkpoint(
    storage: Storage,
    step: int,
    meta: Mapping[str, Any],
    specs: Iterable[Logical],
    pieces: Iterable[Piece],
    *,
    chunk_bytes: int,
    coordinator: Coordinator,
    channel: str,
) -> WriteMetrics:
    """Write and commit one checkpoint, all processes together; if one of them fails, nothing is committed.

    pieces: those this process owns. specs: every array of the checkpoint, the same in all processes.
    """
    began = time.perf_counter()
    lead = coordinator.index == 0
    draft: Draft | None = None

    def begin() -> None:
        nonlocal draft
        if lead:
            draft = storage.begin(step)

    def write() -> dict[str, list[dict[str, Any]]]:
        nonlocal draft
        draft = draft or storage.join(step)
        own = write_chunks(draft, pieces, index=coordinator.index, chunk_bytes=chunk_bytes)
        return {name: [c.to_json() for c in chunks] for name, chunks in own.items()}

    def commit() -> None:
        if lead:
            assert draft is not None
            merged: dict[str, list[Chunk]] = defaultdict(list)
            for own in written:
                for name, chunks in own.items():
                    merged[name] += [chunk_from_json(c) for c in chunks]
            write_manifest(draft, step, meta, specs, merged)
            draft.commit()

    try:
        together(coordinator, channel, begin)
        written = together(coordinator, channel, write)
        together(coordinator, channel, commit)
    except BaseException:
        if lead and draft is not None:
            draft.abort()
        raise
    own_bytes = sum(c["nbytes"] for chunks in written[coordinator.index].values() for c in chunks)
    return WriteMetrics(time.perf_counter() - began, own_bytes)
