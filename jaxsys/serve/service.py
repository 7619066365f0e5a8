"""The engine as a service: a thread of its own runs its loop; any thread hands it requests and hears how they go on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from jaxsys.serve.engine import Engine
from jaxsys.serve.request import Request
from jaxsys.serve.scheduler import Plan
from jaxsys.share import DeviceShare

logger = logging.getLogger(__name__)

Progress = Callable[[Request], None]

# A request that began again so often may do so for ever, which is said once.
RESTARTS = 8

# How far back the rate of requests is measured, and the most that anybody is told to wait.
LATELY_SECONDS = 60.0


class Busy(Exception):
    """The queue is full. seconds: when to try again."""

    def __init__(self, queued: int, seconds: float):
        super().__init__(f"{queued} requests wait already: try again in {seconds:.0f} s")
        self.seconds = seconds


class Closed(Exception):
    """No request is taken any more: the service is shutting down, or its engine failed."""


@dataclasses.dataclass
class Times:
    """Of one request, by ``time.monotonic``: when it came, had its first token, its last."""

    came: float
    first: float | None = None
    last: float | None = None


@dataclasses.dataclass
class _Job:
    request: Request
    progress: Progress
    times: Times


class Service:
    """Runs requests of ``engine`` as they come. Once it has begun nobody else may use the engine.

    max_queue: requests that may wait. max_steps: tokens a sequence makes between two looks of the host, which is
    also how long one that comes may have to wait.
    finished: called with each client's request that is finished and its times, on the engine's thread.
    share: of the devices between "serve", whose are the requests of clients, and "train", whose are those of ``run``.
    closed: why no request is taken any more once ``close`` was called.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 1024,
        max_steps: int = 4,
        finished: Callable[[Request, Times], None] | None = None,
        share: DeviceShare | None = None,
        closed: str = "the server is shutting down",
    ):
        self.engine, self.max_queue, self._max_steps, self._finished = engine, max_queue, max_steps, finished
        self.share, self._closed = share, closed
        self.error: BaseException | None = None
        self._jobs: dict[Request, _Job] = {}
        self._warned = False
        self._own = set[Request]()  # what the process itself asked and is not finished
        self._busy_since = 0.0  # when clients last asked nothing
        self._ends = deque[float]()  # when their requests were finished, of late
        self._new: deque[_Job] = deque()
        self._cancelled: deque[Request] = deque()
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jaxsys-serve", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------- from any thread

    def submit(self, requests: Sequence[Request], progress: Progress) -> None:
        """Queues requests, all or none. Raises Busy if too many wait, Closed if none is taken any more.

        progress: called with a request, on the engine's thread, when it may have made tokens and once when it is
        finished; it must return at once and raise nothing.
        """
        with self._change:
            if self._closing or self.error is not None:
                raise Closed(self.reason)
            waiting = self.queued
            if waiting + len(requests) > self.max_queue:
                raise Busy(waiting, self._seconds(waiting))
            self._queue(requests, progress)

    def run(self, requests: Sequence[Request]) -> None:
        """Runs requests of the process itself, others with them, and waits for them.

        No limit holds them up, and they are nobody's in what is said of clients' requests.
        Raises Closed if none is taken any more, and what the engine failed with.
        """
        left, ended = len(requests), threading.Event()

        def progress(request: Request) -> None:
            nonlocal left
            left -= request.finish_reason is not None
            if not left:
                ended.set()

        with self._change:
            if self._closing or self.error is not None:
                raise Closed(self.reason)
            self._queue(requests, progress)
            self._own.update(requests)
        try:
            if requests:
                ended.wait()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        if self.error is not None:
            raise self.error

    def _queue(self, requests: Sequence[Request], progress: Progress) -> None:
        now = time.monotonic()
        if self.active <= len(self._own):
            self._busy_since = now
        self._new.extend(_Job(request, progress, Times(now)) for request in requests)
        self._change.notify()

    def cancel(self, request: Request) -> None:
        """Drops a request, whatever its state; its pages are free after the batch that runs."""
        with self._change:
            self._cancelled.append(request)
            self._change.notify()

    def _seconds(self, waiting: int) -> float:
        """How long so many requests take, as fast as they were finished lately; 1 to 60."""
        now = time.monotonic()
        began = max(now - LATELY_SECONDS, self._busy_since)
        # Before one is finished each takes at least the time that there was for it.
        each = (now - began) / max(sum(end >= began for end in self._ends), 1)
        return min(max(waiting * each, 1.0), LATELY_SECONDS)

    @property
    def reason(self) -> str:
        """Why no request is taken any more, where that is so."""
        return self._closed if self.error is None else f"the engine failed: {self.error}"

    @property
    def queued(self) -> int:
        """Requests of clients that wait."""
        own = sum(request.finish_reason is None and not request.pages for request in tuple(self._own))
        return max(len(self._new) + self.engine.scheduler.queued - own, 0)

    @property
    def running(self) -> int:
        """Requests of clients in the batch."""
        return sum(request not in self._own for request in self.engine.scheduler.running)

    @property
    def active(self) -> int:
        """Requests that are not finished."""
        return len(self._new) + len(self._jobs)

    def close(self, seconds: float = 0.0) -> bool:
        """Takes no more requests, waits so long for those there are, and cancels the rest; whether all finished."""
        with self._change:
            self._closing = True
            self._change.notify()
            self._change.wait_for(lambda: not self.active or self.error is not None, seconds)
            left = [*self._jobs, *(job.request for job in self._new)]
            self._cancelled.extend(left)
            self._change.notify()
        self._thread.join()
        return not left and self.error is None

    # --------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._warm() or self._take():
                party = self._party
                with contextlib.nullcontext() if self.share is None else self.share.turn(party):
                    self._turn(party)
        except BaseException as error:
            self._fail(error)

    def _warm(self) -> bool:
        """While nobody asks anything, runs programs that have not run yet; False, so that what is asked comes next.

        Not beside training, whose time it would take for nobody.
        """
        while self.share is None and self.engine.cold and not (self.active or self._cancelled or self._closing):
            self.engine.warm()
        return False

    @property
    def _party(self) -> str:
        """Who takes the devices: the process waits for what it asked itself, and works on when it has that."""
        return "train" if self._own else "serve"

    def _parts(self, plan: Plan) -> Counter[str]:
        """Rows of a batch that each party has."""
        parts = Counter[str]()
        for chunk in (chunk for chunks in plan.chunks for chunk in chunks):
            parts["train" if chunk.request in self._own else "serve"] += chunk.count
        return parts

    def _turn(self, party: str) -> None:
        """Runs batches until there is nothing to do, or the devices are another's."""
        engine, done = self.engine, list[Request]()
        while engine.busy:
            launched = engine.launch(self._max_steps)
            self._tell(done)  # of the batch before, while the devices compute
            done = [] if launched is None else [*engine.finish(launched), *engine.scheduler.running]
            self._warn()
            if self.share is not None:
                if launched is not None:
                    self.share.book(self._parts(launched.plan))
                if self.share.over(party):
                    break
            if engine.busy and not self._take():
                break
            if self._party != party:
                break
        self._tell(done)

    def _warn(self) -> None:
        scheduler = self.engine.scheduler
        if self._warned or scheduler.new_weights != "restart" or all(r.undone < RESTARTS for r in scheduler.running):
            return
        self._warned = True
        logger.warning(
            "a request began again %d times as the weights changed: under new_weights=restart one that takes longer "
            "than the time between two updates is not answered while training runs: ask for fewer tokens, or use "
            "switch, recompute or finish",
            RESTARTS,
        )

    def _take(self) -> bool:
        """Brings in what other threads asked for, waiting if there is nothing else to do; False at the end."""
        engine = self.engine
        with self._change:
            self._change.wait_for(
                lambda: self._new or self._cancelled or engine.busy or (self._closing and not self._jobs)
            )
            new, cancelled = list(self._new), list(self._cancelled)
            self._new.clear()
            self._cancelled.clear()
            for job in new:
                self._jobs[job.request] = job
            if self._closing and not self._jobs:
                return False
        for job in new:
            engine.add(job.request)
        for request in cancelled:
            engine.cancel(request)
        self._tell([request for request in (*cancelled, *(job.request for job in new)) if request.finish_reason])
        return True

    def _tell(self, requests: Sequence[Request]) -> None:
        """Passes on what requests came to, with the time of it."""
        now = time.monotonic()
        for request in requests:
            job = self._jobs.get(request)
            if job is None:
                continue
            if request.made:
                job.times.first = now if job.times.first is None else job.times.first
                job.times.last = now
            if request.finish_reason is not None:
                with self._change:
                    del self._jobs[request]
                    own = request in self._own
                    self._own.discard(request)
                    if request.finish_reason != "cancelled" and not own:
                        self._ends.append(now)
                    while self._ends and self._ends[0] < now - LATELY_SECONDS:
                        self._ends.popleft()
                    self._change.notify_all()
                if self._finished is not None and not own:
                    self._finished(request, job.times)
            job.progress(request)

    def _fail(self, error: BaseException) -> None:
        """Nothing can be computed any more: everybody hears of it."""
        with self._change:
            self.error = error
            jobs = [*self._jobs.values(), *self._new]
            self._jobs.clear()
            self._new.clear()
            self._own.clear()
            self._change.notify_all()
        for job in jobs:
            self.engine.cancel(job.request)  # its pages are free, though nobody will use them
            job.progress(job.request)
