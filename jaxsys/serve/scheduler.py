"""What the next packed batch holds. Plain Python with no JAX in it.

There is no prefill and no decode: a request's computed tokens catch up with its tokens. Each step has a budget
of rows; requests that lack one token come first, so that long prompts, which take what rows are left, never
stall them (Sarathi-Serve, Agrawal et al. 2024). A request begins with pages for the tokens there are and gets more as
it grows; when there are none left somebody leaves the pool, waits, and comes back to as much of its keys and values
as is still there. Who that is, who comes first and who is let in, is decided by ``jaxsys.serve.policies``.

A plan is for one version of the weights.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from jaxsys.serve.pages import Move, Pages, root_of
from jaxsys.serve.policies import Admission, FirstComeFirstServed, LastCome, Ordering, Preemption, Watermark
from jaxsys.serve.request import Made, Request
from parallelism.errors import UserError

MIXED = -1  # the version of keys and values that different weights made
FILLED = 3 / 4  # of the largest budget: with fewer rows several steps with the smaller one take no longer

NewWeights = Literal["switch", "recompute", "finish", "restart"]
"""What a running request does when weights are published. ``switch``: it goes on with them, and with the keys and
values that it has (in-flight updates: PipelineRL, Piche et al. 2025). ``recompute``: it goes on with them once they
have computed its tokens anew. ``finish``: it ends with the weights that it began with, which are kept for it.
``restart``: it begins again at its prompt, so one that takes longer than the time between two updates is not answered
while they go on."""


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
    """One packed batch. chunks: of each replica. moves: of each replica's pages, to be done before it, in order.

    steps: how many tokens each sampling chunk may make before the host has to look. version: of the weights.
    """

    size: Size
    chunks: tuple[tuple[Chunk, ...], ...]
    steps: int
    moves: tuple[tuple[Move, ...], ...] = ()
    version: int = 0


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
    """Requests, waiting and running. One queue; each request runs on one of the replicas, which are in step.

    pages: of each replica. sizes: the shapes there are; max_steps: device steps of one plan. budget: rows of a replica
    in a plan at most, None is those of the largest shape. beside: the same of a plan in which somebody is given a token
    that is not their first, so that they wait for no long prompt of others (Agrawal et al. 2024, section 4), and of one
    that would not fill ``FILLED`` of the budget; None is those of the next smaller shape that holds as many sequences.
    new_weights: see ``NewWeights``.
    """

    def __init__(
        self,
        pages: Sequence[Pages],
        sizes: Sequence[Size],
        max_steps: int,
        *,
        budget: int | None = None,
        beside: int | None = None,
        ordering: Ordering | None = None,
        admission: Admission | None = None,
        preemption: Preemption | None = None,
        new_weights: NewWeights = "switch",
    ):
        self.pages, self.sizes, self.max_steps = tuple(pages), sorted(sizes), max_steps
        self.waiting: Ordering = FirstComeFirstServed() if ordering is None else ordering
        self.admission: Admission = Watermark() if admission is None else admission
        self.preemption: Preemption = LastCome() if preemption is None else preemption
        self.counts = Counts()
        most = max(size.rows for size in sizes)
        # What runs together must fit every shape that its rows can call for.
        self.max_sequences = max(sizes, key=lambda size: size.rows).sequences
        self.budget = min(budget or most, most)
        holding = sorted(size.rows for size in sizes if size.rows > size.sequences >= self.max_sequences)
        self.beside = min(beside or [*holding, most][max(len(holding) - 2, 0)], self.budget)
        if self.beside < self.max_sequences:
            raise ValueError(f"a budget of {self.beside} rows for {self.max_sequences} sequences would stall some")
        self._running: tuple[list[Request], ...] = tuple([] for _ in self.pages)
        self._held: dict[Request, Request] = {}  # who waits for what another computes, and for whom
        self.new_weights = new_weights
        self._version = 0
        self._bound: Counter[int] = (
            Counter()
        )  # under ``finish``: requests that began with a version and are not finished
        self._turns: dict[int, int] = {}  # plans before the last one for a version
        self._arrived = self._planned = 0

    @property
    def busy(self) -> bool:
        return bool(any(self._running) or self._held or len(self.waiting))

    @property
    def running(self) -> list[Request]:
        """Requests that have pages."""
        return [request for running in self._running for request in running]

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting) + len(self._held)

    @property
    def versions(self) -> frozenset[int]:
        """Versions of the weights that requests are bound to."""
        return frozenset(self._bound)

    def publish(self, version: int) -> None:
        """There are new weights. Keys and values of others are not used for requests that begin from now on."""
        if version == self._version:
            return
        before, self._version = self._version, version
        self._forget(before)
        if self.new_weights in ("recompute", "restart"):
            for request in self.running:
                request.undone += 1
                self._preempt(request)

    def _forget(self, version: int) -> None:
        """Nothing that was computed with a version will be asked for, unless a request is bound to it."""
        if version != self._version and version not in self._bound:
            self._turns.pop(version, None)
            for pages in self.pages:
                pages.forget(root_of(version))

    def _version_of(self, request: Request) -> int:
        """Of the weights that it is to be computed with."""
        return self._version if request.bound is None else request.bound

    def _root(self, request: Request) -> bytes:
        return root_of(self._version_of(request))

    def add(self, request: Request) -> None:
        """Queues a request, unless it was cancelled before. Raises UserError if it could never run."""
        if request.finish_reason is not None:
            return
        pages = self.pages[0]  # all are alike
        if pages.needed(request.longest) > pages.count - 1:
            raise UserError(
                f"a request of {request.longest} positions does not fit the KV pool of "
                f"{(pages.count - 1) * pages.page_size}: raise the pool's bytes, or lower max_tokens"
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
            if request.pages:
                self._leave(request)
            self._end(request)

    def evict(self) -> None:
        """Nobody has pages any more, and nothing that was computed is known. Between plans."""
        for request in self.running:
            self._preempt(request)
        for version in {self._version, *self._bound}:
            for pages in self.pages:
                pages.forget(root_of(version))
        for pages in self.pages:
            pages.moves = []

    # ------------------------------------------------------------------------------------------------------- plans

    def schedule(self, max_steps: int | None = None) -> Plan | None:
        """The next batch, or None if there is nothing to do. max_steps: fewer device steps than usual."""
        self._make_way()
        for version in self._candidates():
            if (plan := self._plan(version, max_steps)) is not None:
                self._planned += 1
                self._turns[version] = self._planned
                return plan
        return None

    def _candidates(self) -> list[int]:
        """Versions of which there may be something to do, the one first that has waited longest."""
        if not self._bound:
            return [self._version]
        head = self.waiting.head()
        present = {self._version_of(r) for r in (*self.running, *([head] if head is not None else []))}
        return sorted(present | {self._version}, key=lambda version: self._turns.get(version, -1))

    def _plan(self, version: int, max_steps: int | None) -> Plan | None:
        plan: list[list[Chunk]] = [[] for _ in self.pages]
        goes_on = any(r.made and self._version_of(r) == version for r in self.running)
        budget = self.beside if goes_on else self.budget
        left = [budget] * len(self.pages)

        def take(request: Request) -> None:
            chunk = self._chunk(request, left[request.replica])
            plan[request.replica].append(chunk)
            left[request.replica] -= chunk.count

        for n, running in enumerate(self._running):
            for request in self._in_turn(running):
                if self._version_of(request) != version:
                    continue
                if left[n] and request in running and self._room(request):  # not if somebody before it took its place
                    take(request)
        self._let_go()
        while (new := self._admit(version, left)) is not None:
            take(new)
        if not any(plan):
            return None
        rows = budget - min(left)
        if self.beside < rows <= FILLED * budget:
            rows, plan = self.beside, [_first_rows(chunks, self.beside) for chunks in plan]
        size = self._size(rows, max(map(len, plan)))
        most = min(max_steps or self.max_steps, self.max_steps)
        # Whoever waits for rows alone comes with the next plan.
        steps = 1 if len(self.waiting) and not all(left) else self._steps(version, size, plan, most)
        moves = tuple(tuple(pages.moves) for pages in self.pages)
        for pages in self.pages:
            pages.moves = []
        return Plan(size, tuple(map(tuple, plan)), steps, moves, version)

    def _in_turn(self, running: list[Request]) -> list[Request]:
        """Those who lack one token, then the others; each the most urgent first, then in order of arrival."""
        return sorted(running, key=lambda r: (r.goal - r.computed > 1, r.priority, r.number))

    def _chunk(self, request: Request, left: int) -> Chunk:
        count = min(request.goal - request.computed, left)
        reaches = request.computed + count == request.goal
        return Chunk(request, request.computed, count, reaches and request.sampling.max_tokens > 0)

    def _size(self, rows: int, sequences: int) -> Size:
        return next(size for size in self.sizes if size.rows >= rows and size.sequences >= sequences)

    def _steps(self, version: int, size: Size, plan: list[list[Chunk]], most: int) -> int:
        """More than one only if all go on for as long, one row each is what the shape is for, and there are pages."""
        for chunks, running in zip(plan, self._running, strict=True):
            wanted = sum(self._version_of(request) == version for request in running)
            if len(chunks) < wanted or not all(chunk.samples for chunk in chunks):
                return 1
        widest = max(map(len, plan))
        if size != self._size(widest, widest):
            return 1
        requests = [chunk.request for chunks in plan for chunk in chunks]
        steps = min(most, *(r.sampling.max_tokens - r.made for r in requests))

        def fits(steps: int) -> bool:
            return all(
                sum(max(pages.needed(c.request.goal + steps - 1) - len(c.request.pages), 0) for c in chunks)
                <= pages.free
                for chunks, pages in zip(plan, self.pages, strict=True)
            )

        while steps > 1 and not fits(steps):
            steps -= 1
        for request in requests:
            self.pages[request.replica].extend(request, request.goal + steps - 1)
        return steps

    # ------------------------------------------------------------------------------------------------ in and out

    def _room(self, request: Request) -> bool:
        """Pages for all its tokens, others' if need be; False if the request itself had to leave."""
        while not self.pages[request.replica].extend(request, request.goal):
            victim = self.preemption.victim(self._running[request.replica], None)
            assert victim is not None
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _make_way(self) -> None:
        """Those who run leave for somebody more urgent who finds no room."""
        while (request := self.waiting.head()) is not None:
            free = [n for n, running in enumerate(self._running) if len(running) < self.max_sequences]
            if free and (self._owner(request) is not None or any(self._fits(request, n) for n in free)):
                return
            if (victim := self.preemption.victim(self.running, request)) is None:
                return
            self._preempt(victim)

    def _fits(self, request: Request, replica: int) -> bool:
        pages = self.pages[replica]
        return pages.fits(pages.match(request, self._root(request)), *self._wanted(request, replica))

    def _wanted(self, request: Request, replica: int) -> tuple[int, int]:
        pages = self.pages[replica]
        known, longest = pages.needed(request.goal), pages.needed(request.longest)
        return self.admission.pages(known, longest, pages.count, len(self._running[replica]))

    def _admit(self, version: int, left: list[int]) -> Request | None:
        """Lets the next request in, if there is room and it is one for this version. Who waits for another's pages is
        passed over.

        It goes where most of it is there already, or else where most is free. left: rows of each replica.
        """
        while (request := self.waiting.head()) is not None and self._version_of(request) == version:
            if self.new_weights == "restart" and request.versions and request.versions[0] != version:
                request.restart()
            open = [n for n, running in enumerate(self._running) if left[n] and len(running) < self.max_sequences]
            if not open:
                return None
            if (owner := self._owner(request)) is not None:
                if len(self._held) >= self.max_sequences * len(self.pages):
                    return None
                self.waiting.discard(request)
                self._held[request] = owner
                continue
            root = self._root(request)
            matches = {n: self.pages[n].match(request, root) for n in open}
            open.sort(key=lambda n: (-matches[n].reach(self.pages[n].page_size), -self.pages[n].free))
            for n in open:
                if self.pages[n].begin(request, root, matches[n], *self._wanted(request, n)):
                    self._begin(request, n)
                    return request
            return None
        return None

    def _begin(self, request: Request, replica: int) -> None:
        self.waiting.discard(request)
        request.replica = replica
        self._running[replica].append(request)
        if self.new_weights == "finish" and request.bound is None:
            request.bound = self._version
            self._bound[request.bound] += 1
        request.version = self._version_of(request) if request.computed else None
        self.counts.reused += request.computed

    def _owner(self, request: Request) -> Request | None:
        """Who computes what the request is about to need too, and shall have from it."""
        leader = request.leader
        if leader is not None and leader.pages and leader.computed < leader.prompt_tokens:
            return leader
        matches = [pages.match(request, self._root(request)) for pages in self.pages]
        return max(matches, key=lambda match: (len(match.full), match.computing is not None)).computing

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
        self._running[request.replica].remove(request)
        known = request.version == self._version_of(request)
        self.pages[request.replica].end(request, self._root(request) if known else None)
        request.version = None

    def _end(self, request: Request) -> None:
        """The request is finished."""
        self.waiting.end(request)
        if request.bound is not None:
            self._bound[request.bound] -= 1
            self._bound += Counter()  # without those that nobody is bound to
            self._forget(request.bound)

    # ----------------------------------------------------------------------------------------------------- results

    def advance(self, plan: Plan, made: Sequence[Sequence[Sequence[Made]]]) -> list[Request]:
        """Takes the result of a plan; returns the requests that finished.

        made: [steps that ran][replica][chunk], looked at for chunks that sample.
        """
        version = plan.version
        done = []
        for r, n, chunk in [(r, n, chunk) for r, chunks in enumerate(plan.chunks) for n, chunk in enumerate(chunks)]:
            request = chunk.request
            if request.finish_reason is not None or not request.pages:
                continue
            computed, tokens = request.computed, request.made
            request.computed += chunk.count
            if chunk.samples:
                for step, each in enumerate(made):
                    request.computed += step > 0
                    request.take(each[r][n], version)
                    if request.finish_reason is not None:
                        break
            elif not request.sampling.max_tokens and request.computed == request.goal:
                request.finish_reason = "length"
            request.version = version if request.version in (None, version) else MIXED
            if request.version == version == self._version_of(request):
                self.pages[r].computed(request, root_of(version), computed)
            self.waiting.charge(request, request.computed - computed, request.made - tokens)
            self.counts.computed += request.computed - computed
            self.counts.made += request.made - tokens
            if request.finish_reason is not None:
                done.append(request)
        for request in done:
            self._leave(request)
            self._end(request)
        self.counts.finished += len(done)
        return done


def _first_rows(chunks: Sequence[Chunk], rows: int) -> list[Chunk]:
    """What of the chunks fits so many rows."""
    kept: list[Chunk] = []
    for chunk in chunks:
        if chunk.count > rows:
            return [*kept, dataclasses.replace(chunk, count=rows, samples=False)] if rows else kept
        kept.append(chunk)
        rows -= chunk.count
    return kept
