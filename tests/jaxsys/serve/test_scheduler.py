"""The scheduler alone, with an executor that makes tokens up."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsys.serve.scheduler
from jaxsys.serve.pages import PageAllocator
from jaxsys.serve.request import Request, Sampling
from jaxsys.serve.scheduler import Scheduler, Size
from parallelism.errors import UserError

SIZES = (Size(1, 1), Size(4, 4), Size(16, 4, queries=4))


def request(prompt, max_tokens, stop=(), score=False):
    return Request(prompt, list(range(prompt)), Sampling(max_tokens, stop=tuple(stop)), 0, score)


def scheduler(pages=40, page_size=8, max_steps=8):
    return Scheduler(PageAllocator(pages, page_size), SIZES, max_steps)


def execute(s, plan):
    """Each token is the number of tokens before it; like the device, it comes back early at a stop token."""
    tokens = []
    for step in range(plan.steps):
        row = [len(c.request.tokens) + step if c.samples else 0 for c in plan.chunks]
        tokens.append(row)
        if any(c.samples and t in c.request.sampling.stop for c, t in zip(plan.chunks, row, strict=True)):
            break
    return s.advance(plan, tokens, [[0.0] * len(row) for row in tokens], version=7)


def chunks(plan):
    return [(c.start, c.count, c.samples) for c in plan.chunks]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    s = scheduler()
    s.add(request(40, 2))
    seen = []
    while s.busy:
        plan = s.schedule()
        seen.append(chunks(plan))
        execute(s, plan)
    assert seen == [[(0, 16, False)], [(16, 16, False)], [(32, 8, True)], [(40, 1, True)]]


def test_decodes_go_before_prefills_and_are_never_stalled():
    s = scheduler()
    first, long = request(3, 20), request(40, 1)
    s.add(first)
    execute(s, s.schedule())
    s.add(long)
    for _ in range(3):
        plan = s.schedule()
        assert plan.chunks[0].request is first
        assert chunks(plan)[0][1:] == (1, True)
        assert plan.chunks[1].request is long
        execute(s, plan)
    assert first.made == 4


@pytest.mark.parametrize(("rows", "size"), [(1, SIZES[0]), (2, SIZES[1]), (4, SIZES[1]), (5, SIZES[2])])
def test_the_smallest_shape_that_fits_is_taken(rows, size):
    s = scheduler()
    s.add(request(rows, 1))
    assert s.schedule().size == size


def test_steps_run_until_the_first_request_needs_the_host():
    s = scheduler()
    requests = [request(1, 12), request(1, 4)]
    for r in requests:
        s.add(r)
    plan = s.schedule()
    assert plan.steps == 4
    assert execute(s, plan) == [requests[1]]
    assert s.schedule().steps == 8


def test_one_step_while_a_prompt_is_unfinished():
    s = scheduler()
    s.add(request(1, 8))
    s.add(request(20, 8))
    assert s.schedule().steps == 1


def test_one_step_where_the_next_fits_a_smaller_shape():
    s = scheduler()
    s.add(request(4, 8))
    plan = s.schedule()
    assert (plan.size, plan.steps) == (SIZES[1], 1)


def test_fewer_steps_can_be_asked_for():
    s = scheduler()
    s.add(request(1, 8))
    assert s.schedule(3).steps == 3


def test_a_request_waits_until_its_pages_are_free_and_keeps_its_turn():
    s = scheduler(pages=5, page_size=8)
    a, b, c = request(1, 24), request(1, 24), request(1, 1)
    for r in (a, b, c):
        s.add(r)
    execute(s, s.schedule())
    assert s.running == [a]
    assert list(s.waiting) == [b, c]
    while s.busy:
        execute(s, s.schedule())
    assert [r.finish_reason for r in (a, b, c)] == ["length"] * 3


def test_a_request_larger_than_the_pool_is_refused():
    with pytest.raises(UserError, match="does not fit the KV pool of 24"):
        scheduler(pages=4, page_size=8).add(request(20, 10))


def test_a_score_computes_all_but_the_last_token():
    s = scheduler()
    r = request(6, 0, score=True)
    s.add(r)
    plan = s.schedule()
    assert chunks(plan) == [(0, 5, False)]
    assert execute(s, plan) == [r]
    assert (r.made, r.finish_reason) == (0, "length")


def test_the_score_of_one_token_needs_no_step():
    s = scheduler()
    r = request(1, 0, score=True)
    s.add(r)
    assert r.finish_reason == "length"
    assert not s.busy


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_cancelled_request_leaves_nothing(when):
    s = scheduler()
    r = request(20, 8)
    s.add(r)
    if when == "running":
        execute(s, s.schedule())
    s.cancel(r)
    assert (r.finish_reason, s.busy, s.pages.used) == ("cancelled", False, 0)
    assert s.schedule() is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_mix_finishes_as_each_request_alone_and_gives_back_every_page(data):
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(1, 60), st.integers(0, 30), st.lists(st.integers(0, 90), max_size=2)), max_size=12
        )
    )
    s = scheduler(pages=data.draw(st.integers(13, 60)), max_steps=data.draw(st.integers(1, 9)))
    requests = [request(p, m, stop) for p, m, stop in shapes]
    arriving = list(requests)
    for _ in range(10_000):
        while arriving and data.draw(st.booleans(), label="arrives"):
            s.add(arriving.pop(0))
        plan = s.schedule()
        if plan is None and not arriving:
            break
        if plan is None:
            continue
        assert sum(c.count for c in plan.chunks) <= plan.size.rows
        assert len(plan.chunks) <= plan.size.sequences
        assert sum(-(-c.count // plan.size.queries) for c in plan.chunks) <= plan.size.items
        held = [page for r in s.running for page in r.pages]
        assert len(set(held)) == len(held) == s.pages.used
        for c in plan.chunks:
            assert c.start == c.request.computed
            assert c.start + c.count + plan.steps - 1 <= len(c.request.pages) * s.pages.page_size
        execute(s, plan)
    assert s.pages.used == 0
    for r, (prompt, most, stop) in zip(requests, shapes, strict=True):
        alone = []
        while len(alone) < most and not (alone and alone[-1] in stop):
            alone.append(prompt + len(alone))
        assert r.tokens[prompt:] == alone
        assert r.finish_reason == ("stop" if alone and alone[-1] in stop else "length")
        assert r.versions == [7] * len(alone)


def test_the_scheduler_knows_no_jax():
    for name in ("scheduler", "pages", "request"):
        tree = ast.parse((Path(jaxsys.serve.scheduler.__file__).parent / f"{name}.py").read_text())
        imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not [module for module in imported if module.startswith("jax.") or module == "jax"]
