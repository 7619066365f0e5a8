"""What the next packed batch holds. Plain Python with no JAX in it.

There is no prefill and no decode: a request's computed tokens catch up with its tokens. Each step has a budget
of rows; requests that lack one token come first, so that long prompts, which take what rows are left, never
stall them (Sarathi-Serve, Agrawal et al. 2024). A request begins with pages for the tokens there are and gets more as
it grows; when there are none left somebody leaves the pool, waits, and comes back to as much of its keys and values
as is still there. Who that is, who comes first and who is let in, is decided by ``jaxsys.serve.policies``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxsys.serve.pages import Move, Pages, root_of
from jaxsys.serve.policies import Admission, FirstComeFirstServed, LastCome, Ordering, Preemption, Watermark
from jaxsys.serve.request import Made, Request
from parallelism.errors import UserError

MIXED = -1  # the version of keys and values that different weights made


@dataclasses.dataclass(frozen=True, order=True)
class Size:
    """The fixed shape of a packed batch: ``rows`` token rows of at most ``sequences`` sequences.

    queries: rows of one sequence that attention handles together.
    """

    rows: int
    sequences: int
    queries: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.sequences <= self.rows or self.queries < 1 or self.rows % self.queries:
            raise ValueError(f"{self}: expected rows >= sequences >= 1 and queries that divide the rows")

    @property
    def items(self) -> int:
        """Groups of rows: enough for any split of the rows over the sequences."""
        return self.rows if self.queries == 1 else self.rows // self.queries + self.sequences


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + count - 1`` of a request; ``samples`` if the last gives it a new token."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One packed batch. steps: how many tokens each sampling chunk may make before the host has to look.

    moves: of pages, to be done before it, in order.
    """

    size: Size
    chunks: tuple[Chunk, ...]
    steps: int
    moves: tuple[Move, ...] = ()


@dataclasses.dataclass
class Counts:
    """What happened so far, in numbers of requests and of tokens.

    reused: tokens whose keys and values were there already when their request began. computed: all others.
    preempted: times that somebody had to leave.
    """

    finished: int = 0
    cancelled: int = 0
    preempted: int = 0
    reused: int = 0
    computed: int = 0
    made: int = 0


