"""What the next packed batch holds. Plain Python with no JAX in it.

There is no prefill and no decode: a request's computed tokens catch up with its tokens. Each step has a budget
of rows; requests that lack one token come first, so that long prompts, which take what rows are left, never
stall them (Sarathi-Serve, Agrawal et al. 2024). A request is admitted, first come first served, when the pool
has pages for all that it can come to need, so none is ever evicted.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from jaxsys.serve.pages import PageAllocator
from jaxsys.serve.request import Request
from parallelism.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``start + count - 1`` of a request; ``samples`` if the last gives it a new token."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One packed batch. steps: how many tokens each sampling chunk may make before the host has to look."""

    size: Size
    chunks: tuple[Chunk, ...]
    steps: int


class Scheduler:
    """Requests, waiting and running, of one replica.

    sizes: the shapes there are; max_steps: device steps of one plan.
    """

    def __init__(self, pages: PageAllocator, sizes: Sequence[Size], max_steps: int):
        self.pages, self.sizes, self.max_steps = pages, sorted(sizes), max_steps
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.max_rows = max(size.rows for size in sizes)
        # What runs together must fit every shape that its rows can call for.
        self.max_sequences = max(sizes, key=lambda size: size.rows).sequences

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request. Raises UserError if it could never run."""
        if self.pages.needed(request.longest) > self.pages.count - 1:
            raise UserError(
                f"a request of {request.longest} positions does not fit the KV pool of "
                f"{(self.pages.count - 1) * self.pages.page_size}: raise the pool's bytes, or lower max_tokens"
            )
        if request.goal == 0:  # the score of a single token: there is nothing to compute
            request.finish_reason = "length"
            return
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Takes a request out, whatever its state."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            if request in self.waiting:
                self.waiting.remove(request)
            self._retire()

    def schedule(self, max_steps: int | None = None) -> Plan | None:
        """The next batch, or None if there is nothing to do. max_steps: fewer device steps than usual."""
        while self.waiting and len(self.running) < self.max_sequences:
            pages = self.pages.allocate(self.pages.needed(self.waiting[0].longest))
            if pages is None:
                break
            request = self.waiting.popleft()
            request.pages = pages
            self.running.append(request)
        left, chunks = self.max_rows, []
        for request in sorted(self.running, key=lambda r: r.goal - r.computed > 1):  # stable: in order of arrival
            count = min(request.goal - request.computed, left)
            if count:
                reaches = request.computed + count == request.goal
                chunks.append(Chunk(request, request.computed, count, reaches and request.sampling.max_tokens > 0))
                left -= count
        if not chunks:
            return None
        size = self._size(sum(chunk.count for chunk in chunks), len(chunks))
        return Plan(size, tuple(chunks), self._steps(size, chunks, max_steps or self.max_steps))

    def _size(self, rows: int, sequences: int) -> Size:
        return next(size for size in self.sizes if size.rows >= rows and size.sequences >= sequences)

    def _steps(self, size: Size, chunks: list[Chunk], most: int) -> int:
        """More than one only if all go on for as long, and one row each is what the shape is for."""
        if len(chunks) < len(self.running) or not all(chunk.samples for chunk in chunks):
            return 1
        if size != self._size(len(chunks), len(chunks)):
            return 1
        return min(most, self.max_steps, *(c.request.sampling.max_tokens - c.request.made for c in chunks))

    def advance(
        self, plan: Plan, tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], version: int
    ) -> list[Request]:
        """Takes the result of a plan; returns the requests that finished.

        tokens, logprobs: [steps that ran][chunk], looked at for chunks that sample.
        """
        for n, chunk in enumerate(plan.chunks):
            request = chunk.request
            request.computed += chunk.count
            if request.finish_reason is None and chunk.samples:
                for step, (made, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
                    request.computed += step > 0
                    request.take(made[n], logprob[n], version)
                    if request.finish_reason is not None:
                        break
            elif request.finish_reason is None and not request.sampling.max_tokens and request.computed == request.goal:
                request.finish_reason = "length"
        return self._retire()

    def _retire(self) -> list[Request]:
        done = [request for request in self.running if request.finish_reason is not None]
        self.running = [request for request in self.running if request.finish_reason is None]
        for request in done:
            self.pages.release(request.pages)
            request.pages = []
        return done
