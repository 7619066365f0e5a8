"""Loss and every gradient on meshes equal one device."""

import functools
import itertools

import numpy as np
import pytest
from tiny_models import MODELS, Setup, assert_near, packed_batch, x64

from parallelism.sequence import METHODS

MESHES = ("fsdp=8", "tensor=2,fsdp=4", "data=2,fsdp=2,tensor=2")
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@functools.cache
def on_one_device(model, dtype):
    with x64(dtype == "float64"):
        return Setup(MODELS[model], dtype=dtype).grads(packed_batch())


COVERING = {
    ("fsdp=8", "llama", "listed", "float64"),
    ("fsdp=8", "gemma2", "stacked", "float32"),
    ("tensor=2,fsdp=4", "llama", "stacked", "float64"),
    ("tensor=2,fsdp=4", "gemma2", "listed", "float64"),
    ("data=2,fsdp=2,tensor=2", "gemma2", "stacked", "float64"),
    ("data=2,fsdp=2,tensor=2", "llama", "listed", "float32"),
}
"""Every pair of values once or more; the full product is slow."""


def cases():
    for case in itertools.product(MESHES, MODELS, ("listed", "stacked"), TOLERANCE):
        yield pytest.param(*case, marks=() if case in COVERING else pytest.mark.slow)


@pytest.mark.parametrize(("mesh", "model", "storage", "dtype"), cases())
def test_loss_and_every_gradient_equal_one_device(mesh, model, storage, dtype):
    expected, totals = on_one_device(model, dtype)
    with x64(dtype == "float64"):
        found, sharded = Setup(MODELS[model], mesh, dtype=dtype, storage=storage).grads(packed_batch())
    assert all(array.dtype == dtype for array in found.values())
    assert sharded["targets"] == totals["targets"] == (packed_batch()["targets"] >= 0).sum()
    assert sharded["loss"] == pytest.approx(totals["loss"], rel=TOLERANCE[dtype])
    assert_near(found, expected, TOLERANCE[dtype])


CONTEXT = ("context=4", "context=2,tensor=2", "data=2,context=2,tensor=2", "fsdp=2,context=4")


@pytest.mark.slow  # its pairs are in test_step_covering.py
@pytest.mark.parametrize(
    ("mesh", "method", "model", "storage", "dtype"),
    itertools.product(CONTEXT, METHODS, MODELS, ("listed", "stacked"), TOLERANCE),
)
def test_rows_split_over_context_give_the_loss_and_gradients_of_one_device(mesh, method, model, storage, dtype):
    expected, totals = on_one_device(model, dtype)
    with x64(dtype == "float64"):
        found, split = Setup(MODELS[model], mesh, dtype=dtype, storage=storage, method=method).grads(packed_batch())
    assert split["targets"] == totals["targets"]
    assert split["loss"] == pytest.approx(totals["loss"], rel=TOLERANCE[dtype])
    assert_near(found, expected, TOLERANCE[dtype])


def test_heads_and_vocabulary_that_do_not_divide_are_padded_and_the_padding_gets_no_gradient():
    setup = Setup(MODELS["llama"], "tensor=2,fsdp=4")
    padded = {d.array for d in setup.plan.decisions if d.action == "pad"}
    assert {"embed.kernel", "layers.0.attention.q.kernel", "layers.1.attention.o.kernel"} <= padded
    placed = setup.place(packed_batch())
    grads, _ = setup.graphs.compile("grads", setup.step.grads, setup.params, placed)(setup.params, placed)
    q, embed = grads["layers.0.attention.q.kernel"], grads["embed.kernel"]
    assert q.shape[0] == 12 and embed.shape[0] == 68
    assert not np.asarray(q)[9:].any() and not np.asarray(embed)[67:].any()


@pytest.mark.parametrize("model", ["llama"])
def test_replicated_heads_and_vocabulary_give_the_same_gradients(model):
    rules = "heads=:replicate,kv_heads=:replicate,vocab=:replicate"
    setup = Setup(MODELS[model], "tensor=2,fsdp=4", rules=rules)
    assert not any(stored.padded for stored in setup.plan.layout.values())
    assert {d.action for d in setup.plan.decisions} == {"replicate"}
    expected, totals = on_one_device(model, "float32")
    found, sharded = setup.grads(packed_batch())
    assert sharded["loss"] == pytest.approx(totals["loss"], rel=1e-5)
    assert_near(found, expected, 1e-5)


def test_gradients_lie_where_their_parameters_do():
    setup = Setup(MODELS["llama"], "tensor=2,fsdp=4")
    placed = setup.place(packed_batch())
    grads, _ = setup.graphs.compile("grads", setup.step.grads, setup.params, placed)(setup.params, placed)
    for key, array in setup.params.items():
        assert grads[key].sharding.is_equivalent_to(array.sharding, array.ndim), key


def test_a_row_alone_in_its_batch_has_the_gradient_that_it_adds():
    """Rows do not leak into each other, nor documents within a row."""
    setup, batch = Setup(MODELS["gemma2"]), packed_batch(2)
    whole, totals = setup.grads(batch)
    parts = [setup.grads({k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    assert totals["loss"] == pytest.approx(sum(t["loss"] for _, t in parts), rel=1e-5)
    assert_near({k: sum(g[k] for g, _ in parts) for k in whole}, whole, 1e-5)
