"""ZeRO-1, 2 and 3 by rules: the same step, fewer bytes a device."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_models import EXPERTS, LLAMA, ZERO, Setup, assert_near, packed_batch, x64

from parallelism.collectives import collectives, summary
from parallelism.errors import UserError

MESH = "fsdp=4,tensor=2"
ROUTED = dataclasses.replace(
    EXPERTS, n_layers=1, experts=dataclasses.replace(EXPERTS.experts, dense_layers=(), shared_width=0)
)
MODELS = {"dense": LLAMA, "experts": ROUTED}


@functools.cache
def stepped(level, mesh=MESH, model="dense"):
    """Parameters and optimizer state after one fused step of two microbatches, the setup, the compiled text."""
    with x64():
        setup = Setup(MODELS[model], mesh, dtype="float64", **ZERO[level])
        state_shardings = {
            name: setup.shardings.optimizer[owner] if owner else None
            for name, owner in setup.optimizer.layout_of_state()[1].items()
        }
        state = setup.graphs.compile("init", setup.optimizer.init, setup.params, out_shardings=state_shardings)(
            setup.params
        )
        batch, step = setup.place(packed_batch(16), microbatches=2), np.int32(0)
        graph = setup.graphs.compile("step", setup.step.fused, setup.params, state, step, batch)
        params, state, _ = graph(setup.params, state, step, batch)
        layout = setup.plan.layout | setup.optimizer.layout_of_state()[0]
        return setup, {**params, **state}, setup.host({**params, **state}, layout), graph.compiled.as_text()


@pytest.mark.parametrize("level", ZERO)
def test_every_level_takes_the_step_of_one_device(level):
    _, _, expected, _ = stepped(3, "")
    _, _, found, _ = stepped(level)
    assert_near(found, expected, 1e-9)


def held(arrays):
    """Bytes of the first device."""
    return sum(a.addressable_shards[0].data.nbytes for a in arrays)


def test_each_level_splits_one_thing_more():
    parameters, gradients, optimizer = {}, {}, {}
    for level in ZERO:
        setup, arrays, _, _ = stepped(level)
        wide = [k for k, stored in setup.plan.layout.items() if "embed" in stored.axes]
        with x64():
            batch = setup.place(packed_batch())
            grads = setup.graphs.compile(f"grads{level}", setup.step.grads, setup.params, batch)(setup.params, batch)[0]
        parameters[level] = held(arrays[k] for k in wide)
        gradients[level] = held(grads[k] for k in wide)
        optimizer[level] = held(arrays[f"optimizer.mu.{k}"] for k in wide)
    split = parameters[3]
    assert parameters == {1: 4 * split, 2: 4 * split, 3: split}
    assert gradients == {1: 4 * split, 2: split, 3: split}
    assert optimizer == {1: split, 2: split, 3: split}


def test_parameters_that_are_whole_are_gathered_once_a_step_and_not_once_a_microbatch():
    def gathered(level):
        setup, _, _, text = stepped(level, "fsdp=4")
        return sum(
            sent for (kind, axes), (_, sent) in summary(collectives(text, setup.mesh)).items()
            if kind == "all-gather" and axes == ("fsdp",)
        )  # fmt: skip

    assert 0 < 2 * gathered(2) < gathered(3)


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kernels_of_experts_are_gathered_once_a_step_too(level):
    """Gradients are scattered once a microbatch; those that are whole (ZeRO-1) are gathered again."""
    mesh, n = "expert=2,fsdp=4", 4
    _, _, expected, _ = stepped(3, "", "experts")
    setup, arrays, found, text = stepped(level, mesh, "experts")
    assert_near(found, expected, 1e-9)
    kernels = [k for k, stored in setup.plan.layout.items() if "expert_embed" in stored.axes]
    whole = held(arrays[k] for k in kernels)
    assert whole == n * held(arrays[f"optimizer.mu.{k}"] for k in kernels)
    found = summary(collectives(text, setup.mesh)).items()
    sent = {kind: nbytes for (kind, axes), (_, nbytes) in found if axes == ("fsdp",)}
    piece = (n - 1) / n * whole
    assert sent["reduce-scatter"] == 2 * piece
    assert sent["all-gather"] == (piece if level == 2 else 4 * piece)


def test_rules_that_pad_the_optimizer_otherwise_are_refused():
    with pytest.raises(UserError, match=r"^layers\.0\.attention\.k\.kernel: .*\(4, 4, 32\).*\(3, 4, 32\)"):
        Setup(LLAMA, MESH, optimizer_rules="heads=none,kv_heads=none")
