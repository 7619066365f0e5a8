"""Random mixes of requests through the scheduler, its tokens against each request alone."""

import random

import pytest

from jaxsys.serve.pages import Pages
from jaxsys.serve.policies import FairShare, FirstComeFirstServed, Reserve, Watermark
from jaxsys.serve.request import Request
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Scheduler, Size
from jaxsys.serve.simulate import SimulatedExecutor, serve

SIZES = (Size(1, 1), Size(4, 4), Size(16, 4, queries=4))
VOCABULARY = 50


class Checked(SimulatedExecutor):
    """Holds every plan to what the devices can do."""

    def __init__(self, scheduler):
        super().__init__(scheduler.pages[0].page_size, VOCABULARY)
        self.scheduler = scheduler

    def run(self, plan):
        assert any(plan.chunks)
        for replica, (chunks, pages) in enumerate(zip(plan.chunks, self.scheduler.pages, strict=True)):
            self.check(plan, chunks, pages, [r for r in self.scheduler.running if r.replica == replica])
        return super().run(plan)

    def check(self, plan, chunks, pages, running):
        size = plan.size
        assert sum(c.count for c in chunks) <= size.rows
        assert len(chunks) <= size.sequences
        assert sum(-(-c.count // size.queries) for c in chunks) <= size.items
        assert len({page for r in running for page in r.pages}) == pages.used
        for c in chunks:
            assert c.start == c.request.computed
            reach = c.start + c.count + plan.steps - 1
            assert reach <= len(c.request.pages) * pages.page_size
            # What is written belongs to nobody else.
            written = set(c.request.pages[c.start // pages.page_size : -(-reach // pages.page_size)])
            assert not written & {page for r in running if r is not c.request for page in r.pages}
        lacking_one = [r for r in running if r.goal - r.computed == 1 and r.bound in (None, plan.version)]
        assert {c.request for c in chunks} >= set(lacking_one)  # nobody who makes tokens is stalled


def mixed(draw):
    """Requests with common beginnings, siblings, priorities, clients; when they come, and when some are cancelled."""
    requests = []
    for _ in range(draw.randrange(1, 40)):
        if requests and draw.random() < 0.2:
            first = requests[-1]
            prompt, sampling, leader = first.tokens[: first.prompt_tokens], first.sampling, first
        else:
            prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
            sampling = Sampling(draw.randrange(20), stop=tuple(draw.sample(range(VOCABULARY), 2)))
            leader = None
        client, priority = draw.choice("abc"), draw.choice([0, 0, 0, 1])
        requests.append(
            Request(len(prompt), list(prompt), sampling, 0, client=client, priority=priority, leader=leader)
        )
    arrivals = [(draw.random() * 0.3, request) for request in requests]
    cancels = [(at + draw.random() * 0.3, request) for at, request in arrivals if draw.random() < 0.1]
    return arrivals, cancels


def some_scheduler(draw, **options):
    size = draw.choice([1, 2, 4, 8])
    count, slots = -(-60 // size) + 1 + draw.randrange(20), draw.choice([0, 0, 1, 3, 30])
    return Scheduler(
        [Pages(count, size, slots) for _ in range(draw.choice([1, 1, 2, 3]))],
        SIZES,
        draw.choice([1, 4, 8]),
        ordering=draw.choice([FirstComeFirstServed, FairShare])(),
        admission=draw.choice([Watermark(), Watermark(0), Reserve()]),
        **options,
    )


def alone(request, version=0):
    """The tokens and the reason of its end of a request that nobody is beside, by one version of the weights."""
    copy = Request(request.prompt_tokens, request.tokens[: request.prompt_tokens], request.sampling, 0)
    scheduler = Scheduler([Pages(62, 1)], SIZES[:1], 1)
    scheduler.publish(version)
    serve(scheduler, SimulatedExecutor(1, VOCABULARY), [(0.0, copy)])
    return copy.tokens, copy.finish_reason


# 50 mixes of 20 requests on average, with tiny pools.
@pytest.mark.parametrize("seed", range(50))
def test_every_request_of_a_mix_ends_as_it_does_alone_and_every_page_comes_back(seed):
    draw = random.Random(seed)
    scheduler = some_scheduler(draw)
    arrivals, cancels = mixed(draw)
    serve(scheduler, Checked(scheduler), arrivals, cancels)
    assert (scheduler.queued, {(pages.used, pages.free - pages.count) for pages in scheduler.pages}) == (0, {(0, -1)})
    cancelled = [request for _, request in arrivals if request.finish_reason == "cancelled"]
    assert (scheduler.counts.cancelled, scheduler.counts.finished) == (len(cancelled), len(arrivals) - len(cancelled))
    for _, request in arrivals:
        tokens, reason = alone(request)
        if request.finish_reason == "cancelled":
            assert request.tokens == tokens[: len(request.tokens)]
        else:
            assert (request.tokens, request.finish_reason) == (tokens, reason)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50, 1050))
def test_a_thousand_mixes(seed):
    test_every_request_of_a_mix_ends_as_it_does_alone_and_every_page_comes_back(seed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("policy", ["switch", "recompute", "finish", "restart"])
def test_weights_that_change_meanwhile_lose_no_request_and_no_page(seed, policy):
    draw = random.Random(seed)
    scheduler = some_scheduler(draw, new_weights=policy)
    arrivals, _ = mixed(draw)
    serve(scheduler, Checked(scheduler), arrivals, publishes=[i * 0.02 for i in range(30)])
    assert (scheduler.queued, {pages.used for pages in scheduler.pages}) == (0, {0})
    assert not scheduler.versions
    for _, request in arrivals:
        assert request.finish_reason in ("stop", "length")
        assert len(request.versions) == request.made
        assert request.versions == sorted(request.versions)
        if policy in ("finish", "restart"):
            assert len(set(request.versions)) <= 1
            assert request.tokens == alone(request, *request.versions[:1])[0]
        if policy == "recompute":
            for end, version in enumerate(request.versions, request.prompt_tokens):
                values = [hash((version, at, token)) for at, token in enumerate(request.tokens[:end])]
                assert request.tokens[end] == hash((version, *values)) % VOCABULARY
    if policy in ("switch", "recompute"):
        assert any(len(set(request.versions)) > 1 for _, request in arrivals)


def test_versions_that_requests_are_bound_to_take_turns():
    scheduler = Scheduler([Pages(62, 8)], SIZES, 1, new_weights="finish")
    requests = [Request(1, [i], Sampling(20), 0) for i in range(3)]
    executor, seen = Checked(scheduler), []
    for version, request in enumerate(requests):
        scheduler.publish(version)
        scheduler.add(request)
        plan = scheduler.schedule()
        scheduler.advance(plan, executor.run(plan))
    for _ in range(9):
        plan = scheduler.schedule()
        seen.append(plan.version)
        scheduler.advance(plan, executor.run(plan))
    assert sorted(seen[:3]) == [0, 1, 2] and seen[3:] == seen[:3] * 2
    assert scheduler.versions == {0, 1, 2}
    for request in requests:
        scheduler.cancel(request)
    assert not scheduler.versions


@pytest.mark.parametrize("kind", ["copy", "out", "in"])
def test_a_page_that_is_not_moved_changes_tokens(kind):
    """The oracle sees what it is there for."""

    class Forgetful(Checked):
        def _move(self, replica, move):
            if move.kind == kind:
                self._device.setdefault((replica, move.target), {})
                self._host.setdefault((replica, move.target), {})
            else:
                super()._move(replica, move)

    wrong = 0
    for seed in range(20):
        draw = random.Random(seed)
        scheduler = some_scheduler(draw)
        arrivals, _ = mixed(draw)
        serve(scheduler, Forgetful(scheduler), arrivals)
        wrong += any(alone(request)[0] != request.tokens for _, request in arrivals)
    assert wrong > 0


def test_replicas_share_the_work_and_a_conversation_stays_where_it_was():
    pages = [Pages(60, 8) for _ in range(3)]
    scheduler = Scheduler(pages, SIZES, 4)
    executor = Checked(scheduler)
    first = [Request(20, [i] * 20, Sampling(8), 0) for i in range(6)]
    serve(scheduler, executor, [(0.0, request) for request in first])
    where = [request.replica for request in first]
    assert sorted(where) == [0, 0, 1, 1, 2, 2]
    turns = [Request(len(r.tokens) + 1, [*r.tokens, 7], Sampling(2), 0) for r in reversed(first)]
    serve(scheduler, executor, [(executor.seconds, request) for request in turns])
    assert [request.replica for request in reversed(turns)] == where
    assert scheduler.counts.reused == sum(len(r.tokens) - 1 for r in first)
