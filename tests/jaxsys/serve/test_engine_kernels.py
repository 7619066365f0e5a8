"""The engine with the attention of other platforms, interpreted: as on CPU, with the pool as they store it."""

import functools

import pytest
from serve_engines import CONFIG, SIZES, WINDOWED, Reference, make_engine

from jaxsys.kernels import paged, paged_gpu, paged_tpu
from jaxsys.serve import pool
from jaxsys.serve.sampling import Sampling
from parallelism.errors import UserError

PROMPTS = [[5], list(range(20, 37)), list(range(50))]


def on(monkeypatch, name):
    for module in (paged, pool):
        monkeypatch.setattr(module, "platform", lambda: name)
    for module in (paged_gpu, paged_tpu):
        monkeypatch.setattr(module, "attend", functools.partial(module.attend, interpret=True))


@pytest.mark.parametrize(
    ("name", "config", "mesh", "stored"),
    [
        ("tpu", WINDOWED, "data=2", (1, 128)),  # both key/value heads in a row
        ("gpu", WINDOWED, "tensor=2", (2, 8)),
        pytest.param("tpu", CONFIG, "data=2,tensor=2", (2, 128), marks=pytest.mark.slow),
        pytest.param("gpu", CONFIG, "data=2,tensor=2", (2, 8), marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_engine_make_the_tokens_of_the_full_forward(monkeypatch, name, config, mesh, stored):
    on(monkeypatch, name)
    engine = make_engine(config, mesh=mesh, sizes=SIZES[-1:], storage="stacked")
    assert (engine.pool.k.shape[3], engine.pool.k.shape[5]) == stored
    requests = [engine.add_request(prompt, Sampling(max_tokens=12, temperature=0.0)) for prompt in PROMPTS]
    engine.run(requests)
    reference = Reference(config)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        tokens, logprobs = reference.greedy(prompt, 12)
        assert request.tokens[len(prompt) :] == tokens
        assert request.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_a_page_size_that_does_not_lie_in_whole_tiles_is_refused_on_tpu(monkeypatch):
    on(monkeypatch, "tpu")
    with pytest.raises(UserError, match=r"page_size 12: expected a multiple of 8 on TPU"):
        make_engine(page_size=12)
