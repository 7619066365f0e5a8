"""Metrics of a run: one JSON object a line in ``metrics.jsonl``, and TensorBoard event files.

A record that cannot be written (a full disk) is an error in the log and never the end of training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Metrics:
    """Appends to a run's metrics. On resume, what was recorded after ``step`` is dropped: it will come again."""

    def __init__(self, run: Path, step: int):
        self.path = run / "metrics.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read(run) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)
        self._there = [(row["step"], row.keys()) for row in kept if row["step"] == step]
        # Unbuffered, so that a line is there whole or not at all and none is tried again later.
        self._file = self.path.open("ab", buffering=0)
        self._events = _Events(run / "tensorboard", step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """values: numbers (NaN and inf are written as null, which is JSON's only way).

        What was recorded of the step that the run resumed from stays as it is.
        """
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        row = {"step": step, **finite}
        if (step, row.keys()) in self._there:
            return
        line = json.dumps(row).encode() + b"\n"
        end = self._file.tell()
        try:
            if self._file.write(line) < len(line):
                os.ftruncate(self._file.fileno(), end)
                raise OSError("the disk is full")
        except OSError as error:
            logger.error("metrics of step %d were not written to %s: %s", step, self.path, error.strerror or error)
        self._events.write(step, {k: v for k, v in finite.items() if isinstance(v, (int, float))})

    def close(self) -> None:
        self._file.close()
        self._events.close()


class NoMetrics:
    """Of a process that is not the first of its job: that one records what all have in common."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Events:
    """A TensorBoard event file. Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the queue
    before it then blocks training."""

    def __init__(self, directory: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._path, self._event = directory, Event
        self._writer: EventsWriter | None = None
        try:
            directory.mkdir(exist_ok=True)
            # The default name is of one second: a quick resume would overwrite it.
            self._writer = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
            # Events of a killed run from this step on are not shown.
            self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if self._writer is not None:
                try:
                    self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))
                except OSError as error:
                    self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # Half an event would make what follows unreadable.
        logger.error("TensorBoard events in %s end here: %s", self._path, error.strerror or error)
        self._writer = None


def read(run: Path) -> list[dict[str, Any]]:
    """What a run recorded, in order. A killed writer may leave half a line, a power loss anything: left out."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
