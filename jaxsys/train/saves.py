"""What saving and restoring costs a run: rows for its metrics, totals for Prometheus, and how long a save takes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from checkpoint import Level, Manager, Restored, SaveHandle, SaveMetrics
from checkpoint.writer import WriteMetrics

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclasses.dataclass
class AtLevel:
    """What was committed at one level. Seconds and bytes are this process's share of it.

    saves: how many. seconds, nbytes, kept_bytes: sums over them. last: the newest's; last_step, last_time: its step,
    and when it was first seen to be there (``time.monotonic``).
    """

    saves: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    kept_bytes: int = 0
    last: WriteMetrics | None = None
    last_step: int = 0
    last_time: float = 0.0

    def add(self, step: int, written: WriteMetrics) -> None:
        self.saves += 1
        self.seconds += written.seconds
        self.nbytes += written.nbytes
        self.kept_bytes += written.kept_bytes
        self.last, self.last_step, self.last_time = written, step, time.monotonic()


class Saves:
    """The books of a run's checkpoints, from what its manager says of each. Any thread may ask."""

    def __init__(self, manager: Manager, levels: Sequence[Level]):
        self._manager, self._levels = manager, levels
        self._lock = threading.Lock()
        self._open: dict[SaveHandle, set[str]] = {}  # with the levels that are counted
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self.at = {level.name: AtLevel() for level in levels}
        self.restored: Restored | None = None
        # Of saves that are done.
        self.stall_seconds = self.waiting_seconds = self.copy_seconds = 0.0

    def began(self, handle: SaveHandle) -> None:
        """Follows a save until it is done."""
        with self._lock:
            self._open[handle] = set()

    def rows(self) -> list[tuple[int, dict[str, Any]]]:
        """Of each restore and save that is done and was not yet given: its step, and what it cost by name."""
        with self._lock:
            self._look()
            rows, self._rows = self._rows, []
        return rows

    def took(self, restored: Restored) -> None:
        """The run began with this."""
        self.restored = dataclasses.replace(restored, arrays={})  # which are the run's, and change
        values = {
            "restore_seconds": restored.seconds,
            "restore_bytes": restored.metrics.bytes_read,
            "restore_sources": dict(restored.sources),
        }
        self._rows.append((restored.step, values))

    def estimate(self, level: str) -> float:
        """Seconds that a save at a level takes: as long as the last one there, or, before the first, at the next level
        of the ladder, which is slower. Infinity where nothing is known."""
        with self._lock:
            self._look()
            names = [each.name for each in self._levels]
            known = (self.at[name].last for name in names[names.index(level) :])
            return next((last.seconds for last in known if last is not None), float("inf"))

    def failures(self, level: str) -> int:
        """Saves that a level did not take."""
        return sum(failure.level == level for failure in list(self._manager.failures))

    def _look(self) -> None:
        for handle, counted in list(self._open.items()):
            done, metrics = handle.done, handle.metrics
            for name in metrics.levels.keys() - counted:
                self.at[name].add(handle.step, metrics.levels[name])
                counted.add(name)
            if done:
                del self._open[handle]
                self.stall_seconds += metrics.stall_seconds
                self.waiting_seconds += metrics.waiting_seconds
                self.copy_seconds += metrics.copy_seconds
                self._rows.append((handle.step, self._row(metrics)))

    def _row(self, metrics: SaveMetrics) -> dict[str, Any]:
        row: dict[str, Any] = {
            "checkpoint_stall_seconds": metrics.stall_seconds,
            "checkpoint_waiting_seconds": metrics.waiting_seconds,
            "checkpoint_copy_seconds": metrics.copy_seconds,
        }
        for name, written in metrics.levels.items():
            row[f"checkpoint_{name}_seconds"] = written.seconds
            row[f"checkpoint_{name}_bytes"] = written.nbytes
            row[f"checkpoint_{name}_kept_bytes"] = written.kept_bytes
        for failure in list(self._manager.failures):
            if failure.step == metrics.step and failure.level not in metrics.levels:
                row[f"checkpoint_{failure.level}_error"] = str(failure.error)
        return row

    def collect(self) -> Iterator[Metric]:
        """What a registry of Prometheus collects."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            self._look()
        for name, what, value in (
            ("stall_seconds", "That training was held up by saves that are done", self.stall_seconds),
            ("waiting_seconds", "Of the stalls, for an earlier save to make room", self.waiting_seconds),
            ("copy_seconds", "Of copies from the devices to host memory", self.copy_seconds),
        ):
            yield CounterMetricFamily(f"jaxsys_checkpoint_{name}", what, value)
        for name, what in (
            ("saves", "Committed saves"),
            ("write_seconds", "Of writing, syncing and committing"),
            ("written_bytes", "Written"),
            ("kept_bytes", "Not written, as an earlier step there has the same chunks"),
            ("failures", "Saves that a level did not take"),
        ):
            family = CounterMetricFamily(f"jaxsys_checkpoint_{name}", what, labels=["level"])
            for level, at in self.at.items():
                values = {
                    "saves": at.saves, "write_seconds": at.seconds, "written_bytes": at.nbytes,
                    "kept_bytes": at.kept_bytes, "failures": self.failures(level),
                }  # fmt: skip
                family.add_metric([level], values[name])
            yield family
        step = GaugeMetricFamily("jaxsys_checkpoint_last_step", "Of the newest save of this start", labels=["level"])
        age = GaugeMetricFamily("jaxsys_checkpoint_last_age_seconds", "Since that save was there", labels=["level"])
        for level, at in self.at.items():
            if at.saves:
                step.add_metric([level], at.last_step)
                age.add_metric([level], time.monotonic() - at.last_time)
        yield from (step, age)
        if self.restored is not None:
            what = "That the restore at the start took"
            yield GaugeMetricFamily("jaxsys_checkpoint_restore_seconds", what, self.restored.seconds)
            read = GaugeMetricFamily("jaxsys_checkpoint_restored_bytes", "Read by that restore", labels=["place"])
            for place, nbytes in self.restored.sources.items():
                read.add_metric([place], nbytes)
            yield read
