"""ZeRO-1, 2 and 3 by rules: what they save. That their steps are the same is in ``test_step_covering.py``."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_models import EXPERTS, LLAMA, ZERO, Setup, packed_batch

from parallelism.collectives import collectives, summary
from parallelism.errors import UserError

MESH = "fsdp=4"
SHALLOW = dataclasses.replace(LLAMA, n_layers=1)
ROUTED = dataclasses.replace(
    EXPERTS, n_layers=1, experts=dataclasses.replace(EXPERTS.experts, dense_layers=(), shared_width=0)
)


@functools.cache
def stepped(level, mesh=MESH, model=SHALLOW):
    """The setup, parameters and optimizer state after one fused step of two microbatches, the compiled text."""
    setup = Setup(model, mesh, **ZERO[level])
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
    return setup, {**params, **state}, graph.text


def held(arrays):
    """Bytes of the first device."""
    return sum(a.addressable_shards[0].data.nbytes for a in arrays)


def test_each_level_splits_one_thing_more():
    parameters, gradients, optimizer = {}, {}, {}
    for level in ZERO:
        setup, arrays, _ = stepped(level)
        wide = [k for k, stored in setup.plan.layout.items() if "embed" in stored.axes]
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
        setup, _, text = stepped(level)
        return sum(
            sent for (kind, axes), (_, sent) in summary(collectives(text, setup.mesh)).items()
            if kind == "all-gather" and axes == ("fsdp",)
        )  # fmt: skip

    assert 0 < 2 * gathered(2) < gathered(3)


@pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_kernels_of_experts_are_gathered_once_a_step_too(level):
    """Gradients are scattered once a microbatch; those that are whole (ZeRO-1) are gathered again."""
    n = 4
    setup, arrays, text = stepped(level, "expert=2,fsdp=4", ROUTED)
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
        Setup(LLAMA, "tensor=2", optimizer_rules="heads=none,kv_heads=none")
