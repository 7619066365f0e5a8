"""A model with experts: where they lie, the losses of their routers, microbatches.

That loss, gradients and metrics are the same on any mesh is in ``test_step_covering.py``.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_models import EXPERTS, Setup, assert_near, packed_batch, x64

from jaxsys.optim import SGD, Constant, OptimConfig
from parallelism.errors import UserError

MODES = {"dropless": None, "capacity": 0.9}


def model(mode, **changes):
    return dataclasses.replace(
        EXPERTS, experts=dataclasses.replace(EXPERTS.experts, capacity_factor=MODES[mode], **changes)
    )


def run_grads(setup, batch):
    """Logical gradients, and the metrics that ``finish`` makes of the sums, on the host."""
    placed = setup.place(batch)
    graph = setup.graphs.compile("grads", setup.step.grads, setup.params, placed)
    grads, totals = graph(setup.params, placed)
    finish = setup.graphs.compile("finish", setup.step.finish, (grads, totals), np.int32(0))
    metrics = finish((grads, totals), np.int32(0))[1]
    return setup.host(grads), {name: float(value) for name, value in metrics.items()}


def test_experts_lie_over_their_axis_and_all_else_is_split_over_it_too():
    setup = Setup(model("dropless"), "expert=2,fsdp=2,tensor=2")
    kernels = {key: array for key, array in setup.params.items() if key.startswith("layers.1.experts.")}
    assert kernels["layers.1.experts.gate.kernel"].addressable_shards[0].data.shape == (4, 5, 16)
    assert kernels["layers.1.experts.shared.gate.kernel"].addressable_shards[0].data.shape == (3, 8)
    assert setup.params["layers.0.mlp.down.kernel"].addressable_shards[0].data.shape == (8, 24)


def test_experts_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"layers\.1\.experts\.down\.kernel: axis 'experts' of size 6 .* over expert=4"):
        Setup(dataclasses.replace(EXPERTS, experts=dataclasses.replace(EXPERTS.experts, number=6)), "expert=4")


def test_experts_over_an_axis_that_splits_only_tokens_are_refused():
    from parallelism import ACTIVATIONS, sharding_context

    setup = Setup(model("dropless"), "context=4")
    with (
        pytest.raises(UserError, match=r"'context' splits tokens .*let act_experts go over axes of batch"),
        sharding_context(setup.mesh, ACTIVATIONS.override("act_experts=context")),
    ):
        jax.eval_shape(setup.step.grads, setup.params, packed_batch())


# ------------------------------------------------------------------------------------------------------- microbatches

ROUTER = "layers.0.experts.router.kernel"


def one_layer(mode="dropless", **changes):
    """Fewer things to compile."""
    return dataclasses.replace(model(mode, **{"dense_layers": (), "shared_width": 0, **changes}), n_layers=1)


@functools.cache
def of_one_layer(rows=(0, 8), **changes):
    """Gradients and metrics in float32 of some rows of the batch."""
    return run_grads(Setup(one_layer(**changes)), {name: value[slice(*rows)] for name, value in packed_batch().items()})


def fused(mesh, mode, accumulate, dtype="float64"):
    """Logical parameters after one step of gradient descent, and its metrics."""
    optim = OptimConfig(SGD(), Constant(), learning_rate=1.0, clip_norm=None)
    with x64(dtype == "float64"):
        setup = Setup(one_layer(mode), mesh, dtype=dtype, optim=optim)
        state = setup.graphs.compile("init", setup.optimizer.init, setup.params)(setup.params)
        placed = setup.place(packed_batch(), accumulate)
        args = (setup.params, state, np.int32(0), placed)
        params, _, metrics = setup.graphs.compile("fused", setup.step.fused, *args)(*args)
        return setup.host(params), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("mode", ["capacity", pytest.param("dropless", marks=pytest.mark.slow)])
def test_microbatches_add_up_to_one_batch_on_any_mesh(mode):
    """The fractions of tokens in the load-balance loss are those of the whole batch."""
    expected, metrics = fused("", mode, 1)
    found, accumulated = fused("expert=2", mode, 4)
    assert accumulated == pytest.approx(metrics, rel=1e-9)
    assert_near(found, expected, 1e-9)


def test_microbatches_that_count_for_themselves_would_differ():
    whole = of_one_layer()[0][ROUTER]
    alone = of_one_layer((0, 4))[0][ROUTER] + of_one_layer((4, 8))[0][ROUTER]
    assert np.linalg.norm(alone - whole) > 1e-3 * np.linalg.norm(whole)


def test_no_forward_pass_counts_where_no_loss_needs_it():
    for changes, named in (({}, {"targets", "tokens", "load"}), ({"balance_loss": 0.0}, {"targets", "tokens"})):
        setup = Setup(one_layer(**changes))
        assert setup.step.auxiliary
        assert jax.eval_shape(setup.step.counts, setup.params, packed_batch()).keys() == named
    assert not Setup(one_layer(balance_loss=0.0, z_loss=0.0)).step.auxiliary


@pytest.mark.parametrize("without", ["balance_loss", "z_loss"])
def test_each_loss_of_the_router_has_a_gradient(without):
    """The loss that is reported stays the cross-entropy."""
    (both, metrics), (one, same) = of_one_layer(), of_one_layer(**{without: 0.0})
    assert metrics["loss"] == pytest.approx(same["loss"], rel=1e-6)
    assert np.linalg.norm(both[ROUTER] - one[ROUTER]) > 1e-2 * np.linalg.norm(both[ROUTER])


@pytest.mark.slow
def test_bfloat16_compute_on_a_mesh_keeps_gradients_near_those_of_float32():
    expected, _ = run_grads(Setup(model("dropless")), packed_batch())
    found, _ = run_grads(Setup(model("dropless"), "expert=2,fsdp=2,tensor=2", compute="bfloat16"), packed_batch())
    for name, want in expected.items():
        cosine = (found[name] * want).sum() / np.linalg.norm(found[name]) / np.linalg.norm(want)
        assert cosine > 0.99, name


def test_a_capacity_is_refused_where_the_order_of_a_rows_tokens_is_lost():
    setup = Setup(model("capacity"), "context=2", activation_rules="residual=tensor")
    with pytest.raises(UserError, match="context=2: rows of 16 tokens are not split over it"):
        setup.grads(packed_batch())


def test_routers_and_norms_are_not_what_a_layer_fetches_and_casts():
    for storage in ("listed", "stacked"):
        kernels = Setup(EXPERTS, storage=storage).step.model.layer_kernels
        assert kernels and not [key for key in kernels if "router" in key or "norm" in key]


def test_losses_of_a_router_that_no_layer_has_count_nothing():
    routed = dataclasses.replace(EXPERTS.experts, dense_layers=(0, 1))
    setup = Setup(dataclasses.replace(EXPERTS, experts=routed))
    assert not setup.step.auxiliary


def test_a_width_that_no_layer_has_is_no_part_of_what_files_say():
    routed = dataclasses.replace(EXPERTS.experts, dense_layers=())
    every = dataclasses.replace(EXPERTS, experts=routed)
    assert every.inference == dataclasses.replace(every, d_ff=every.d_ff + 8).inference
    assert EXPERTS.inference != dataclasses.replace(EXPERTS, d_ff=EXPERTS.d_ff + 8).inference
