"""Who has the devices: training and serving in turns, each with a share of the time.

A device runs what it is given in order, so whoever gives it much at once has it all. Here each asks for a turn, waits
in it until the devices are done, and leaves it when it is the other's: the one with the least time behind it for its
share is next, and who comes has no claim from before the turn that goes on then began (start-time fair queueing, Goyal
et al. 1996). What one does not use is the other's; nobody saves up.

Who works in a loop is gone for a moment after each turn, and would lose the next one every time that it is due: so the
others wait for it a little, if it came back as soon the last time (anticipatory scheduling, Iyer and Druschel 2001).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass
class Party:
    """share: of the time. patience: seconds that others wait for it after a turn, when the next one is its own too.

    tag: seconds it had, or was waited for, divided by its share; as much as the others had when it last came from idle.
    left: when its last turn ended. brief: whether it was back within its patience, the last time.
    used, waited: seconds it had, and waited for its turns. turns: how many. longest: it waited for one.
    """

    share: float
    patience: float = 0.0
    tag: float = 0.0
    left: float = -math.inf
    brief: bool = False
    used: float = 0.0
    waited: float = 0.0
    turns: int = 0
    longest: float = 0.0


class DeviceShare:
    """Turns of named parties on the same devices. shares: of each, above 0. patience: for those who work in a loop,
    seconds that its host needs between two turns. clock: seconds."""

    def __init__(
        self,
        shares: Mapping[str, float],
        patience: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        if any(share <= 0 for share in shares.values()):
            raise ValueError(f"shares {dict(shares)}: expected numbers above 0")
        whole = sum(shares.values())
        self.parties = {name: Party(share / whole, (patience or {}).get(name, 0.0)) for name, share in shares.items()}
        self._clock, self._since = clock, 0.0  # when the holder was last charged, or the last one left
        self._start = 0.0  # the tag of who has the devices, when it was last its turn
        self._holder: str | None = None
        self._waiting: set[str] = set()
        self._change = threading.Condition()

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Waits for a party's turn; the devices are its own inside. What it launched must be done at the end."""
        self._arrive(name)
        with self._change:
            self._wait(name)
        try:
            yield
        finally:
            self._leave(name)

    def over(self, name: str) -> bool:
        """Inside a turn: whether it is another's now."""
        with self._change:
            self._charge()
            over = self._next() != name
            if not over:
                self._start = max(self._start, self.parties[name].tag)
            return over

    def book(self, parts: Mapping[str, float]) -> None:
        """Inside a turn: whose the time since the last look was, in proportion, whoever has the turn."""
        with self._change:
            self._charge(parts)

    def pause(self, name: str) -> None:
        """Inside a turn: lets others have theirs, if it is time."""
        with self._change:
            if self.over(name):
                self._holder = None
                self._waiting.add(name)
                self._change.notify_all()
                self._wait(name)

    def _wait(self, name: str) -> None:
        came = self._clock()
        try:
            while not self._may(name):
                self._change.wait(self._patience())
        except BaseException:  # an interrupt: nobody is to wait for it
            self._waiting.discard(name)
            self._change.notify_all()
            raise
        self._enter(name)
        party, waited = self.parties[name], self._since - came
        party.waited, party.longest = party.waited + waited, max(party.longest, waited)

    def _arrive(self, name: str) -> None:
        """It waits from now on, and has no claim from the time when it did not."""
        with self._change:
            self._charge()
            party, now = self.parties[name], self._clock()
            if self._holder is None and self._waiting and name in self._expected():
                party.tag += (now - self._since) / party.share  # they were kept for it, and may be another's now
                self._change.notify_all()
            party.brief = now - party.left < party.patience
            party.tag = max(party.tag, self._start)
            self._waiting.add(name)

    def _may(self, name: str) -> bool:
        """Whether the turn of one that waits has come."""
        return self._holder is None and self._next() == name

    def _enter(self, name: str) -> None:
        party = self.parties[name]
        self._waiting.discard(name)
        self._holder, self._since = name, self._clock()
        self._start = max(self._start, party.tag)
        party.turns += 1

    def _leave(self, name: str) -> None:
        with self._change:
            if self._holder == name:  # and was not interrupted as it waited to go on
                self._charge()
                self._holder, self.parties[name].left = None, self._clock()
                self._change.notify_all()

    def _charge(self, parts: Mapping[str, float] | None = None) -> None:
        """The holder has had the devices until now, or had them for others."""
        if self._holder is None:
            return
        now, parts = self._clock(), parts or {self._holder: 1.0}
        for name, part in parts.items():
            party, seconds = self.parties[name], (now - self._since) * part / sum(parts.values())
            party.used += seconds
            party.tag += seconds / party.share
        self._since = now

    def _next(self) -> str:
        """Whose turn it is, of those who are there or back in a moment."""
        here = {*self._waiting, *self._expected(), *([self._holder] if self._holder else [])}
        return min(sorted(here), key=lambda name: self.parties[name].tag)

    def _expected(self) -> dict[str, float]:
        """Who is back in a moment, and for how long this is believed."""
        now = self._clock()
        return {
            name: left
            for name, party in self.parties.items()
            if party.brief and name != self._holder and name not in self._waiting
            if (left := party.left + party.patience - now) > 0
        }

    def _patience(self) -> float | None:
        """For how long who waits need not look again, if nothing changes."""
        return min(self._expected().values(), default=None) if self._holder is None else None
