"""The engine with a model that has experts, against the whole forward of whole rows."""

import dataclasses

import numpy as np
import pytest
from serve_engines import CONFIG, SIZES, Reference, make_engine

from jaxsys.models.config import Experts
from jaxsys.serve.engine import ONE
from jaxsys.serve.sampling import Sampling

EXPERTS = dataclasses.replace(
    CONFIG, qk_norm="head", experts=Experts(8, 2, 16, shared_width=8, dense_layers=(0,), capacity_factor=1.0)
)
PROMPTS = [[5], list(range(20, 37)), list(range(50)), [7] * 9]


@pytest.fixture(scope="module")
def greedy():
    """Eight tokens after each prompt; the whole forward drops nothing."""
    dropless = dataclasses.replace(EXPERTS.experts, capacity_factor=None)
    reference = Reference(dataclasses.replace(EXPERTS, experts=dropless))
    return [reference.greedy(prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize(("mesh", "sizes"), [("", SIZES[2:]), ("expert=2,tensor=2", SIZES[2:])])
def test_greedy_decode_equals_the_full_forward_and_drops_nothing(greedy, mesh, sizes):
    engine = make_engine(EXPERTS, mesh=mesh, sizes=sizes)
    requests = [engine.add_request(prompt, Sampling(max_tokens=8, temperature=0.0)) for prompt in PROMPTS]
    engine.run(requests)
    for request, (tokens, logprobs) in zip(requests, greedy, strict=True):
        assert request.tokens[request.prompt_tokens :] == tokens
        np.testing.assert_allclose(request.logprobs, logprobs, atol=1e-5)


def test_invariant_logprobs_are_bitwise_the_same_whatever_shares_the_batch():
    """Rows of one expert lie where others leave them room."""
    engine = make_engine(EXPERTS, numerics="invariant", sizes=ONE)
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=3)

    def made(prompts):
        requests = [engine.add_request(prompt, sampling) for prompt in prompts]
        engine.run(requests)
        return [request.logprobs for request in requests]

    together, alone = made(PROMPTS), [made([prompt])[0] for prompt in PROMPTS]
    assert together == alone
