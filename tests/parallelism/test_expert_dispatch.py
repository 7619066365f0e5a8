"""Dispatch of tokens to experts on meshes against a sum over all experts on one device, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from parallelism import ACTIVATIONS, MeshSpec, experts, sequence, sharding_context
from parallelism.experts import EXPERTS, WIDTH, Routes, apply
from parallelism.manual import on_devices
from parallelism.sequence import balanced_order

T, D, F, E, K = 16, 6, 4, 8, 3
AXES = {"up": (EXPERTS, "act_mlp", WIDTH), "down": (EXPERTS, WIDTH, "act_mlp")}


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def material(B=4, even=True, seed=0):
    """x, experts, weights, used, kernels; where not ``even`` all tokens want the last experts most."""
    rng = np.random.default_rng(seed)
    wish = rng.random((B, T, E)) + (0 if even else np.arange(E))
    expert = np.argsort(-wish)[..., :K].astype(np.int32)
    kernels = {"up": rng.standard_normal((E, F, D)), "down": rng.standard_normal((E, D, F))}
    return rng.standard_normal((B, T, D)), expert, rng.random((B, T, K)), rng.random((B, T)) > 0.2, kernels


def compute(rows, sizes, kernels):
    if sizes is None:
        return jnp.einsum("ecf,edf->ecd", jnp.einsum("ecd,efd->ecf", rows, kernels["up"]) ** 2, kernels["down"])
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
    up, down = kernels["up"][expert], kernels["down"][expert]
    y = jnp.einsum("rf,rdf->rd", jnp.einsum("rd,rfd->rf", rows, up) ** 2, down)
    return jnp.where((expert < sizes.shape[0])[:, None], y, 0)


def of_all_experts(x, expert, weight, used, kernels, capacity_factor=None):
    """Every expert on every token, weighted by zero where it is not wanted, or has no room."""
    wanted = (expert[..., None] == np.arange(E)) & used[..., None, None]
    if capacity_factor is not None:
        by_token = wanted.any(2)
        room = np.cumsum(by_token, 1) - by_token < np.ceil(capacity_factor * T * K / E)
        wanted = wanted & room[:, :, None]
    every = jnp.einsum("btef,edf->bted", jnp.einsum("btd,efd->btef", x, kernels["up"]) ** 2, kernels["down"])
    dropped = used.sum() * K - wanted.sum()
    return jnp.einsum("bted,btke->btd", every, weight[..., None] * wanted), dropped


def value_and_gradients(fn, x, weight, kernels):
    def value(x, weight, kernels):
        y, dropped = fn(x, weight, kernels)
        return (jnp.sin(y) * jnp.arange(1, D + 1)).sum(), (y, dropped)

    (_, out), grads = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))(x, weight, kernels)
    return jax.tree.map(np.asarray, (out, grads))


def on_mesh(mesh, x, expert, weight, used, kernels, capacity_factor=None, rules=""):
    built = MeshSpec.parse(mesh).build()
    order = balanced_order(T, built.shape["context"])

    def fn(x, weight, kernels):
        with sharding_context(built, ACTIVATIONS.override(rules)):
            routes = Routes(expert[:, order], weight[:, order], used[:, order])
            y, dropped = apply(compute, x[:, order], routes, kernels, AXES, capacity_factor=capacity_factor)
        return y[:, np.argsort(order)], dropped

    return value_and_gradients(fn, x, weight, kernels)


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


CASES = {
    "one device": ("", {}, {}),
    "experts and rows over the same axis": ("expert=4", {}, {}),
    "a full owner": ("expert=4", {"even": False}, {}),
    "more experts a token than an owner has": ("expert=4,data=2", {"B": 8}, {}),
    "kernels split": ("expert=2,tensor=2,fsdp=2", {}, {}),
    "tokens whole over tensor": ("expert=2,tensor=2", {}, {"rules": "residual=context"}),
    "rows that do not divide": ("expert=4,tensor=2", {"B": 1}, {}),
    "rows split over devices": ("expert=2,context=4", {"B": 2}, {}),
    "experts whole": ("data=2,context=2,tensor=2", {}, {}),
}


COVERING = {
    ("one device", "capacity"),
    ("a full owner", "dropless"),
    ("more experts a token than an owner has", "dropless"),
    ("kernels split", "capacity"),
    ("tokens whole over tensor", "dropless"),
    ("rows that do not divide", "dropless"),
    ("rows split over devices", "capacity"),
    ("experts whole", "dropless"),
}


def cases():
    for case in itertools.product(CASES, ("dropless", "capacity")):
        yield pytest.param(*case, marks=() if case in COVERING else pytest.mark.slow)


@pytest.mark.parametrize(("case", "mode"), cases())
def test_output_and_gradients_equal_a_sum_over_all_experts(case, mode):
    capacity_factor = {"dropless": None, "capacity": 0.6}[mode]
    mesh, options, rules = CASES[case]
    x, expert, weight, used, kernels = material(**options)
    found = on_mesh(mesh, x, expert, weight, used, kernels, capacity_factor, **rules)
    expected = value_and_gradients(
        lambda x, w, k: of_all_experts(x, expert, w, used, k, capacity_factor), x, weight, kernels
    )
    assert_equal(found, expected)
    assert (found[0][1] > 0) == (capacity_factor is not None)


def test_a_capacity_beyond_all_tokens_drops_none():
    x, expert, weight, used, kernels = material()
    found = on_mesh("", x, expert, weight, used, kernels, 1e30)
    expected = value_and_gradients(lambda x, w, k: of_all_experts(x, expert, w, used, k), x, weight, kernels)
    assert_equal(found, expected)
    assert found[0][1] == 0


def ragged_all_to_all(operand, output, starts, sizes, there, receive, *, axis_name):
    """What the operation does where there is one, by gathering everything. A wrong size is NaN."""
    me, row = lax.axis_index(axis_name), jnp.arange(output.shape[0])
    everything, starts, sizes, there = (lax.all_gather(a, axis_name) for a in (operand, starts, sizes, there))
    for s in range(starts.shape[0]):
        start, size, at = starts[s, me], sizes[s, me], there[s, me]
        rows = everything[s].at[row - at + start].get(mode="fill", fill_value=jnp.nan)
        rows = jnp.where(size == receive[s], rows, jnp.nan)
        output = jnp.where(((row >= at) & (row < at + size))[:, None], rows, output)
    return output


@pytest.mark.parametrize("even", [pytest.param(True, marks=pytest.mark.slow), False])
def test_only_rows_that_there_are_travel_where_the_platform_can(monkeypatch, even):
    monkeypatch.setattr(experts, "platform", lambda: "tpu")
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    x, expert, weight, used, kernels = material(even=even)
    expected = value_and_gradients(lambda x, w, k: of_all_experts(x, expert, w, used, k), x, weight, kernels)
    assert_equal(on_mesh("expert=4,tensor=2", x, expert, weight, used, kernels), expected)


@pytest.mark.parametrize("n", [2, 4])
def test_tokens_earlier_in_a_row_are_counted_wherever_they_are(n):
    mesh = MeshSpec(context=n).build()
    counts = np.random.default_rng(0).integers(0, 5, (2, 32, 3)).astype(np.int32)
    order, spec = balanced_order(32, n), jax.sharding.PartitionSpec(None, "context")
    with sharding_context(mesh):
        found = jax.jit(on_devices(sequence.earlier, (spec,), spec))(counts[:, order])
    np.testing.assert_array_equal(found, (np.cumsum(counts, 1) - counts)[:, order])
