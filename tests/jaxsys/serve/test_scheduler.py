"""The scheduler alone, with an executor that makes tokens up."""

import ast
import dataclasses
from pathlib import Path

import pytest

import jaxsys.serve.scheduler
from jaxsys.serve.pages import Pages
from jaxsys.serve.policies import Reserve, Watermark
from jaxsys.serve.request import Made, Request
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Scheduler, Size
from parallelism.errors import UserError

SIZES = (Size(1, 1), Size(4, 4), Size(16, 4, queries=4))


def request(prompt, max_tokens, stop=(), score=False, **options):
    sampling = Sampling(max_tokens, stop=tuple(stop), prompt_logprobs=score)
    return Request(prompt, list(range(prompt)), sampling, 0, **options)


def scheduler(pages=40, page_size=8, max_steps=8, **options):
    return Scheduler([Pages(pages, page_size)], SIZES, max_steps, **options)


def execute(s, plan):
    """Each token is the number of tokens before it; like the device, it comes back early at a stop token."""
    tokens = []
    for step in range(plan.steps):
        row = [len(c.request.tokens) + step if c.samples else 0 for c in plan.chunks[0]]
        tokens.append(row)
        if any(c.samples and t in c.request.sampling.stop for c, t in zip(plan.chunks[0], row, strict=True)):
            break
    return s.advance(plan, [[[Made(token, 0.0) for token in row]] for row in tokens])


def chunks(plan):
    return [(c.start, c.count, c.samples) for c in plan.chunks[0]]


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
        assert plan.chunks[0][0].request is first
        assert chunks(plan)[0][1:] == (1, True)
        assert plan.chunks[0][1].request is long
        execute(s, plan)
    assert first.made == 4


def test_a_long_prompt_gets_the_largest_shape_until_somebody_goes_on_beside_it():
    large = Size(64, 4, queries=16)
    s = Scheduler([Pages(40, 8)], (*SIZES, large), 8)
    short, long, other = (Request(n, list(range(n, 2 * n)), Sampling(k), 0) for n, k in ((3, 20), (110, 1), (200, 1)))
    s.add(long)
    plan = s.schedule()
    assert plan.size == large and chunks(plan) == [(0, 64, False)]
    execute(s, plan)
    s.add(short)
    plan = s.schedule()
    assert chunks(plan) == [(64, 46, True), (0, 3, True)] and plan.size == large  # nobody waits for a second token
    execute(s, plan)
    s.add(other)
    plan = s.schedule()
    assert chunks(plan) == [(3, 1, True), (0, 15, False)] and plan.size == SIZES[2]


def test_the_largest_shape_is_left_where_it_would_not_be_filled():
    s = Scheduler([Pages(40, 8)], (*SIZES, Size(64, 4, queries=16)), 8)
    for rows in (10, 30, 8):
        s.add(Request(rows, list(range(rows, 2 * rows)), Sampling(1), 0))
    seen = []
    while s.busy:
        plan = s.schedule()
        seen.append((plan.size.rows, chunks(plan)))
        execute(s, plan)
    assert seen == [
        (16, [(0, 10, True), (0, 6, False)]),
        (16, [(6, 16, False)]),
        (16, [(22, 8, True), (0, 8, True)]),
    ]


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


def test_nobody_who_waits_for_rows_waits_for_more_than_a_step():
    s = Scheduler([Pages(40, 8)], SIZES[-1:], 8)
    rows = SIZES[-1].rows
    s.add(request(rows, 20))
    alone = Scheduler([Pages(40, 8)], SIZES[-1:], 8)
    alone.add(request(rows, 20))
    assert alone.schedule().steps == 8
    s.add(request(5, 20))
    assert s.schedule().steps == 1


def test_a_request_waits_until_its_pages_are_free_and_keeps_its_turn():
    s = scheduler(pages=5, page_size=8, admission=Reserve())
    a, b, c = request(1, 24), request(1, 24), request(1, 1)
    for r in (a, b, c):
        s.add(r)
    execute(s, s.schedule())
    assert s.running == [a]
    assert (s.waiting.head(), s.queued) == (b, 2)
    while s.busy:
        execute(s, s.schedule())
    assert [r.finish_reason for r in (a, b, c)] == ["length"] * 3
    assert s.counts.preempted == 0


