"""Whether all processes of a job launch the same programs in the same order.

A program with collectives that one process launches and another does not, or not then, hangs or sums what does not
belong together. So each process keeps a running digest of what it has launched: two that have differed once differ
ever after. ``liveness`` carries a piece of process 0's list to the others, which compare it with theirs.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Sequence

KEPT = 4096
REACH = 16

Window = tuple[int, Sequence[tuple[int, str]]]
"""The number of a first launch, from 1, and for it and each after it the digest of all so far and its name."""


class Launches:
    """What this process has launched, in order; of any thread."""

    def __init__(self) -> None:
        self.count = 0
        self._digest = 0
        self._last: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self.count += 1
            self._digest = zlib.crc32(name.encode() + b"\0", self._digest)
            self._last.append((self._digest, name))

    def window(self, around: int) -> Window:
        """Of what is still known, the launches within ``REACH`` of the one with this number."""
        with self._lock:
            first = self.count - len(self._last) + 1
            low = max(around - REACH, first)
            return low, [self._last[i - first] for i in range(low, min(around + REACH, self.count) + 1)]

    def difference(self, theirs: Window) -> str:
        """From which launch on another process's launches are not those of this one; "" where they agree, as far as
        both are known."""
        low, launches = theirs
        first, mine = self.window(low + len(launches) // 2)
        agreed = low == first == 1  # nothing before was different
        for number in range(max(low, first), min(low + len(launches), first + len(mine))):
            (digest, name), (other_digest, other) = mine[number - first], launches[number - low]
            if digest == other_digest:
                agreed = True
            elif agreed and name != other:
                return f"launches {name} where process 0 launches {other} (launch {number})"
            else:
                return f"has launched something else than process 0 before launch {number} ({name} and {other})"
        return ""
