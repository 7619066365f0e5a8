"""The scheduler against an executor that is not there: thousands of requests in virtual time, no JAX.

The executor keeps what every position of every page holds, and each token it makes is a function of all that attention
would read. A page that was freed too early, copied wrongly or shared by the wrong requests changes tokens.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Iterable, Sequence

from jaxsys.serve.pages import Move
from jaxsys.serve.request import Made, Request
from jaxsys.serve.scheduler import Plan, Scheduler


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of virtual time: of a launch, a row of the shape that is used, a key that is read, a page that moves."""

    launch: float = 1e-3
    row: float = 1e-4
    key: float = 1e-7
    page: float = 1e-4


class SimulatedExecutor:
    """Runs plans on a pool of numbers. vocabulary: tokens are below it. seconds: virtual time spent."""

    def __init__(self, page_size: int, vocabulary: int = 50, cost: Cost | None = None):
        self._page_size, self._vocabulary, self._cost = page_size, vocabulary, cost or Cost()
        self._device: dict[int, dict[int, int]] = {}
        self._host: dict[int, dict[int, int]] = {}
        self.version = 0
        self.seconds = 0.0

    def run(self, plan: Plan) -> list[list[Made]]:
        """What a plan makes, [steps that ran][chunk]; it ends early where a chunk makes a stop token."""
        for move in plan.moves:
            self._move(move)
        rows = [
            (chunk, list(chunk.request.pages), chunk.request.tokens[chunk.start : chunk.start + chunk.count])
            for chunk in plan.chunks
        ]
        made: list[list[int]] = []
        keys = 0
        for step in range(plan.steps):
            line = []
            for n, (chunk, pages, tokens) in enumerate(rows):
                if step:
                    at, new = chunk.start + chunk.count + step - 1, [made[-1][n]]
                else:
                    at, new = chunk.start, tokens
                for offset, token in enumerate(new):
                    self._write(pages, at + offset, token)
                end = at + len(new)
                keys += end
                line.append(self._token(pages, end) if chunk.samples else 0)
            made.append(line)
            if any(c.samples and t in c.request.sampling.stop for (c, _, _), t in zip(rows, line, strict=True)):
                break
        cost = self._cost
        rows_run = plan.size.rows + (len(made) - 1) * plan.size.sequences
        self.seconds += cost.launch + cost.row * rows_run + cost.key * keys + cost.page * len(plan.moves)
        return [[Made(token, 0.0) for token in line] for line in made]

    def _move(self, move: Move) -> None:
        stores = {
            "copy": (self._device, self._device),
            "out": (self._device, self._host),
            "in": (self._host, self._device),
        }
        source, target = stores[move.kind]
        target[move.target] = dict(source[move.source])

    def _write(self, pages: Sequence[int], position: int, token: int) -> None:
        page = self._device.setdefault(pages[position // self._page_size], {})
        page[position % self._page_size] = hash((self.version, position, token))

    def _token(self, pages: Sequence[int], end: int) -> int:
        size = self._page_size
        seen = [self._device.get(pages[at // size], {}).get(at % size) for at in range(end)]
        return hash((self.version, *seen)) % self._vocabulary


@dataclasses.dataclass
class Served:
    """One request's times: came, first token, last token; virtual seconds."""

    came: float
    first: float | None = None
    last: float | None = None


def serve(
    scheduler: Scheduler,
    executor: SimulatedExecutor,
    arrivals: Iterable[tuple[float, Request]],
    cancels: Iterable[tuple[float, Request]] = (),
    publishes: Iterable[float] = (),
) -> dict[Request, Served]:
    """Runs requests that come at their times, until all are finished; when each came and was served.

    cancels: who is cancelled, and when. publishes: times at which the weights change.
    """
    events: list[tuple[float, int, str, Request | None]] = []
    for kind, each in (("add", arrivals), ("cancel", cancels), ("publish", [(at, None) for at in publishes])):
        for at, request in each:
            heapq.heappush(events, (at, len(events), kind, request))
    times: dict[Request, Served] = {}
    while events or scheduler.busy:
        if not scheduler.busy:
            executor.seconds = max(executor.seconds, events[0][0])
        while events and events[0][0] <= executor.seconds:
            at, _, kind, request = heapq.heappop(events)
            if kind == "publish":
                executor.version += 1
                scheduler.publish(executor.version)
            elif kind == "cancel":
                assert request is not None
                scheduler.cancel(request)
            else:
                assert request is not None
                times[request] = Served(at)
                scheduler.add(request)
        plan = scheduler.schedule()
        if plan is None:
            if scheduler.busy:
                raise RuntimeError("requests wait, and nothing runs")
            continue
        before = [chunk.request.made for chunk in plan.chunks]
        scheduler.advance(plan, executor.run(plan), executor.version)
        for chunk, made in zip(plan.chunks, before, strict=True):
            served = times[chunk.request]
            if chunk.request.made > made:
                served.first = executor.seconds if served.first is None else served.first
                served.last = executor.seconds
    return times


def poisson(requests: Sequence[Request], per_second: float, seed: int = 0) -> list[tuple[float, Request]]:
    """Arrivals at random times, so many a second on average."""
    draw, now, out = random.Random(seed), 0.0, []
    for request in requests:
        now += draw.expovariate(per_second)
        out.append((now, request))
    return out
