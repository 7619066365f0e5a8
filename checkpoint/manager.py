"""Saving and restoring the state of a training job: ``Manager``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import jax

from checkpoint.hosts import HostsStore
from checkpoint.levels import Level, OpenLevel
from checkpoint.manifest import CHUNK_BYTES, CorruptError
from checkpoint.once import OncePerMachine
from checkpoint.reader import CheckpointReader, VerifyReport
from checkpoint.reshard import ArrayPlan, LoadMetrics, Origins, distinct_boxes, load, plan_array
from checkpoint.shares import holders_of, shares_of, stored_specs
from checkpoint.snapshot import Shares, Snapshot, Staging, by_shard, check_arrays
from checkpoint.storage import Store, directory_of, steps_in, store_of
from checkpoint.writer import Block, WriteMetrics
from parallelism.coordinator import Coordinator, PeerError, default_coordinator, together
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical

logger = logging.getLogger(__name__)

STAGING_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class SaveMetrics:
    """What one save cost this process.

    stall_seconds: how long the caller was held up, in ``save`` (of which waiting_seconds for an earlier save to make
    room) and in ``SaveHandle.copied``. copy_seconds: device to host. levels: by name, those that have committed.
    """

    step: int
    stall_seconds: float
    waiting_seconds: float
    copy_seconds: float
    levels: Mapping[str, WriteMetrics]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A save that one level did not take."""

    step: int
    level: str
    error: Exception


@dataclasses.dataclass(frozen=True)
class Restored:
    """arrays: by stored key, in the shardings asked for. source: the name of the level that was read first; sources:
    bytes of chunks that this process read, by place."""

    arrays: dict[str, jax.Array]
    meta: Mapping[str, Any]
    step: int
    source: str
    sources: Mapping[str, int]
    metrics: LoadMetrics
    seconds: float


class SaveHandle:
    """A save under way."""

    def __init__(self, step: int, snapshot: Snapshot):
        self.step = step
        self._snapshot = snapshot
        self._futures: dict[str, Future[WriteMetrics]] = {}
        self._entry_seconds = self._waiting_seconds = 0.0

    def copied(
        self,
        keys: Iterable[str] | None = None,
        busy: Callable[[], bool] = lambda: False,
        late: Callable[[], bool] = lambda: False,
    ) -> float:
        """Block until the arrays of these stored keys (None: all) may be donated; return the seconds that held up.

        busy: whether devices are still at work on what comes before the program that donates them: until they are not,
        nothing is held up. late: asked now and then; whether to give the save up rather than to wait longer.
        """
        return self._snapshot.wait(keys, busy, late)

    def wait(self, seconds: float | None = None) -> SaveMetrics:
        """Block until every due level has committed. Raises the first level's failure, if there is one, and
        TimeoutError where that takes longer than ``seconds``."""
        if wait(self._futures.values(), seconds).not_done:
            raise TimeoutError(f"step {self.step} is still being written after {seconds:g} s")
        for future in self._futures.values():
            future.result()
        return self.metrics

    def give_up(self) -> None:
        """Let go of what was copied and is not written: the save fails, unless a level has it already."""
        self._snapshot.release()

    @property
    def done(self) -> bool:
        return all(future.done() for future in self._futures.values())

    @property
    def metrics(self) -> SaveMetrics:
        """The cost so far."""
        written = {
            name: future.result()
            for name, future in self._futures.items()
            if future.done() and future.exception() is None
        }
        stall = self._entry_seconds + self._snapshot.stalled_seconds
        return SaveMetrics(self.step, stall, self._waiting_seconds, self._snapshot.copy_seconds, written)


