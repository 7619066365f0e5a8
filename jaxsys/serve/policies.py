"""What the scheduler decides by: who comes first, who is let in, who has to leave. Plain Python.

``Request.priority``: the lower the number, the more urgent. All policies put urgency first.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from jaxsys.serve.request import Request


class Ordering(Protocol):
    """The requests that wait, and which of them is next."""

    def push(self, request: Request) -> None:
        """Queues a request: a new one, or one that ran and had to leave, which keeps its place."""

    def head(self) -> Request | None:
        """The next request."""

    def discard(self, request: Request) -> None:
        """Takes a request out of the queue."""

    def charge(self, request: Request, computed: int, made: int) -> None:
        """So many tokens of the request's were computed, and so many made."""

    def end(self, request: Request) -> None:
        """The request is finished."""

    def __len__(self) -> int: ...


class _Heap:
    """Requests, the most urgent first, then by arrival. What is taken out of the middle is skipped at the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._live: dict[int, Request] = {}

    def push(self, request: Request) -> None:
        self._live[request.number] = request
        heapq.heappush(self._heap, (request.priority, request.number))

    def head(self) -> Request | None:
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._live[self._heap[0][1]] if self._heap else None

    def discard(self, request: Request) -> None:
        self._live.pop(request.number, None)

    def __len__(self) -> int:
        return len(self._live)


class FirstComeFirstServed:
    """In order of arrival."""

    def __init__(self) -> None:
        self._waiting = _Heap()
        self.push, self.head, self.discard = self._waiting.push, self._waiting.head, self._waiting.discard

    def charge(self, request: Request, computed: int, made: int) -> None:
        pass

    def end(self, request: Request) -> None:
        pass

    def __len__(self) -> int:
        return len(self._waiting)


class FairShare:
    """Whoever was served least is next: a counter of tokens for each client (Sheng et al. 2024, algorithm 2).

    A token that is made counts as much as ``made`` tokens that are computed; what a cache already had counts nothing. A
    client that had nothing to do meanwhile begins at the lowest counter of those who had, so nobody saves up.
    """

    def __init__(self, made: float = 2.0):
        self._made = made
        self._served: dict[str, float] = {}
        self._present: Counter[str] = Counter()  # requests of each client, waiting or running
        self._levels: dict[int, dict[str, _Heap]] = {}  # by priority, by client
        self._order: dict[int, list[tuple[float, int, str]]] = {}  # heaps of clients; some entries are out of date
        self._queued: set[Request] = set()
        self._known: set[Request] = set()
        self._enough = 1024  # clients before some are forgotten

    def push(self, request: Request) -> None:
        client = request.client
        if request not in self._known:
            self._known.add(request)
            if not self._present[client]:
                lowest = min((self._served[c] for c in self._present if self._present[c]), default=0.0)
                self._served[client] = max(self._served.get(client, 0.0), lowest)
            self._present[client] += 1
        self._queued.add(request)
        heap = self._levels.setdefault(request.priority, {}).setdefault(client, _Heap())
        heap.push(request)
        self._rank(request.priority, client)

    def head(self) -> Request | None:
        for priority in sorted(self._levels):
            order, clients = self._order[priority], self._levels[priority]
            while order:
                served, number, client = order[0]
                first = clients[client].head() if client in clients else None
                if first is not None and served == self._served[client] and number == first.number:
                    return first
                heapq.heappop(order)
        return None

    def discard(self, request: Request) -> None:
        if request not in self._queued:
            return
        self._queued.remove(request)
        clients = self._levels[request.priority]
        heap = clients[request.client]
        heap.discard(request)
        if not len(heap):
            del clients[request.client]
            if not clients:
                del self._levels[request.priority], self._order[request.priority]
                return
        self._rank(request.priority, request.client)

    def charge(self, request: Request, computed: int, made: int) -> None:
        self._served[request.client] += computed + self._made * made
        for priority, clients in self._levels.items():
            if request.client in clients:
                self._rank(priority, request.client)

    def end(self, request: Request) -> None:
        if request in self._known:
            self._known.remove(request)
            self._present[request.client] -= 1
            if not self._present[request.client]:
                del self._present[request.client]
            if len(self._served) > self._enough:
                self._forget()

    def served(self, client: str) -> float:
        """What a client was charged, and lifted by."""
        return self._served.get(client, 0.0)

    def __len__(self) -> int:
        return len(self._queued)

    def _forget(self) -> None:
        """Drops the counters of clients that are away and would not be ahead of anybody when they came back."""
        lowest = min((self._served[client] for client in self._present), default=math.inf)
        self._served = {c: served for c, served in self._served.items() if c in self._present or served > lowest}
        self._enough = max(1024, 2 * len(self._served))

    def _rank(self, priority: int, client: str) -> None:
        """A client's entry as it is now; those before it are out of date."""
        heap = self._levels.get(priority, {}).get(client)
        if heap is not None and (first := heap.head()) is not None:
            heapq.heappush(self._order.setdefault(priority, []), (self._served[client], first.number, client))


class Admission(Protocol):
    """How many pages a request must find free before it begins."""

    def pages(self, known: int, longest: int, count: int, running: int) -> tuple[int, int]:
        """(pages it gets, pages that must be left over).

        known, longest: pages for the tokens that there are, and that there can come to be. count: of the pool.
        running: requests that it would run beside.
        """


class Watermark:
    """Pages for the tokens that there are; a share of the pool must be left over for those who run to grow into."""

    def __init__(self, share: float = 0.02):
        self.share = share

    def pages(self, known: int, longest: int, count: int, running: int) -> tuple[int, int]:
        return known, min(int(self.share * count) + 1, longest - known) if running else 0


class Reserve:
    """Pages for all tokens that there can come to be, so that nobody ever has to leave."""

    def pages(self, known: int, longest: int, count: int, running: int) -> tuple[int, int]:
        return longest, 0


class Preemption(Protocol):
    """Who has to leave when pages run out, or somebody more urgent waits. It comes back where it was in the queue."""

    def victim(self, running: Iterable[Request], waiting: Request | None) -> Request | None:
        """One of the running. waiting: for whom, None if for one of the running themselves."""


class LastCome:
    """The least urgent, of these the last to come; for one that waits, only who is less urgent than it."""

    def victim(self, running: Iterable[Request], waiting: Request | None) -> Request | None:
        last = max(running, key=lambda request: (request.priority, request.number), default=None)
        if last is None or (waiting is not None and last.priority <= waiting.priority):
            return None
        return last
