"""The ladder of places that a save climbs: which are due, promotion from one to the next, retention."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

from checkpoint.compression import compressed
from checkpoint.manifest import (
    MANIFEST,
    Array,
    Chunk,
    CorruptError,
    Manifest,
    called,
    chunk_from_json,
    digest,
    resolved,
)
from checkpoint.pace import Pace
from checkpoint.reader import CheckpointReader
from checkpoint.storage import Store, directory_of, steps_in
from checkpoint.writer import Block, ChunkWriter, Key, WriteMetrics, data_file, manifest_of, writer_of
from parallelism.coordinator import Coordinator, together
from parallelism.errors import UserError
from parallelism.layout import Logical

logger = logging.getLogger(__name__)

IN_USE = 0.5
"""A file is shared with later steps only while at least this part of its bytes is in use: so a run with n steps' worth
of chunks in use takes at most twice that."""
TURNS = 2  # saves at a level: one is being written, one waits
LOOK_SECONDS = 0.2  # between looks at whether a save is hurried

Where = Literal["shared", "host", "peer"]


@dataclasses.dataclass(frozen=True)
class Best:
    """The ``keep`` steps of which ``meta["metrics"][metric]`` is smallest, or ``largest``."""

    metric: str
    keep: int = 1
    largest: bool = False


@dataclasses.dataclass(frozen=True)
class Level:
    """A place for checkpoints: steps that ``every`` divides go there; "auto": as many as what a save takes allows.

    on: "shared", a path that all processes see; "host", the memory of each host, or "peer", of another (see
    ``checkpoint.hosts``), where the path is the same on all. Of the steps stay: the newest ``keep`` (None: all), those
    that ``keep_every`` divides, and the ``best``. verify: read what was written, and compare digests, before it counts.
    zstd: level of compression, of chunks that it makes smaller; they are only read whole then, whatever a shard needs.
    """

    name: str
    path: str | os.PathLike[str]
    keep: int | None = 2
    every: int | Literal["auto"] = 1
    on: Where = "shared"
    keep_every: int | None = None
    best: Best | None = None
    verify: bool = False
    zstd: int | None = None

    @property
    def survives_host(self) -> bool:
        """Whether what lies there is left when the host that wrote it is gone."""
        return self.on != "host"

    def __post_init__(self) -> None:
        numbers: dict[str, Any] = {"keep": self.keep, "every": self.every, "keep_every": self.keep_every}
        if self.best is not None:
            if not isinstance(self.best, Best):
                raise UserError(f"checkpoint level {self.name!r}: best={self.best!r}, expected Best(metric) or None")
            numbers["best.keep"] = self.best.keep
        if self.zstd is not None and (type(self.zstd) is not int or not 1 <= self.zstd <= 22):
            raise UserError(f"checkpoint level {self.name!r}: zstd={self.zstd}, expected None or a level from 1 to 22")
        if type(self.verify) is not bool:
            raise UserError(f"checkpoint level {self.name!r}: verify={self.verify!r}, expected True or False")
        if self.on not in get_args(Where):
            found = f"on={self.on!r}, expected one of {', '.join(get_args(Where))}"
            raise UserError(f"checkpoint level {self.name!r}: {found}")
        for what, number in numbers.items():
            auto = what == "every" and number == "auto"
            if number is not None and not auto and (type(number) is not int or number < 1):
                none = " (None: all)" if what == "keep" else ""
                raise UserError(f"checkpoint level {self.name!r}: {what}={number}, expected at least 1{none}")


@dataclasses.dataclass(frozen=True)
class Content:
    """What a save writes: all that the checkpoint holds, and the chunks that are this process's to write."""

    meta: Mapping[str, Any]
    specs: Sequence[Logical]
    blocks: Iterable[Block]


