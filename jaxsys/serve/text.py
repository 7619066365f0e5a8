"""The text of a request as its tokens are made, up to a text that ends it. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Pieces(Protocol):
    """Turns tokens into text: what ``push`` and one ``finish`` return adds up to all of it."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class Text:
    """What is sure of a text that grows. What may be the beginning of a stop is held back until it is known.

    pieces: makes what turns tokens into text. stops: texts that end it and are no part of it; one counts when the
    token that completes it is at least the ``least``-th. sure: the text so far. stopped: whether a stop came.
    """

    def __init__(self, pieces: Callable[[], Pieces], stops: Sequence[str] = (), least: int = 0):
        self._make, self._stops, self._least = pieces, tuple(stops), least
        self.restart()

    def restart(self) -> None:
        """There are no tokens any more."""
        self._pieces = self._make()
        self._held, self._tokens = "", 0
        self.sure, self.stopped, self._finished = "", False, False

    def push(self, token: int) -> bool:
        """Takes a token; whether the text ends with it."""
        self._tokens += 1
        self._grow(self._pieces.push(token))
        keep = 0 if self.stopped else self._beginning()
        self.sure += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return self.stopped

    def finish(self) -> str:
        """All of the text; no token comes any more."""
        if not self._finished:
            self._finished = True
            if not self.stopped:
                self._grow(self._pieces.finish())
            self.sure, self._held = self.sure + self._held, ""
        return self.sure

    def _grow(self, piece: str) -> None:
        """Cuts at the stop that is complete first, the longest of those that end there.

        It ends in the new piece: what was complete before would have ended the text, or came too early to count.
        """
        before = len(self._held)
        self._held += piece
        if self._tokens < self._least:
            return
        starts = [(stop, self._held.find(stop, max(before - len(stop) + 1, 0))) for stop in self._stops]
        if found := [(at + len(stop), at) for stop, at in starts if at >= 0]:
            self._held, self.stopped = self._held[: min(found)[1]], True

    def _beginning(self) -> int:
        """Length of the longest end of what is held that a stop may begin with and go on from."""
        longest = min(max(map(len, self._stops), default=0), len(self._held) + 1) - 1
        for n in range(max(longest, 0), 0, -1):
            if any(len(stop) > n and stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0
