"""The ladder of places that a save climbs: which are due, promotion from one to the next, retention."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from checkpoint.manifest import CorruptError
from checkpoint.reader import CheckpointReader
from checkpoint.storage import Storage
from checkpoint.writer import Piece, WriteMetrics, data_file, write_checkpoint
from parallelism.coordinator import Coordinator
from parallelism.errors import UserError
from parallelism.layout import Logical

logger = logging.getLogger(__name__)


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
    """A level in use: its storage, the one thread that writes there, and what must not be deleted."""

    def __init__(self, level: Level, storage: Storage, coordinator: Coordinator, chunk_bytes: int):
        self.level, self.storage = level, storage
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint-{level.name}")
        # One save being written and one waiting for its turn; the next caller blocks.
        self.slots = threading.BoundedSemaphore(2)
        self.bad: set[int] = set()
        self._coordinator, self._chunk_bytes = coordinator, chunk_bytes
        self._pins: Counter[int] = Counter()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.level.name

    def due(self, step: int) -> bool:
        return step % self.level.every == 0

    def steps(self) -> list[int]:
        """Committed steps, ascending, without those found damaged."""
        return [step for step in self.storage.steps() if step not in self.bad]

    def open(self, step: int) -> CheckpointReader:
        reader = CheckpointReader(self.storage.open(step))
        if reader.manifest.step != step:
            raise CorruptError(f"{reader.where} holds step {reader.manifest.step}, expected {step}; use another step")
        return reader

    def write(
        self, step: int, meta: Mapping[str, Any], specs: Iterable[Logical], pieces: Iterable[Piece]
    ) -> WriteMetrics:
        """Write and commit a step (all processes together), then delete what retention does not keep.

        Call it in the thread of ``executor``.
        """
        metrics = write_checkpoint(
            self.storage,
            step,
            meta,
            specs,
            pieces,
            chunk_bytes=self._chunk_bytes,
            coordinator=self._coordinator,
            channel=f"write:{self.storage.where}",
        )
        self.bad.discard(step)
        self._retain()
        return metrics

    def promote(self, step: int, source: OpenLevel) -> WriteMetrics:
        """Write a step from the chunks that another level holds, each verified on the way."""
        reader = source.open(step)
        arrays = reader.manifest.arrays
        specs = [Logical(name, a.shape, a.dtype, a.axes) for name, a in arrays.items()]
        return self.write(step, reader.manifest.meta, specs, self._own_pieces(reader, specs))

    def _own_pieces(self, reader: CheckpointReader, specs: Iterable[Logical]) -> Iterator[Piece]:
        own = data_file(self._coordinator.index)
        for spec in specs:
            for chunk in reader.manifest.arrays[spec.name].chunks:
                if chunk.file == own:
                    yield Piece(spec, chunk.start, reader.read_chunk(spec.name, chunk))

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
        if self.level.keep is None or self._coordinator.index > 0:
            return
        with self._lock:  # the thread of a later level comes here too, when it unpins
            kept = self.steps()[-self.level.keep :]
            try:
                for step in self.storage.steps():
                    if step < min(kept, default=0) and not self._pins[step]:
                        self.storage.delete(step)
            except OSError as e:
                logger.warning("cannot delete old checkpoints in %s: %s", self.storage.where, e)
