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
    """Runs plans on pools of numbers. vocabulary: tokens are below it. seconds: virtual time spent."""

    def __init__(self, page_size: int, vocabulary: int = 50, cost: Cost | None = None):
        self._page_size, self._vocabulary, self._cost = page_size, vocabulary, cost or Cost()
        self._device: dict[tuple[int, int], dict[int, int]] = {}  # by replica and page
        self._host: dict[tuple[int, int], dict[int, int]] = {}
        self._version = 0
        self.seconds = 0.0

    def run(self, plan: Plan) -> list[list[list[Made]]]:
        """What a plan makes, [steps that ran][replica][chunk]; it ends early where a chunk makes a stop token."""
        self._version = plan.version
        for replica, moves in enumerate(plan.moves):
            for move in moves:
                self._move(replica, move)
        tokens = [[c.request.tokens[c.start : c.start + c.count] for c in chunks] for chunks in plan.chunks]
        made: list[list[list[Made]]] = []
        keys = 0
        for step in range(plan.steps):
            rows: list[list[Made]] = []
            stopped = False
            for r, chunks in enumerate(plan.chunks):
                rows.append([])
                for n, chunk in enumerate(chunks):
                    at = chunk.start + (chunk.count + step - 1 if step else 0)
                    new = [made[-1][r][n].token] if step else tokens[r][n]
                    for offset, token in enumerate(new):
                        self._write(chunk.request, at + offset, token)
                    keys += at + len(new)
                    token = self._token(chunk.request, at + len(new)) if chunk.samples else 0
                    rows[r].append(Made(token, 0.0))
                    stopped |= chunk.samples and token in chunk.request.sampling.stop
            made.append(rows)
            if stopped:
                break
        cost, moved = self._cost, max(map(len, plan.moves), default=0)
        rows_run = plan.size.rows + (len(made) - 1) * plan.size.sequences
        self.seconds += cost.launch + cost.row * rows_run + cost.key * keys + cost.page * moved
        return made

    def _move(self, replica: int, move: Move) -> None:
        device, host = self._device, self._host
        source, target = {"copy": (device, device), "out": (device, host), "in": (host, device)}[move.kind]
        target[replica, move.target] = dict(source[replica, move.source])

    def _write(self, request: Request, position: int, token: int) -> None:
        page = self._device.setdefault((request.replica, request.pages[position // self._page_size]), {})
        page[position % self._page_size] = hash((self._version, position, token))

    def _token(self, request: Request, end: int) -> int:
        size = self._page_size
        pages = [self._device.get((request.replica, page), {}) for page in request.pages[: -(-end // size)]]
        return hash((self._version, *(pages[at // size].get(at % size) for at in range(end)))) % self._vocabulary


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
    version = 0
    while events or scheduler.busy:
        if not scheduler.busy:
            executor.seconds = max(executor.seconds, events[0][0])
        while events and events[0][0] <= executor.seconds:
            at, _, kind, request = heapq.heappop(events)
            if kind == "publish":
                version += 1
                scheduler.publish(version)
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
        before = {chunk.request: chunk.request.made for chunks in plan.chunks for chunk in chunks}
        scheduler.advance(plan, executor.run(plan))
        for request, made in before.items():
            served = times[request]
            if request.made > made:
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