class Manager:
    """Saves to a ladder of levels, fastest first, and restores the newest step that verifies.

    A save writes the first due level from the snapshot and each further one from a level before; a level that
    fails is passed over. Each level has one writing thread; at most one save is being written and one waits there,
    the next caller of ``save`` blocks. Failures are logged and kept in ``failures``: they never raise in ``save``.

    Processes of one job make the same calls in the same order. All of them must see the path of a shared level.
    Raises UserError if a level cannot be written or another run is writing it.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        staging_bytes: int = STAGING_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
        coordinator: Coordinator | None = None,
    ):
        if not isinstance(levels, Sequence) or not all(isinstance(level, Level) for level in levels):
            raise UserError(f"checkpoint levels {levels!r}: expected a list such as [Level('disk', path)]")
        for what in ("name", "path"):
            values = [str(getattr(level, what)) for level in levels]
            if len(set(values)) != len(values) or not values:
                raise UserError(f"checkpoint levels have {what}s {values}, expected at least one and all different")
        for what, number in (("staging_bytes", staging_bytes), ("chunk_bytes", chunk_bytes)):
            if type(number) is not int or number < 1:
                raise ValueError(f"{what}={number!r}: expected an int from 1 on")
        self.failures: list[Failure] = []
        self._coordinator = coordinator or default_coordinator()
        self._levels: list[OpenLevel] = []
        self._chunk_bytes, self._staging = chunk_bytes, Staging(staging_bytes)
        self._planned: tuple[Any, tuple[Shares, Sequence[Logical]]] | None = None
        self._handles: list[SaveHandle] = []
        self._closed = False
        self._lock = threading.Lock()
        try:
            for level in levels:
                self._levels.append(OpenLevel(level, _store(level, self._coordinator), self._coordinator))
            owners = together(self._coordinator, "open", self._acquire)
            for each in self._levels:
                each.mark = owners[0]
            together(self._coordinator, "see", lambda: self._see(owners[0]))
            self._machine = OncePerMachine(self._coordinator)
        except BaseException:
            self._release()
            raise

    def _acquire(self) -> str:
        """Process 0 becomes the writer of every level; returns a mark that only this one writes there."""
        mark = uuid.uuid4().hex
        if self._coordinator.index == 0:
            for level in self._levels:
                level.acquire(mark)
        return mark

    def _see(self, mark: str) -> None:
        """Raises UserError for a level that this process does not see as process 0 does."""
        for level in self._levels:
            if level.store.mark() != mark:
                raise UserError(
                    f"{level.where} on host {socket.gethostname()} is not the directory that process 0 writes: level "
                    f'{level.name!r} needs a file system that all processes share, or on="host"'
                )

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- saving

    def due(self, step: int) -> bool:
        """Whether some level takes this step."""
        return any([level.due(step) for level in self._levels])

    @property
    def moved(self) -> float:
        """When, of ``time.monotonic``, a writer was last done with a chunk that comes from devices: long ago, where a
        level hangs with it."""
        return max((handle._snapshot.moved for handle in self._handles), default=0.0)

    def save(
        self,
        step: int,
        arrays: Mapping[str, jax.Array],
        layout: Layout,
        meta: Mapping[str, Any],
        *,
        everywhere: bool = False,
        levels: Collection[str] | None = None,
        check: Callable[[], None] | None = None,
        hurried: Callable[[], bool] = lambda: False,
    ) -> SaveHandle:
        """Start saving and return before copies or writes are done.

        Before ``arrays`` are donated, call ``copied`` of the handle. ``meta`` is JSON and is copied now.
        everywhere: write to all levels, whatever their interval (the last save of a run); levels: to those of these
        names instead. check: called by the threads that write, before they do; what it raises fails the save (the
        arrays are not finite). It may wait for devices, which ``save`` never does. hurried: asked while a level has no
        room for another save; once it says so, this waits no longer, and the save comes after those.
        Raises ValueError if no level is due, the step is no number from 0 on, the arguments do not fit together, or
        after ``close``, UserError if a level already holds a later good step: another run's, or the future of a run
        that went back.
        """
        if self._closed:
            raise ValueError(f"cannot save step {step}: this manager is closed; make another")
        if type(step) is not int or step < 0:
            raise ValueError(f"cannot save step {step!r}: expected an int from 0 on")
        began = time.perf_counter()
        due = [level for level in self._levels if level.due(step) or everywhere]
        if levels is not None:
            if isinstance(levels, str):
                raise ValueError(f"levels={levels!r}: expected names of checkpoint levels in a list, as [{levels!r}]")
            if unknown := set(levels) - {level.name for level in self._levels}:
                raise ValueError(f"no checkpoint levels {sorted(unknown)}: there are {[x.name for x in self._levels]}")
            due = [level for level in self._levels if level.name in levels]
        if not due:
            raise ValueError(f"no checkpoint level is due at step {step}")
        meta = json.loads(json.dumps(meta, allow_nan=False))  # the caller's may change while this is written
        for level in due:
            if level.newest > step:
                raise UserError(
                    f"cannot save step {step}: {level.where} already holds step {level.newest}; "
                    "resume from that, or continue in another directory"
                )
        again = [handle for handle in self._handles if handle.step == step]
        wait(handle._futures[level.name] for handle in again for level in due if level.name in handle._futures)
        for level in due:
            level.wait_for_turn(hurried)
        waited = time.perf_counter() - began
        try:
            shares, specs = self._plan(arrays, layout)
            snapshot = Snapshot(arrays, shares, self._staging)
        except BaseException:
            for level in due:
                level.end_turn()
            raise
        handle = SaveHandle(step, snapshot)
        # Submitted here, in order, so that every process writes every level in the same order.
        open_ = {level.name for level in due}
        for level in due:
            level.pin(step)
            earlier = dict(handle._futures)
            work = level, step, snapshot, specs, meta, earlier, due, open_, check
            handle._futures[level.name] = level.executor.submit(self._write, *work)
        self._handles = [h for h in self._handles if not h.done] + [handle]
        handle._waiting_seconds = waited
        handle._entry_seconds = time.perf_counter() - began
        return handle

    def _plan(self, arrays: Mapping[str, jax.Array], layout: Layout) -> tuple[Shares, Sequence[Logical]]:
        """What this process writes, and all that the checkpoint holds: the same from save to save."""
        check_arrays(arrays, layout)
        shardings = {key: array.sharding for key, array in arrays.items()}
        if self._planned is None or self._planned[0] != (layout, shardings):
            shares = shares_of(layout, holders_of(layout, shardings), self._coordinator.index, self._chunk_bytes)
            self._planned = (layout, shardings), (by_shard(arrays, shares), stored_specs(layout))
        return self._planned[1]

    def _write(
        self,
        level: OpenLevel,
        step: int,
        snapshot: Snapshot,
        specs: Sequence[Logical],
        meta: Mapping[str, Any],
        earlier: Mapping[str, Future[WriteMetrics]],
        due: Sequence[OpenLevel],
        open_: set[str],
        check: Callable[[], None] | None,
    ) -> WriteMetrics:
        try:
            try:
                # A level before this one that has the step; else what those wrote before they failed, and the rest.
                before = [x for x in due if x.name in earlier]
                source = next((x for x in before if earlier[x.name].exception() is None), None)
                if source is None:
                    metrics = level.write(step, meta, specs, _rest(before, step, specs, snapshot), check)
                else:
                    done = [x for x in before if earlier[x.name].done() and earlier[x.name].exception() is None]
                    metrics = level.promote(step, source, [x for x in done if x is not source], check)
                snapshot.release()
            finally:
                with self._lock:
                    open_.remove(level.name)
                    last = not open_
                if last:  # a level may be done before one that it does not come after
                    snapshot.release()
                    for each in due:
                        each.unpin(step)
            # A process that ends serves its host's files no more, and process 0 deletes old ones until here.
            self._coordinator.gather(f"written:{level.where}", None)
            logger.info("saved step %d to %s: %d bytes in %.2f s", step, level.where, metrics.nbytes, metrics.seconds)
            return metrics
        except Exception as e:
            error: Exception = e
            if isinstance(e, OSError):
                error = UserError(
                    f"step {step} was not saved to {level.where}: {e.strerror or e}; "
                    "earlier checkpoints are as they were"
                )
            _let_go(e)
            logger.error("checkpoint failed: step %d, level %s: %s", step, level.name, error)
            self.failures.append(Failure(step, level.name, error))
            raise error from (None if error is e else e)
        finally:
            level.end_turn()

    def wait(self) -> None:
        """Block until every save has committed or failed (see ``failures``)."""
        wait(future for handle in self._handles for future in handle._futures.values())

    # -- restoring

    def steps(self) -> list[int]:
        """Committed steps of all levels, ascending."""
        return sorted({step for steps in self._holding().values() for step in steps})

    def _holding(self) -> dict[OpenLevel, list[int]]:
        """The steps that each level has; a level that does not answer has none, with a warning."""
        found = {}
        for level in self._levels:
            try:
                found[level] = level.steps()
            except OSError as e:
                logger.warning("checkpoints in %s cannot be listed, going on without: %s", level.where, e.strerror or e)
                found[level] = []
        return found

    def latest(self) -> int | None:
        """The newest committed step, or None. It is verified when it is restored."""
        return max(self.steps(), default=None)

    def restore(
        self,
        step: int | None = None,
        *,
        layout: Layout,
        shardings: Mapping[str, jax.sharding.Sharding],
        partial: bool = False,
        cast: bool = False,
        origins: Origins | None = None,
    ) -> Restored:
        """Restore a step (None: the newest that verifies) into any layout and shardings, after pending saves.

        A chunk that is damaged is read from the next level that has it, and mended, with a warning; where a manifest
        is, the step is written again. A step with a chunk that no level has is passed over, if no step was named, for
        the one before. ``partial``, ``cast`` and ``origins`` as in ``reshard.load``.
        Raises UserError if nothing can be restored or checkpoint and layout do not match.
        """
        self.wait()
        began = time.perf_counter()
        holding = self._holding()
        steps = [step] if step is not None else sorted({s for each in holding.values() for s in each})[::-1]
        # A shared file system may show one process what another does not see yet.
        found = [(s, [level.name for level, there in holding.items() if s in there]) for s in steps]
        candidates = [(s, names) for s, names in self._coordinator.gather("candidates", found)[0] if names]
        where = ", ".join(level.where for level in self._levels)
        if not candidates:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step} (there are {self.steps()})"
            raise UserError(f"{what} in {where}; check the path")
        for at, names in candidates:
            damage: Exception | None = None
            refused: Exception | None = None
            readers: dict[OpenLevel, CheckpointReader] = {}
            unreadable: list[str] = []
            arrays = None
            for level in reversed([level for level in self._levels if level.name in names]):
                try:
                    readers[level] = level.open(at, list(readers.values())[::-1])
                except CorruptError as e:
                    damage = e
                    unreadable.append(level.name)
                except OSError as e:
                    logger.warning("%s cannot be read, going on without: %s", level.where, e.strerror or e)
                    damage = e
            ladder = list(readers.items())[::-1]
            far = ladder[0][1] if ladder and not ladder[0][0].store.cached else None

            def plan(process: int, reader: CheckpointReader | None = far) -> list[ArrayPlan]:
                assert reader is not None
                return [
                    plan_array(reader.manifest, stored, distinct_boxes(stored.shape, shardings[key], process), origins)
                    for key, stored in layout.items()
                ]

            try:
                with self._machine.reading(far, plan):
                    if ladder:
                        arrays, metrics = load(
                            ladder[0][1], layout, shardings, partial=partial, cast=cast, origins=origins
                        )
            except (CorruptError, OSError) as e:
                damage = e
            except Exception as e:  # no other step would do either
                refused = e
            report = None if arrays is not None else str(refused or damage)
            outcomes = self._coordinator.gather("restore", [report, unreadable, refused is not None])
            if refused is not None:
                raise refused
            if others := [i for i, (_, _, failed) in enumerate(outcomes) if failed]:
                raise PeerError(f"process {others[0]}: {outcomes[others[0]][0]}")
            reports = [report for report, _, _ in outcomes]
            if arrays is not None and not any(reports):
                level, reader = ladder[0]
                self._mend(level, at, reader)
                self._write_again(at, names, {name for _, found, _ in outcomes for name in found})
                seconds = time.perf_counter() - began
                return Restored(arrays, reader.manifest.meta, at, level.name, reader.read_by_place, metrics, seconds)
            for level in self._levels:
                if level.name in names:
                    level.distrust(at)
            logger.warning(
                "step %d is damaged at every level, trying the one before: %s", at, next(filter(None, reports))
            )
        raise UserError(
            f"none of {len(candidates)} checkpoints in {where} can be restored, all are damaged (see the log); "
            "start anew or restore them from elsewhere"
        )

    @staticmethod
    def _mend(level: OpenLevel, step: int, reader: CheckpointReader) -> None:
        try:
            if count := level.mend(step, reader):
                logger.warning("%d damaged chunks of step %d in %s are mended", count, step, level.where)
        except OSError as e:
            logger.warning("step %d in %s stays damaged: %s", step, level.where, e.strerror or e)

    def _write_again(self, step: int, holding: Sequence[str], unreadable: Collection[str]) -> None:
        """Promote a step to levels where some process cannot read its manifest; holding: all that should have it."""
        good = [level for level in self._levels if level.name in holding and level.name not in unreadable]
        for level in self._levels if good else []:
            if level.name in unreadable:
                level.distrust(step)
                level.pin(step)
                try:
                    level.promote(step, good[0])
                    logger.warning("step %d in %s had a damaged manifest and is written again", step, level.where)
                except Exception as e:
                    logger.warning("step %d in %s stays damaged: %s", step, level.where, e)
                finally:
                    level.unpin(step)

    def meta(self) -> Mapping[str, Any] | None:
        """What ``restore`` is to return as ``meta``, from the newest manifest that can be read: no array is."""
        self.wait()
        holding = self._holding()
        for step, level in [(s, x) for s in self.steps()[::-1] for x, there in holding.items() if s in there]:
            with contextlib.suppress(CorruptError, OSError):
                return level.open(step).manifest.meta
        return None

    def verify(self, step: int | None = None) -> list[VerifyReport]:
        """Read every chunk of a step (None: the newest) at every level that holds it; one report a level."""
        self.wait()
        at = self.latest() if step is None else step
        holding = [level for level in self._levels if at in steps_in(level.store.names())]
        if at is None or not holding:
            raise UserError(f"no checkpoint of step {at} to verify (there are {self.steps()}); name another")
        reports = []
        for level in holding:
            try:
                reports.append(level.open(at).verify())
            except CorruptError as e:
                reports.append(VerifyReport(level.store.open(directory_of(at)).where, at, 0, 0, (str(e),)))
        return reports

    def close(self) -> None:
        """Finish pending saves and let another writer in."""
        self.wait()
        self._closed = True
        for level in self._levels:
            level.executor.shutdown()
        self._release()

    def _release(self) -> None:
        for level in self._levels:
            level.store.close()


def _let_go(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, which is kept: chunks in staging memory, views of arrays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _store(level: Level, coordinator: Coordinator) -> Store:
    if level.on == "shared":
        return store_of(level.path)
    return HostsStore(level.path, peers=level.on == "peer", coordinator=coordinator)


def _rest(failed: Sequence[OpenLevel], step: int, specs: Sequence[Logical], snapshot: Snapshot) -> Iterator[Block]:
    """Every chunk of a snapshot that these levels did not take whole."""
    seen = set()
    for level in failed:
        for block in level.salvage(step, specs):
            if (key := (block.logical.name, block.start)) not in seen:
                seen.add(key)
                yield block
    yield from snapshot.blocks()
