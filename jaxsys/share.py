"""Who has the devices: training and serving in turns, each with a share of the time.

A device runs what it is given in order, so whoever gives it much at once has it all. Here each asks for a turn, waits
in it until the devices are done, and leaves it when it is the other's: the one with the least time behind it for its
share is next (start-time fair queueing, Goyal et al. 1996). What one does not use is the other's; nobody saves up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass
class Party:
    """share: of the time. tag: seconds it had, divided by its share, or those of the others when it last came.

    used, waited: seconds it had, and waited for its turns. turns: how many. longest: it waited for one.
    """

    share: float
    tag: float = 0.0
    used: float = 0.0
    waited: float = 0.0
    turns: int = 0
    longest: float = 0.0


class DeviceShare:
    """Turns of named parties on the same devices. shares: of each, above 0. clock: seconds."""

    def __init__(self, shares: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
        if any(share <= 0 for share in shares.values()):
            raise ValueError(f"shares {dict(shares)}: expected numbers above 0")
        whole = sum(shares.values())
        self.parties = {name: Party(share / whole) for name, share in shares.items()}
        self._clock, self._since = clock, 0.0
        self._holder: str | None = None
        self._waiting: set[str] = set()
        self._change = threading.Condition()

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Waits for a party's turn; the devices are its own inside. What it launched must be done at the end."""
        self._take(name)
        try:
            yield
        finally:
            self._leave(name)

    def over(self, name: str) -> bool:
        """Inside a turn: whether it is another's now."""
        with self._change:
            self._charge()
            return self._next({name, *self._waiting}) != name

    def pause(self, name: str) -> None:
        """Inside a turn: lets others have theirs, if it is time."""
        if self.over(name):
            self._leave(name)
            self._take(name)

    def _take(self, name: str) -> None:
        party, came = self.parties[name], self._clock()
        with self._change:
            self._arrive(name)
            self._change.wait_for(lambda: self._holder is None and self._next(self._waiting) == name)
            self._enter(name)
            waited = self._since - came
            party.waited, party.longest = party.waited + waited, max(party.longest, waited)

    def _arrive(self, name: str) -> None:
        """It waits from now on, and has no claim from the time when it did not."""
        self._charge()
        here = [self.parties[each].tag for each in (*self._waiting, *([self._holder] if self._holder else []))]
        self.parties[name].tag = max(self.parties[name].tag, min(here, default=0.0))
        self._waiting.add(name)

    def _enter(self, name: str) -> None:
        self._waiting.discard(name)
        self._holder, self._since = name, self._clock()
        self.parties[name].turns += 1

    def _leave(self, name: str) -> None:
        with self._change:
            self._charge()
            self._holder = None
            self._change.notify_all()

    def _charge(self) -> None:
        """The holder has had the devices until now."""
        if self._holder is not None:
            party, now = self.parties[self._holder], self._clock()
            party.used += now - self._since
            party.tag += (now - self._since) / party.share
            self._since = now

    def _next(self, names: set[str]) -> str:
        return min(sorted(names), key=lambda name: self.parties[name].tag)
