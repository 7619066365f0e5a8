"""Weights that are updated, donated and published while requests run."""

import random

import jax
import numpy as np
import pytest
from serve_engines import CONFIG, make_engine, weights

from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graphs, no_compiles
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Size

GREEDY = Sampling(8, temperature=0.0)
ROWS = Size(16, 4, queries=4)


class Trained:
    """An engine, and a trainer of its weights that donates them wherever it may."""

    def __init__(self):
        engine = self.engine = make_engine(sizes=(ROWS,))
        graphs = Graphs(engine.graphs.mesh)
        self.params = engine.live._lease.params
        self._updates = [
            graphs.compile("update", self.update_rule, self.params, np.float32(0), donate=donate)
            for donate in ((), (0,))
        ]

    @staticmethod
    def update_rule(params, by):
        return {key: array * (1 + by) for key, array in params.items()}

    def start(self, policy):
        """As it was in the beginning, but for the version."""
        self.engine.scheduler.new_weights = policy
        self.publish({key: jax.device_put(weights(CONFIG)[key], a.sharding) for key, a in self.params.items()})
        self.values = {self.engine.live.version: self.host()}

    def publish(self, params):
        self.params = params
        self.engine.live.publish(params)

    def host(self):
        return {key: np.array(array) for key, array in self.params.items()}

    def update(self, by):
        """One more version; whether the old one was donated."""

        def work():
            old, donate = self.params, not self.engine.live.held
            self.publish(self._updates[donate](old, np.float32(by)))
            return all(array.is_deleted() for array in old.values())

        done = dispatcher().call(work)
        self.values[self.engine.live.version] = self.host()
        return done


@pytest.fixture(scope="module")
def trained():
    return Trained()


@pytest.fixture(scope="module")
def replay():
    """Tokens and log-probabilities of a request that is alone, each made by the version that is named."""
    engine = make_engine(sizes=(ROWS,))

    def run(request, values, policy):
        engine.scheduler.new_weights = policy
        again = engine.make_request(request.tokens[: request.prompt_tokens], request.sampling)
        engine.add(again)
        for version in request.versions:
            engine.live.publish(jax.device_put(values[version], {k: a.sharding for k, a in engine.live.like().items()}))
            engine.step(1)
        assert again.finish_reason == request.finish_reason
        return again

    return run


@pytest.mark.parametrize(
    ("policy", "versions", "every"), [("switch", 200, 1), ("recompute", 60, 2), ("finish", 60, 1), ("restart", 20, 12)]
)
def test_no_request_is_lost_and_no_token_comes_of_a_mixture_of_weights(trained, replay, policy, versions, every):
    draw, engine, live = random.Random(policy), trained.engine, trained.engine.live
    trained.start(policy)
    requests = [
        engine.add_request(
            [draw.randrange(97) for _ in range(draw.randrange(1, 5))],
            Sampling(draw.randrange(1, 14), temperature=draw.choice([0.0, 0.8]), seed=i),
        )
        for i in range(64)
    ]
    donated = []
    one = sum(array.nbytes for array in trained.params.values())
    arrays = sum(array.nbytes for array in jax.live_arrays())
    live.kept_peak = peak = 0
    with no_compiles("updates of live weights"):
        for n in range(versions * every):
            engine.step(draw.randrange(1, 4))
            if n % every == every - 1:
                donated.append(trained.update(draw.choice([-0.02, 0.02])))
                peak = max(peak, sum(array.nbytes for array in jax.live_arrays()) - arrays)
        engine.run(requests)
    assert {request.finish_reason for request in requests} == {"length"}
    assert engine.scheduler.pages[0].used == 0 and not engine.scheduler.versions and live.kept_bytes == 0
    if policy == "finish":
        assert 0 < sum(donated) < len(donated) and live.kept_peak >= one
        assert one <= peak <= live.kept_peak + 4096
    else:
        assert all(donated) and live.kept_peak == 0 and peak < 4096  # no copy at any time
    mixed = 0
    for request in requests:
        assert request.versions == sorted(request.versions) and len(request.versions) == request.made
        mixed += len(set(request.versions)) > 1
        again = replay(request, trained.values, policy if policy == "recompute" else "switch")
        assert again.tokens == request.tokens
        np.testing.assert_allclose(again.logprobs, request.logprobs, atol=2e-5)
    assert (mixed > 0) == (policy in ("switch", "recompute"))


def test_the_pool_given_back_is_made_again_and_tokens_do_not_change(trained):
    engine = trained.engine
    trained.start("switch")
    prompts = [[1, 2, 3], [4] * 20]
    expected = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    engine.run(expected)
    requests = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    engine.step(2)
    held = sum(a.nbytes for a in jax.tree.leaves(engine.pool))
    before = sum(array.nbytes for array in jax.live_arrays())
    with no_compiles("giving the pool back"):
        assert engine.give_back() == held > 0
        assert before - sum(array.nbytes for array in jax.live_arrays()) == held
        assert engine.give_back() == 0
        engine.run(requests)
    assert [r.tokens for r in requests] == [r.tokens for r in expected]
