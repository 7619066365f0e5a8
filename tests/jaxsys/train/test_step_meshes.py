"""Gradients on a mesh: where they lie, what padding gets, what another row adds."""

import numpy as np
import pytest
from tiny_models import MODELS, Setup, assert_near, packed_batch


@pytest.fixture(scope="module")
def padded():
    """A step on a mesh that neither heads nor vocabulary divide over, and gradients of it as they are stored."""
    setup = Setup(MODELS["llama"], "tensor=2,fsdp=4")
    placed = setup.place(packed_batch())
    return setup, setup.graphs.compile("grads", setup.step.grads, setup.params, placed)(setup.params, placed)[0]


def test_heads_and_vocabulary_that_do_not_divide_are_padded_and_the_padding_gets_no_gradient(padded):
    setup, grads = padded
    longer = {d.array for d in setup.plan.decisions if d.action == "pad"}
    assert {"embed.kernel", "layers.0.attention.q.kernel", "layers.1.attention.o.kernel"} <= longer
    q, embed = grads["layers.0.attention.q.kernel"], grads["embed.kernel"]
    assert q.shape[0] == 12 and embed.shape[0] == 68
    assert not np.asarray(q)[9:].any() and not np.asarray(embed)[67:].any()


def test_replicated_heads_and_vocabulary_give_the_same_gradients(padded):
    rules = "heads=:replicate,kv_heads=:replicate,vocab=:replicate"
    setup = Setup(MODELS["llama"], "tensor=2,fsdp=4", parameter_rules=rules)
    assert not any(stored.padded for stored in setup.plan.layout.values())
    assert {d.action for d in setup.plan.decisions} == {"replicate"}
    found, _ = setup.grads(packed_batch())
    assert_near(found, padded[0].host(padded[1]), 1e-5)


def test_gradients_lie_where_their_parameters_do(padded):
    setup, grads = padded
    for key, array in setup.params.items():
        assert grads[key].sharding.is_equivalent_to(array.sharding, array.ndim), key


def test_a_row_alone_in_its_batch_has_the_gradient_that_it_adds():
    """Rows do not leak into each other, nor documents within a row."""
    setup, batch = Setup(MODELS["gemma2"]), packed_batch(2)
    whole, totals = setup.grads(batch)
    parts = [setup.grads({k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    assert totals["loss"] == pytest.approx(sum(t["loss"] for _, t in parts), rel=1e-5)
    assert_near({k: sum(g[k] for g, _ in parts) for k in whole}, whole, 1e-5)
