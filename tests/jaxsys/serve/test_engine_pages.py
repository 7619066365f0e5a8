"""Pages that are shared, copied, pushed out and brought back: tokens stay those of each request alone, bit by bit."""

import dataclasses
import random

import pytest
from serve_engines import make_engine

from jaxsys.graphs import no_compiles
from jaxsys.serve.sampling import Sampling

SAMPLING = Sampling(max_tokens=12, temperature=0.7, seed=3)


@pytest.fixture(scope="module")
def cramped():
    """A pool of 11 usable pages of 8 positions, and as much again in host memory: two long requests do not fit."""
    page = 8 * (2 * 2 * 2 * 8 * 4 + 4)
    return make_engine(numerics="invariant", sizes=None, kv_bytes=12 * page, host_kv_bytes=11 * page, max_context=80)


@pytest.fixture(scope="module")
def alone():
    """What a request makes with nobody beside it, nothing to use again and room for all."""
    engine = make_engine(numerics="invariant", sizes=None, kv_bytes=1 << 20)
    known = {}

    def run(prompt, sampling=SAMPLING):
        if (tuple(prompt), sampling) not in known:
            engine.scheduler.publish(len(known) + 1)
            request = engine.make_request(prompt, sampling)
            engine.add(request)
            while request.finish_reason is None:
                engine.step()
            known[tuple(prompt), sampling] = request.tokens, request.logprobs
        return known[tuple(prompt), sampling]

    return run


def test_a_beginning_that_is_there_is_not_computed_again(cramped, alone):
    first = cramped.add_request(range(30), SAMPLING)
    cramped.run([first])
    before = dataclasses.replace(cramped.scheduler.counts)
    again = []
    for rest in ([], [1, 2], [*first.tokens[30:], 4]):
        again.append(cramped.add_request([*range(30), *rest], SAMPLING))
        cramped.run(again)
    # 29 and 30 tokens of the prompt, and all 41 that the first one computed.
    assert cramped.scheduler.counts.reused - before.reused == 29 + 30 + 41
    for request in (first, *again):
        assert (request.tokens, request.logprobs) == alone(request.tokens[: request.prompt_tokens])


def test_who_leaves_the_pool_comes_back_by_way_of_host_memory(cramped, alone):
    prompts = [[i] * 40 for i in range(5)]
    before = dataclasses.replace(cramped.scheduler.counts)
    with no_compiles("requests"):
        requests = [cramped.add_request(prompt, dataclasses.replace(SAMPLING, max_tokens=20)) for prompt in prompts]
        cramped.run(requests)
        again = [cramped.add_request([*prompt, 9], SAMPLING) for prompt in prompts]
        cramped.run(again)
    assert cramped.scheduler.counts.preempted > before.preempted
    assert cramped.scheduler.pages[0].hosted > 0
    for request in (*requests, *again):
        expected = alone(request.tokens[: request.prompt_tokens], request.sampling)
        assert (request.tokens, request.logprobs) == expected


def test_a_prompt_that_is_computed_twice_is_scored_once(cramped, alone):
    sampling = dataclasses.replace(SAMPLING, max_tokens=20, prompt_logprobs=True, logprobs=2)
    before = cramped.scheduler.counts.preempted
    requests = [cramped.add_request([i] * 40, sampling) for i in range(5)]
    cramped.run(requests)
    assert cramped.scheduler.counts.preempted > before
    once = cramped.add_request([4] * 40, sampling)
    cramped.run([once])
    for request in requests:
        assert (len(request.prompt_logprobs), len(request.prompt_top)) == (39, 39)
    assert (requests[4].prompt_logprobs, requests[4].prompt_top) == (once.prompt_logprobs, once.prompt_top)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 50))])
def test_any_mix_ends_as_each_request_alone_and_gives_back_every_page(cramped, alone, seed):
    """20 requests a mix: common beginnings, siblings, priorities, some cancelled."""
    draw = random.Random(seed)
    requests = []
    for _ in range(20):
        leader = None
        if requests and draw.random() < 0.3:
            leader = draw.choice(requests)
            prompt = leader.tokens[: leader.prompt_tokens]
        else:
            prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 50))]
        sampling = Sampling(draw.randrange(1, 20), temperature=draw.choice([0.0, 1.0]), seed=draw.randrange(3))
        request = cramped.make_request(prompt, sampling)
        request.priority, request.leader = draw.choice([0, 0, 1]), leader
        requests.append(request)
    waiting = list(requests)
    while waiting or cramped.busy:
        for _ in range(draw.randrange(3)):
            if waiting:
                cramped.add(waiting.pop(0))
        cramped.step()
        if draw.random() < 0.05:
            cramped.cancel(draw.choice(requests))
    assert cramped.scheduler.pages[0].used == 0
    for request in requests:
        tokens, logprobs = alone(request.tokens[: request.prompt_tokens], request.sampling)
        if request.finish_reason == "cancelled":
            assert (request.tokens, request.logprobs) == (tokens[: len(request.tokens)], logprobs[: request.made])
        else:
            assert (request.tokens, request.logprobs) == (tokens, logprobs)
