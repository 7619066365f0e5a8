"""How often a level is written when nobody says: as often as what it takes allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from parallelism.coordinator import Coordinator

BUSY = 0.5
"""The part of the time that a level may be writing."""
AHEAD = 3
"""Steps between naming the next step and being there.

No process launches step n + 2 before all have launched step n: a process that asks for the step by then is told of it.
"""


class Pace:
    """Names the steps that a level takes, in all processes the same: process 0 measures, the others are told.

    channel: a name of its own. All processes ask for every step, in order.
    """

    def __init__(self, coordinator: Coordinator, channel: str, clock: Callable[[], float] = time.monotonic):
        self._coordinator, self._channel, self._clock = coordinator, channel, clock
        self._next: int | None = None
        self._named = 0
        self._last: int | None = None  # step that was taken
        self._before: tuple[int, float] | None = None
        self._step_seconds = 0.0

    def due(self, step: int, write_seconds: float | None) -> bool:
        """Whether the level takes this step. write_seconds: how long its last save took; None while one is written."""
        if self._coordinator.index == 0:
            self._measure(step)
            if self._next is None and write_seconds is not None:
                apart = math.ceil(write_seconds / BUSY / self._step_seconds) if self._step_seconds else 1
                last = step if self._last is None else self._last
                self._name(max(last + apart, step + AHEAD))
        elif self._next is None:
            number, named = self._coordinator.told(self._channel) or (None, None)
            self._next = named if number == self._named else None
        if self._next is None or step < self._next:
            return False
        self._next, self._last = None, step
        self._named += 1
        return True

    def _name(self, step: int) -> None:
        self._next = step
        self._coordinator.tell(self._channel, (self._named, step))

    def _measure(self, step: int) -> None:
        now = self._clock()
        if self._before is not None and step > self._before[0]:
            seconds = (now - self._before[1]) / (step - self._before[0])
            # Half of it is the latest, so that a pause (an evaluation) is soon forgotten.
            self._step_seconds = (self._step_seconds + seconds) / 2 if self._step_seconds else seconds
        self._before = step, now
