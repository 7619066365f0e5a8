"""The ladder of places that a save climbs: which are due, promotion from one to the next, retention."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import posixpath
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from checkpoint.cells import digests, pack
from checkpoint.manifest import MANIFEST, Chunk, CorruptError, chunk_from_json
from checkpoint.reader import CheckpointReader
from checkpoint.storage import Store, directory_of, steps_in
from checkpoint.writer import ChunkWriter, Key, Piece, WriteMetrics, data_file, manifest_of, writer_of
from parallelism.coordinator import Coordinator, together
from parallelism.errors import UserError
from parallelism.layout import Logical

logger = logging.getLogger(__name__)

IN_USE = 0.5
"""A file is shared with later steps only while at least this part of its bytes is in use: so a run with n steps' worth
of chunks in use takes at most twice that."""


@dataclasses.dataclass(frozen=True)
class Level:
    """A place for checkpoints: the newest ``keep`` stay (None: all), steps that ``every`` divides go there."""

    name: str
    path: str | os.PathLike[str]
    keep: int | None = 2
    every: int = 1

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise UserError(f"checkpoint level {self.name!r}: keep={self.keep}, expected at least 1, or None for all")
        if self.every < 1:
            raise UserError(f"checkpoint level {self.name!r}: every={self.every}, expected at least 1")


class OpenLevel:
    """A level in use: its store, the one thread that writes there, and what must not be deleted."""

    def __init__(self, level: Level, store: Store, coordinator: Coordinator, chunk_bytes: int):
        self.level, self.store = level, store
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint-{level.name}")
        # One save being written and one waiting for its turn; the next caller blocks.
        self.slots = threading.BoundedSemaphore(2)
        self.bad: set[int] = set()
        self._coordinator, self._chunk_bytes = coordinator, chunk_bytes
        self._pins: Counter[int] = Counter()
        self._lock = threading.RLock()  # the thread of a later level comes here too, when it unpins
        self._files: dict[int, frozenset[str] | None] = {}  # by step, as far as they are known
        self._drafting: int | None = None

    @property
    def name(self) -> str:
        return self.level.name

    @property
    def where(self) -> str:
        return self.store.where

    def due(self, step: int) -> bool:
        return step % self.level.every == 0

    def acquire(self, mark: str) -> None:
        """Become the writer, and remove what a killed one left. Raises UserError naming the present holder."""
        self.store.acquire(mark)
        self._sweep()

    def steps(self) -> list[int]:
        """Committed steps, ascending, without those found damaged."""
        return [step for step in steps_in(self.store.names()) if step not in self.bad]

    def open(self, step: int, others: Sequence[CheckpointReader] = ()) -> CheckpointReader:
        """A committed step; others: of the same step at other levels, for chunks that are damaged here."""
        reader = CheckpointReader(self.store.open(directory_of(step)), others)
        if reader.manifest.step != step:
            raise CorruptError(f"{reader.where} holds step {reader.manifest.step}, expected {step}; use another step")
        return reader

    # -- writing, in the thread of ``executor``

    def write(
        self, step: int, meta: Mapping[str, Any], specs: Iterable[Logical], pieces: Iterable[Piece]
    ) -> WriteMetrics:
        """Write and commit a step, all processes together, then delete what retention does not keep.

        pieces: those this process owns. specs: every array of the checkpoint, the same in all processes. Chunks that
        the newest good step has already are not written again. If one process fails, nothing is committed.
        """
        began = time.perf_counter()
        index, channel, directory = self._coordinator.index, f"write:{self.where}", directory_of(step)
        base: int | None = None
        metrics = WriteMetrics(0.0, 0)

        def begin() -> tuple[int | None, str]:
            nonlocal base
            if index == 0:
                with self._lock:
                    base, self._drafting = max(self.steps(), default=None), step
                    if base is not None:
                        self._pins[base] += 1
            return base, uuid.uuid4().hex[:8]

        def write() -> dict[str, list[dict[str, Any]]]:
            nonlocal metrics
            name = data_file(index, mark)
            with self.store.create(directory, name) as file:
                known, files = self._known(shared, step), self.store.open(directory)
                writer = ChunkWriter(file, name, self._chunk_bytes, known, files)
                for piece in pieces:
                    writer.add(piece)
            if not writer.nbytes:
                self.store.delete(directory, [name])
            metrics = WriteMetrics(0.0, writer.nbytes, writer.kept_bytes)
            return {name: [c.to_json() for c in chunks] for name, chunks in writer.chunks.items()}

        def commit() -> None:
            if index == 0:
                merged: dict[str, list[Chunk]] = defaultdict(list)
                for own in written:
                    for name, chunks in own.items():
                        merged[name] += [chunk_from_json(c) for c in chunks]
                self.store.put(directory, MANIFEST, manifest_of(step, meta, specs, merged).encode())

        try:
            shared, mark = together(self._coordinator, channel, begin)[0]
            written = together(self._coordinator, channel, write)
            together(self._coordinator, channel, commit)
            self.bad.discard(step)
        finally:
            with self._lock:
                self._drafting = None
                self._files.pop(step, None)
                if base is not None:
                    self._pins[base] -= 1
            self._retain()
        return dataclasses.replace(metrics, seconds=time.perf_counter() - began)

    def _known(self, base: int | None, step: int) -> dict[Key, Chunk]:
        """The chunks of a committed step as one of ``step`` names them, of files that are used enough."""
        if base is None:
            return {}
        directory, found, used, enough = directory_of(step), {}, Counter[str](), set[str]()
        try:
            manifest, files = self.open(base).manifest, self.store.open(directory_of(base))
        except CorruptError:
            return {}
        chunks = [(name, chunk) for name, array in manifest.arrays.items() for chunk in array.chunks]
        for _, chunk in chunks:
            used[chunk.file] += chunk.stored_bytes
        for file, nbytes in used.items():
            with contextlib.suppress(CorruptError):
                if nbytes >= IN_USE * files.size(file):
                    enough.add(file)
        for name, chunk in chunks:
            if chunk.file in enough:
                there, file = posixpath.split(_resolved(directory_of(base), chunk.file))
                named = file if there == directory else f"../{there}/{file}"
                found[name, chunk.start, chunk.shape] = dataclasses.replace(chunk, file=named)
        return found

    def promote(self, step: int, source: OpenLevel) -> WriteMetrics:
        """Write a step from the chunks that another level holds, each verified on the way."""
        reader = source.open(step)
        arrays = reader.manifest.arrays
        specs = [Logical(name, a.shape, a.dtype, a.axes) for name, a in arrays.items()]
        return self.write(step, reader.manifest.meta, specs, self._own_pieces(reader, specs))

    def _own_pieces(self, reader: CheckpointReader, specs: Iterable[Logical]) -> Iterator[Piece]:
        for spec in specs:
            for chunk in reader.manifest.arrays[spec.name].chunks:
                if writer_of(chunk.file) % self._coordinator.count == self._coordinator.index:
                    yield Piece(spec, chunk.start, reader.read_chunk(spec.name, chunk))

    def mend(self, step: int, reader: CheckpointReader) -> int:
        """Write what a reader of a step found damaged as it should be; return how many chunks."""
        for chunk, data in reader.mended:
            raw, table = data.reshape(-1).view(np.uint8), b""
            if chunk.grid is not None:
                raw = pack(data, chunk.grid)
                table = digests(raw, chunk.grid)
            self.store.patch(directory_of(step), chunk.file, chunk.offset, raw.tobytes() + table)
        return len(reader.mended)

    # -- what stays

    def pin(self, step: int) -> None:
        """Keep a step although retention would delete it, until ``unpin``."""
        with self._lock:
            self._pins[step] += 1

    def unpin(self, step: int) -> None:
        with self._lock:
            self._pins[step] -= 1
        self._retain()

    def _retain(self) -> None:
        """Delete what is older than the newest ``keep`` good steps. Damaged ones do not count as kept."""
        if self._coordinator.index > 0:
            return
        try:
            with self._lock:
                kept = self.steps()[-self.level.keep :] if self.level.keep else []
                for step in steps_in(self.store.names()):
                    if step < min(kept, default=0) and not self._pins[step]:
                        self.store.delete(directory_of(step), [MANIFEST])
                        self._files.pop(step, None)
                self._sweep()
        except OSError as e:
            logger.warning("cannot delete old checkpoints in %s: %s", self.where, e)

    def _sweep(self) -> None:
        """Delete files that no manifest names, but for those of a step that is being written."""
        names = self.store.names()
        used: set[str] = set()
        for step in steps_in(names):
            directory, of_step = directory_of(step), self._files_of(step)
            # Of a damaged manifest nobody knows: all beside it stays until the step is deleted or written again.
            used |= {f"{directory}/{name}" for name in names[directory]} if of_step is None else of_step
        for directory, files in names.items():
            if self._drafting is None or directory != directory_of(self._drafting):
                unused = [name for name in files if f"{directory}/{name}" not in used]
                if unused or not files:
                    self.store.delete(directory, unused)

    def _files_of(self, step: int) -> frozenset[str] | None:
        """The files of a committed step, as ``<directory>/<name>``; None if its manifest is damaged."""
        with self._lock:
            if step not in self._files:
                directory, found = directory_of(step), None
                # Nothing else: who cannot read it now does not know what it uses, and must not delete.
                with contextlib.suppress(CorruptError):
                    arrays = self.open(step).manifest.arrays.values()
                    chunks = {_resolved(directory, chunk.file) for array in arrays for chunk in array.chunks}
                    found = frozenset({f"{directory}/{MANIFEST}"} | chunks)
                self._files[step] = found
            return self._files[step]


def _resolved(directory: str, file: str) -> str:
    return posixpath.normpath(f"{directory}/{file}")