class Scheduler:
    """Requests, waiting and running, of one replica.

    sizes: the shapes there are; max_steps: device steps of one plan. budget: rows of a plan at most, None is those of
    the largest shape.
    """

    def __init__(
        self,
        pages: Pages,
        sizes: Sequence[Size],
        max_steps: int,
        *,
        budget: int | None = None,
        ordering: Ordering | None = None,
        admission: Admission | None = None,
        preemption: Preemption | None = None,
    ):
        self.pages, self.sizes, self.max_steps = pages, sorted(sizes), max_steps
        self.waiting: Ordering = FirstComeFirstServed() if ordering is None else ordering
        self.admission: Admission = Watermark() if admission is None else admission
        self.preemption: Preemption = LastCome() if preemption is None else preemption
        self.running: list[Request] = []
        self.counts = Counts()
        most = max(size.rows for size in sizes)
        # What runs together must fit every shape that its rows can call for.
        self.max_sequences = max(sizes, key=lambda size: size.rows).sequences
        self.budget = min(budget or most, most)
        if self.budget < self.max_sequences:
            raise ValueError(f"a budget of {self.budget} rows for {self.max_sequences} sequences would stall some")
        self._held: dict[Request, Request] = {}  # who waits for what another computes, and for whom
        self._version, self._root = 0, root_of(0)
        self._arrived = 0

    @property
    def busy(self) -> bool:
        return bool(self.running or self._held or len(self.waiting))

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting) + len(self._held)

    def publish(self, version: int) -> None:
        """Keys and values of other weights are not used for requests that begin from now on."""
        if version != self._version:
            self.pages.forget(self._root)
            self._version, self._root = version, root_of(version)

    def add(self, request: Request) -> None:
        """Queues a request, unless it was cancelled before. Raises UserError if it could never run."""
        if request.finish_reason is not None:
            return
        if self.pages.needed(request.longest) > self.pages.count - 1:
            raise UserError(
                f"a request of {request.longest} positions does not fit the KV pool of "
                f"{(self.pages.count - 1) * self.pages.page_size}: raise the pool's bytes, or lower max_tokens"
            )
        if request.goal == 0:  # the score of a single token: there is nothing to compute
            request.finish_reason = "length"
            self.counts.finished += 1
            return
        request.number = self._arrived
        self._arrived += 1
        self.waiting.push(request)

    def cancel(self, request: Request) -> None:
        """Takes a request out, whatever its state."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            self.counts.cancelled += 1
            self.waiting.discard(request)
            self._held.pop(request, None)
            if request in self.running:
                self._leave(request)
            self.waiting.end(request)

    # ------------------------------------------------------------------------------------------------------- plans

    def schedule(self, max_steps: int | None = None) -> Plan | None:
        """The next batch, or None if there is nothing to do. max_steps: fewer device steps than usual."""
        self._make_way()
        chunks: list[Chunk] = []
        left = self.budget
        for request in self._in_turn():
            if left and request in self.running and self._room(request):  # not if somebody before it took its place
                chunks.append(self._chunk(request, left))
                left -= chunks[-1].count
        self._let_go()
        while left and (new := self._admit()) is not None:
            chunks.append(self._chunk(new, left))
            left -= chunks[-1].count
        if not chunks:
            return None
        size = self._size(self.budget - left, len(chunks))
        steps = self._steps(size, chunks, min(max_steps or self.max_steps, self.max_steps))
        moves, self.pages.moves = tuple(self.pages.moves), []
        return Plan(size, tuple(chunks), steps, moves)

    def _in_turn(self) -> list[Request]:
        """Those who lack one token, then the others; each the most urgent first, then in order of arrival."""
        return sorted(self.running, key=lambda r: (r.goal - r.computed > 1, r.priority, r.number))

    def _chunk(self, request: Request, left: int) -> Chunk:
        count = min(request.goal - request.computed, left)
        reaches = request.computed + count == request.goal
        return Chunk(request, request.computed, count, reaches and request.sampling.max_tokens > 0)

    def _size(self, rows: int, sequences: int) -> Size:
        return next(size for size in self.sizes if size.rows >= rows and size.sequences >= sequences)

    def _steps(self, size: Size, chunks: list[Chunk], most: int) -> int:
        """More than one only if all go on for as long, one row each is what the shape is for, and there are pages."""
        if len(chunks) < len(self.running) or not all(chunk.samples for chunk in chunks):
            return 1
        if size != self._size(len(chunks), len(chunks)):
            return 1
        requests = [chunk.request for chunk in chunks]
        steps = min(most, *(r.sampling.max_tokens - r.made for r in requests))

        def more(steps: int) -> int:
            return sum(max(self.pages.needed(r.goal + steps - 1) - len(r.pages), 0) for r in requests)

        while steps > 1 and more(steps) > self.pages.free:
            steps -= 1
        for request in requests:
            self.pages.extend(request, request.goal + steps - 1)
        return steps

    # ------------------------------------------------------------------------------------------------ in and out

    def _room(self, request: Request) -> bool:
        """Pages for all its tokens, others' if need be; False if the request itself had to leave."""
        while not self.pages.extend(request, request.goal):
            victim = self.preemption.victim(self.running, None)
            assert victim is not None
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _make_way(self) -> None:
        """Those who run leave for somebody more urgent who finds no room."""
        while (request := self.waiting.head()) is not None:
            seat = len(self.running) < self.max_sequences
            if seat and (self._owner(request) is not None or self._fits(request)):
                return
            if (victim := self.preemption.victim(self.running, request)) is None:
                return
            self._preempt(victim)

    def _fits(self, request: Request) -> bool:
        wanted, spare = self._wanted(request)
        return self.pages.fits(self.pages.match(request, self._root), wanted, spare)

    def _wanted(self, request: Request) -> tuple[int, int]:
        known, longest = self.pages.needed(request.goal), self.pages.needed(request.longest)
        return self.admission.pages(known, longest, self.pages.count, len(self.running))

    def _admit(self) -> Request | None:
        """Lets the next request in, if there is room. Who waits for another's pages is passed over."""
        while len(self.running) < self.max_sequences and (request := self.waiting.head()) is not None:
            if (owner := self._owner(request)) is not None:
                if len(self._held) >= self.max_sequences:
                    return None
                self.waiting.discard(request)
                self._held[request] = owner
                continue
            match = self.pages.match(request, self._root)
            if not self.pages.begin(request, self._root, match, *self._wanted(request)):
                return None
            self.waiting.discard(request)
            self.running.append(request)
            request.version = self._version if request.computed else None
            self.counts.reused += request.computed
            return request
        return None

    def _owner(self, request: Request) -> Request | None:
        """Who computes what the request is about to need too, and shall have from it."""
        leader = request.leader
        if leader is not None and leader in self.running and leader.computed < leader.prompt_tokens:
            return leader
        return self.pages.match(request, self._root).computing

    def _let_go(self) -> None:
        """Back to the queue with those who need not wait any longer for another's pages."""
        for held, owner in list(self._held.items()):
            if self._owner(held) is not owner:
                del self._held[held]
                self.waiting.push(held)

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self.counts.preempted += 1
        self.waiting.push(request)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.pages.end(request, self._root if request.version == self._version else None)
        request.version = None

    # ----------------------------------------------------------------------------------------------------- results

    def advance(self, plan: Plan, made: Sequence[Sequence[Made]], version: int) -> list[Request]:
        """Takes the result of a plan; returns the requests that finished.

        made: [steps that ran][chunk], looked at for chunks that sample. version: of the weights.
        """
        self.publish(version)
        done = []
        for n, chunk in enumerate(plan.chunks):
            request = chunk.request
            if request.finish_reason is not None or not request.pages:
                continue
            computed, tokens = request.computed, request.made
            request.computed += chunk.count
            if chunk.samples:
                for step, each in enumerate(made):
                    request.computed += step > 0
                    request.take(each[n], version)
                    if request.finish_reason is not None:
                        break
            elif not request.sampling.max_tokens and request.computed == request.goal:
                request.finish_reason = "length"
            request.version = version if request.version in (None, version) else MIXED
            if request.version == version:
                self.pages.computed(request, self._root, computed)
            self.waiting.charge(request, request.computed - computed, request.made - tokens)
            self.counts.computed += request.computed - computed
            self.counts.made += request.made - tokens
            if request.finish_reason is not None:
                done.append(request)
        for request in done:
            self._leave(request)
            self.waiting.end(request)
        self.counts.finished += len(done)
        return done