class OpenLevel:
    """A level in use: its store, the one thread that writes there, and what must not be deleted."""

    def __init__(self, level: Level, store: Store, coordinator: Coordinator):
        self.level, self.store = level, store
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint-{level.name}")
        self._turns, self._busy = threading.Condition(), 0
        self.mark = ""  # of this run's start, the same in all processes
        self._pace: Pace | None = None
        self._write_seconds = 0.0
        self._asked: tuple[int, bool] | None = None
        self.bad: set[int] = set()
        self._coordinator = coordinator
        self._pins: Counter[int] = Counter()
        self._pinning = threading.Lock()  # of these alone: a save is not to wait for deletions
        self._lock = threading.RLock()  # the thread of a later level comes here too, when it unpins
        self._newest: int | None = None
        self._known_steps: dict[int, _Step] = {}
        self._told_of_metric = False
        self._attempts: dict[int, Mapping[str, Sequence[Chunk]]] = {}  # chunks of writes under way and of failed ones

    @property
    def name(self) -> str:
        return self.level.name

    @property
    def where(self) -> str:
        return self.store.where

    def due(self, step: int) -> bool:
        """Whether the level takes this step: asked for each, in order, and in all processes."""
        if isinstance(self.level.every, int):
            return step % self.level.every == 0
        if self._pace is None:
            self._pace = Pace(self._coordinator, f"due:{self.where}:{self.mark}")
        if self._asked is None or self._asked[0] != step:
            self._asked = step, self._pace.due(step, None if self._busy else self._write_seconds)
        return self._asked[1]

    def wait_for_turn(self, hurried: Callable[[], bool]) -> None:
        """Block until there is room for a save, one is being written and one waits at most, or it is ``hurried``."""
        with self._turns:
            while self._busy >= TURNS and not hurried():
                self._turns.wait(LOOK_SECONDS)
            self._busy += 1

    def end_turn(self) -> None:
        with self._turns:
            self._busy -= 1
            self._turns.notify_all()

    def acquire(self, mark: str) -> None:
        """Become the writer, and remove what a killed one left. Raises UserError naming the present holder."""
        self.store.acquire(mark)
        self._newest = None
        self._sweep()

    @property
    def newest(self) -> int:
        """The newest of ``steps``, -1 if there is none: without asking the store each time."""
        if self._newest is None:
            self._newest = max(self.steps(), default=-1)
        return self._newest

    def distrust(self, step: int) -> None:
        """A restore found it damaged."""
        self.bad.add(step)
        self._newest = None

    def steps(self) -> list[int]:
        """Committed steps, ascending, without those found damaged."""
        return [step for step in steps_in(self.store.names()) if step not in self.bad]

    def open(self, step: int, others: Sequence[CheckpointReader] = ()) -> CheckpointReader:
        """A committed step; others: of the same step at other levels, for chunks that are damaged here."""
        return CheckpointReader(self.store.open(directory_of(step)), others, step)

    # -- writing, in the thread of ``executor``

    def write(
        self,
        step: int,
        meta: Mapping[str, Any],
        specs: Sequence[Logical],
        blocks: Iterable[Block],
        check: Callable[[], None] | None = None,
    ) -> WriteMetrics:
        """Write and commit a step, all processes together, then delete what retention does not keep.

        blocks: those this process writes. specs: every array of the checkpoint, the same in all processes. check:
        called first; what it raises fails the save. Chunks that the newest good step has already are not written again.
        If one process fails, nothing is committed, and what was written stays for ``salvage`` until ``unpin``.
        """
        return self._write(step, lambda: Content(meta, specs, blocks), check)

    def promote(
        self, step: int, source: OpenLevel, others: Sequence[OpenLevel] = (), check: Callable[[], None] | None = None
    ) -> WriteMetrics:
        """``write`` from the chunks that another level holds, each verified; others: for what is damaged there."""

        def content() -> Content:
            readers = []
            for other in others:
                with contextlib.suppress(CorruptError, OSError):
                    readers.append(other.open(step))
            reader = source.open(step, readers)
            arrays = reader.manifest.arrays
            specs = [Logical(name, a.shape, a.dtype, a.axes) for name, a in arrays.items()]
            return Content(reader.manifest.meta, specs, self._own_blocks(reader, specs))

        return self._write(step, content, check)

    def _write(self, step: int, content_of: Callable[[], Content], check: Callable[[], None] | None) -> WriteMetrics:
        began = time.perf_counter()
        index, channel, directory = self._coordinator.index, f"write:{self.where}", directory_of(step)
        base: int | None = None
        contents: list[Content] = []
        with self._lock:
            self._attempts[step] = {}

        def begin() -> tuple[int | None, str, int]:
            # Whatever can fail is done where all hear of it: a process that skipped a save would be taken to be in this
            # one when it comes to the next.
            nonlocal base
            if check is not None:
                check()
            contents.append(content_of())
            if index == 0:
                with self._lock:
                    base = max(self.steps(), default=None)
                    if base is not None:
                        self.pin(base)
            return base, uuid.uuid4().hex[:8], step

        def write() -> dict[str, list[dict[str, Any]]]:
            known, settled = self._known(shared, step)
            writer = ChunkWriter(
                lambda name: self.store.create(directory, name),
                lambda number: data_file(index, mark, number),
                self.store.file_bytes,
                known,
                self.store.open(directory) if self.store.near else None,
                settled,
                self.level.zstd,
            )
            self._attempts[step] = writer.chunks
            with writer:
                for block in contents[0].blocks:
                    writer.add(block)
            if self.level.verify:
                self._read_back(step, contents[0].specs, writer)
            metrics.append(WriteMetrics(0.0, writer.nbytes, writer.kept_bytes))
            return {name: [c.to_json() for c in chunks] for name, chunks in writer.chunks.items()}

        def commit() -> None:
            if index == 0:
                merged: dict[str, list[Chunk]] = defaultdict(list)
                for own in written:
                    for name, chunks in own.items():
                        merged[name] += [chunk_from_json(c) for c in chunks]
                manifest = manifest_of(step, contents[0].meta, contents[0].specs, merged)
                self.store.put(directory, MANIFEST, manifest.encode())

        metrics: list[WriteMetrics] = []
        try:
            begun = together(self._coordinator, channel, begin)
            if steps := {theirs for _, _, theirs in begun if theirs != step}:
                raise RuntimeError(f"processes save steps {sorted({step, *steps})} at once to {self.where}")
            shared, mark, _ = begun[0]
            written = together(self._coordinator, channel, write)
            together(self._coordinator, channel, commit)
            self.bad.discard(step)
            self._newest = None if self._newest is None else max(step, self._newest)
            with self._lock:  # both at once, and not while a sweep that has not seen the manifest is under way
                self._attempts.pop(step, None)
                self._known_steps.pop(step, None)
        finally:
            contents.clear()  # an error that is kept keeps the functions above
            with self._lock:
                self._known_steps.pop(step, None)
            if base is not None:
                self._uncount(base)
            self._retain()
        self._write_seconds = time.perf_counter() - began
        return dataclasses.replace(metrics[0], seconds=self._write_seconds)

    def _read_back(self, step: int, specs: Iterable[Logical], writer: ChunkWriter) -> None:
        """Raises CorruptError if a chunk just written does not read as it should."""
        arrays = {s.name: Array(s.dtype, s.shape, s.axes, tuple(writer.chunks.get(s.name, ()))) for s in specs}
        report = CheckpointReader(self.store.open(directory_of(step)), manifest=Manifest(step, {}, arrays)).verify()
        if not report.ok:
            raise CorruptError(f"step {step} does not read as it was written: {report.errors[0]}")

    def salvage(self, step: int, specs: Iterable[Logical]) -> Iterator[Block]:
        """The chunks that this process wrote before the write of ``step`` here failed."""
        attempt = self._attempts.get(step, {})  # none, if it was written again meanwhile
        arrays = {s.name: Array(s.dtype, s.shape, s.axes, tuple(attempt.get(s.name, ()))) for s in specs}
        reader = CheckpointReader(self.store.open(directory_of(step)), manifest=Manifest(step, {}, arrays))
        memory = reader.room(chunk for array in arrays.values() for chunk in array.chunks)
        for spec in specs:
            for chunk in arrays[spec.name].chunks:
                yield reader.block(spec, chunk, memory)

    def _known(self, base: int | None, step: int) -> tuple[dict[Key, Chunk], dict[Key, Chunk]]:
        """The chunks of a committed step as ``step`` would name them: in files that are used enough, and in others."""
        known: dict[Key, Chunk] = {}
        settled: dict[Key, Chunk] = {}
        if base is None:
            return known, settled
        directory, used, sizes = directory_of(step), Counter[str](), dict[str, int]()
        try:
            manifest, files = self.open(base).manifest, self.store.open(directory_of(base))
        except CorruptError:
            return known, settled
        chunks = [(name, chunk) for name, array in manifest.arrays.items() for chunk in array.chunks]
        for _, chunk in chunks:
            used[chunk.file] += chunk.stored_bytes
        for file in used:
            with contextlib.suppress(CorruptError):
                sizes[file] = files.size(file)
        for name, chunk in chunks:
            named = dataclasses.replace(chunk, file=called(directory, *resolved(directory_of(base), chunk.file)))
            size = sizes.get(chunk.file, 0)
            good = chunk.offset + chunk.stored_bytes <= size and used[chunk.file] >= IN_USE * size
            (known if good else settled)[name, chunk.start, chunk.shape] = named
        return known, settled

    def _own_blocks(self, reader: CheckpointReader, specs: Iterable[Logical]) -> Iterator[Block]:
        index, count = self._coordinator.index, self._coordinator.count
        own = [(s, c) for s in specs for c in reader.array(s.name).chunks if writer_of(c.file) % count == index]
        memory = reader.room(chunk for _, chunk in own)
        for spec, chunk in own:
            yield reader.block(spec, chunk, memory)

    def mend(self, step: int, reader: CheckpointReader) -> int:
        """Write what a reader of a step found damaged as it should be; return how many chunks."""
        count = 0
        for chunk, raw in reader.mended:
            data: bytes | None = raw.tobytes()
            if chunk.zstd is not None:
                data = compressed(raw[: chunk.nbytes], raw[chunk.nbytes :].tobytes(), self.level.zstd or 0)
            # Another zstd may make another frame: then the next save writes the chunk again.
            if data is not None and (chunk.zstd is None or digest(data) == chunk.zstd[1]):
                self.store.patch(directory_of(step), chunk.file, chunk.offset, data)
                count += 1
        return count

    # -- what stays

    def pin(self, step: int) -> None:
        """Keep a step although retention would delete it, until ``unpin``."""
        with self._pinning:
            self._pins[step] += 1

    def unpin(self, step: int) -> None:
        if not self._uncount(step):  # else it is being written again
            with self._lock:
                self._attempts.pop(step, None)
        self._retain()

    def _uncount(self, step: int) -> int:
        with self._pinning:
            self._pins[step] -= 1
            return self._pins[step]

    def _retain(self) -> None:
        """Delete what the level's rules do not keep. Damaged steps do not count as kept."""
        if self._coordinator.index > 0:
            return
        try:
            with self._lock:
                steps = self.steps()
                newest = steps[-self.level.keep :] if self.level.keep else []
                lasting = self._lasting(steps)
                for step in steps_in(self.store.names()):
                    if step < min(newest, default=0) and step not in lasting and not self._pins[step]:
                        self.store.delete(directory_of(step), [MANIFEST])
                        self._known_steps.pop(step, None)
                self._sweep()
        except Exception as e:  # whatever it is, the save that was made stands
            logger.warning("cannot delete old checkpoints in %s: %s", self.where, e)

    def _lasting(self, steps: Sequence[int]) -> set[int]:
        """Those of these steps that stay however old they are."""
        every, best = self.level.keep_every, self.level.best
        found = {step for step in steps if every and step % every == 0}
        if best is not None:
            sign = -1 if best.largest else 1
            metrics = {step: self._step(step).metrics for step in steps}
            if steps and best.metric not in (has := metrics[steps[-1]]) and not self._told_of_metric:
                self._told_of_metric = True
                names = ", ".join(sorted(has)) or "none"
                logger.warning(
                    "step %d in %s has no metric %r, by which this level keeps the best (meta['metrics'] has: %s)",
                    *(steps[-1], self.where, best.metric, names),
                )
            values = {step: _number(known.get(best.metric)) for step, known in metrics.items()}
            ranked = sorted((sign * v, step) for step, v in values.items() if v is not None)
            found |= {step for _, step in ranked[: best.keep]}
        return found

    def _sweep(self) -> None:
        """Delete files that no manifest names, but for those of a step that is being written."""
        names, drafts = self.store.names(), {directory_of(step) for step in self._attempts}
        used: set[str] = set()
        for step in steps_in(names):
            directory, of_step = directory_of(step), self._step(step).files
            # Of a manifest that cannot be read nobody knows what it uses: all stays until that step is deleted, or
            # written again.
            if of_step is None:
                return
            used |= of_step
        for directory, files in names.items():
            if directory not in drafts:
                unused = [name for name in files if f"{directory}/{name}" not in used]
                if unused or not files:
                    self.store.delete(directory, unused)

    def _step(self, step: int) -> _Step:
        with self._lock:
            if step not in self._known_steps:
                directory, found = directory_of(step), _Step(None, {})
                # Nothing else: who cannot read it now does not know what it uses, and must not delete.
                with contextlib.suppress(CorruptError):
                    manifest = self.open(step).manifest
                    chunks = {"/".join(resolved(directory, c.file)) for a in manifest.arrays.values() for c in a.chunks}
                    metrics = manifest.meta.get("metrics") if isinstance(manifest.meta, dict) else None
                    found = _Step(
                        frozenset({f"{directory}/{MANIFEST}"} | chunks), metrics if isinstance(metrics, dict) else {}
                    )
                    self._known_steps[step] = found
                return found
            return self._known_steps[step]


@dataclasses.dataclass(frozen=True)
class _Step:
    """What its manifest says: the files of a committed step, as ``<directory>/<name>`` (None if it is damaged)."""

    files: frozenset[str] | None
    metrics: Mapping[str, Any]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