def test_the_last_to_come_leaves_when_pages_run_out_and_comes_back():
    s = scheduler(pages=5, page_size=8, admission=Watermark(0))
    a, b = request(1, 24), request(2, 20)
    s.add(a)
    s.add(b)
    left = []
    while s.busy:
        execute(s, s.schedule())
        if s.queued:
            left.append((s.waiting.head(), a.finish_reason))
    assert set(left) <= {(b, None), (b, "length")}
    assert s.counts.preempted == 1
    assert s.counts.reused > 0  # what it had computed was still there
    assert [r.tokens[r.prompt_tokens :] for r in (a, b)] == [list(range(1, 25)), list(range(2, 22))]


def test_somebody_more_urgent_takes_the_place_of_the_least_urgent():
    s = scheduler()
    running = [request(2, 20, priority=p) for p in (1, 2, 1, 2)]
    for r in running:
        s.add(r)
    execute(s, s.schedule())
    urgent, equal = request(3, 4, priority=0), request(3, 4, priority=2)
    s.add(equal)
    s.add(urgent)
    plan = s.schedule()
    assert {c.request for c in plan.chunks[0]} == {*running[:3], urgent}
    assert [r for r in (equal, running[3]) if r.pages] == []


def test_requests_with_the_same_beginning_compute_it_once():
    s = scheduler()
    prompts = [[*range(20), i] for i in range(3)]
    requests = [Request(21, prompt, Sampling(2), 0) for prompt in prompts]
    for r in requests:
        s.add(r)
    while s.busy:
        execute(s, s.schedule())
    # The others begin when the first two pages are there.
    assert (s.counts.reused, s.counts.computed) == (2 * 16, 21 + 1 + 2 * (5 + 1))


def test_siblings_wait_for_the_prompt_and_share_it_even_within_a_page():
    s = scheduler()
    first = request(5, 2)
    rest = [dataclasses.replace(request(5, 2), leader=first) for _ in range(2)]
    for r in (first, *rest):
        s.add(r)
    assert [c.request for c in s.schedule().chunks[0]] == [first]
    while s.busy:
        plan = s.schedule()
        execute(s, plan)
    assert s.counts.reused == 2 * 4


def test_a_conversation_goes_on_from_what_was_computed():
    s = scheduler()
    first = request(21, 6)
    s.add(first)
    while s.busy:
        execute(s, s.schedule())
    turn = [*first.tokens, 90, 91]
    s.add(Request(len(turn), turn, Sampling(1), 0))
    plan = s.schedule()
    assert chunks(plan) == [(26, 3, True)]  # the last token that was made has no keys and values yet
    assert [m.kind for m in plan.moves[0]] == ["copy"]


def test_other_weights_use_nothing_of_what_was_computed():
    s = scheduler()
    for version in (7, 8):
        s.publish(version)
        s.add(request(20, 1))
        plan = s.schedule()
        assert chunks(plan) == [(0, 16, False)]
        s.advance(plan, [[[Made(0, 0.0)]]])
        s.advance(s.schedule(), [[[Made(0, 0.0)]]])
    assert s.counts.reused == 0


def test_what_different_weights_computed_is_used_by_nobody_else():
    s = scheduler()
    s.add(request(20, 1))
    s.advance(s.schedule(), [[[Made(0, 0.0)]]])
    s.publish(1)
    s.advance(s.schedule(), [[[Made(0, 0.0)]]])
    s.add(request(20, 1))
    assert chunks(s.schedule()) == [(0, 16, False)]


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
    assert (r.finish_reason, s.busy, s.pages[0].used) == ("cancelled", False, 0)
    assert s.schedule() is None


def test_the_scheduler_knows_no_jax():
    for name in ("scheduler", "pages", "policies", "request", "simulate"):
        tree = ast.parse((Path(jaxsys.serve.scheduler.__file__).parent / f"{name}.py").read_text())
        imported = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        imported += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not [module for module in imported if module.startswith("jax.") or module == "jax"]
