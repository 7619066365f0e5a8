"""The step fused and split, accumulation, remat, compute dtype, donation."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from tiny_models import GEMMA2, LLAMA, MODELS, Setup, assert_near, packed_batch

from jaxsys.graphs import Graphs
from jaxsys.optim import SGD, Adafactor, AdamW, Constant, OptimConfig
from jaxsys.train.step import groups
from parallelism.errors import UserError

SHALLOW = dataclasses.replace(LLAMA, n_layers=1)
OPTIM = OptimConfig(AdamW(), Constant(), learning_rate=1e-2)


def fused(setup, batch, accumulate, steps=2):
    """Logical parameters and state after some steps on the same batch, and the last metrics."""
    params, state = dict(setup.params), setup.graphs.compile("init", setup.optimizer.init, setup.params)(setup.params)
    placed = setup.place(batch, accumulate)
    step = setup.graphs.compile("fused", setup.step.fused, params, state, np.int32(0), placed)
    for n in range(steps):
        params, state, metrics = step(params, state, np.int32(n), placed)
    return setup.host(params), state, {k: float(v) for k, v in metrics.items()}


def split(setup, batch, accumulate, count, steps=2):
    g, s = setup.graphs, setup.step
    params, state = dict(setup.params), g.compile("init", setup.optimizer.init, setup.params)(setup.params)
    rows = batch["tokens"].shape[0] // accumulate
    micro = [setup.place({k: v[i * rows : (i + 1) * rows] for k, v in batch.items()}) for i in range(accumulate)]
    sizes = {key: stored.nbytes for key, stored in setup.plan.layout.items()}
    parts = groups(list(params), sizes, count)
    assert len(parts) == count and list(itertools.chain(*parts)) == list(params)
    for n in range(steps):
        sums = g.compile("grads", s.grads, params, micro[0])(params, micro[0])
        for more in micro[1:]:
            sums = g.compile("accumulate", s.accumulate, sums, params, more)(sums, params, more)
        scale, metrics = g.compile("finish", s.finish, sums, np.int32(n))(sums, np.int32(n))
        new, opt = {}, {}
        for i, keys in enumerate(parts):
            own = {k: state[k] for k in [*setup.optimizer.owned(keys), *setup.optimizer.shared]}
            args = ({k: params[k] for k in keys}, own, {k: sums[0][k] for k in keys}, scale, np.int32(n))
            p, o = g.compile(f"update{i}", s.update, *args)(*args)
            new, opt = {**new, **p}, {**opt, **o}
        params, state = new, opt
    return setup.host(params), state, {k: float(v) for k, v in metrics.items()}


SLOW_REMAT = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("full", "stacked"),
        ("full", "listed"),
        ("dots", "listed"),
        ("dots", "stacked"),
        ("dots_no_batch", "listed"),
    )
]


def test_split_equals_fused():
    """Three microbatches and three groups; two are in ``test_step_covering.py``."""
    accumulate, count = 3, 3
    setup = Setup(SHALLOW, optim=OPTIM)
    params, state, metrics = split(setup, packed_batch(12), accumulate, count)
    expected, other, expected_metrics = fused(setup, packed_batch(12), accumulate)
    assert_near(params, expected, 1e-6)
    layout = setup.optimizer.layout_of_state()[0]
    assert_near(setup.host(state, layout), setup.host(other, layout), 1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    """Eight equal microbatches are eight times one; in bfloat16 the sum would be off by its rounding."""
    setup, one = Setup(SHALLOW, dtype="bfloat16", optim=OPTIM), packed_batch(2)
    eight = {name: np.tile(value, (8, 1)) for name, value in one.items()}
    (params, state, found), (_, _, expected) = fused(setup, eight, 8, steps=1), fused(setup, one, 1, steps=1)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert {a.dtype for a in params.values()} == {state[f"optimizer.mu.{k}"].dtype for k in setup.params}


def test_microbatches_weigh_by_their_targets():
    """A mean of means would differ: one microbatch has nearly no targets."""
    batch = packed_batch()
    batch["targets"][:4, 2:] = -1
    setup = Setup(SHALLOW, optim=OPTIM)
    one, two = fused(setup, batch, 1), fused(setup, batch, 2)
    assert two[2] == pytest.approx(one[2], rel=1e-5)
    assert_near(two[0], one[0], 1e-5)


@pytest.mark.parametrize(
    ("remat", "storage"),
    [("dots_no_batch", "stacked"), *SLOW_REMAT],  # the others by default in test_step_covering.py
)
def test_every_remat_policy_gives_the_same_gradients(remat, storage):
    expected, totals = Setup(GEMMA2).grads(packed_batch())
    found, same = Setup(GEMMA2, storage=storage, remat=remat).grads(packed_batch())
    assert same == pytest.approx(totals, rel=1e-6)
    assert_near(found, expected, 1e-5)


def test_full_remat_keeps_less_than_none():
    """Else the policy is accepted and ignored."""
    setups = {remat: Setup(GEMMA2, storage="stacked", remat=remat) for remat in ("none", "full")}
    batch, saved = packed_batch(), {}
    for remat, setup in setups.items():
        jaxpr = jax.make_jaxpr(setup.step.grads)(setup.params, batch)
        scans = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == GEMMA2.n_layers]
        saved[remat] = sum(v.aval.size for v in scans[0].outvars)
    assert saved["full"] < saved["none"] / 4


def test_an_unknown_remat_policy_is_an_error_with_the_nearest():
    with pytest.raises(UserError, match=r"remat policy 'ful'.*'full'"):
        Setup(LLAMA, remat="ful")


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_compute_keeps_float32_gradients_near_those_of_float32(model):
    expected, _ = Setup(MODELS[model]).grads(packed_batch())
    setup = Setup(MODELS[model], compute="bfloat16")
    found, _ = setup.grads(packed_batch())
    assert all(array.dtype == np.float32 for array in found.values())
    for name, want in expected.items():
        cosine = (found[name] * want).sum() / np.linalg.norm(found[name]) / np.linalg.norm(want)
        assert cosine > 0.99, name


def test_the_trainers_graph_options_donate_only_the_group(tmp_path):
    setup = Setup(LLAMA, optim=OPTIM)
    graphs, s = Graphs(setup.mesh), setup.step
    state = graphs.compile("init", setup.optimizer.init, setup.params)(setup.params)
    placed = setup.place(packed_batch())
    sums = graphs.compile("grads", s.grads, setup.params, placed)(setup.params, placed)
    scale, _ = graphs.compile("finish", s.finish, sums, np.int32(0))(sums, np.int32(0))
    keys = list(setup.params)[:2]
    own = {k: state[k] for k in setup.optimizer.owned(keys)}
    shared = {k: state[k] for k in setup.optimizer.shared}

    def update(params, own, shared, grads, scale, step):
        return s.update(params, {**own, **shared}, grads, scale, step)

    args = ({k: setup.params[k] for k in keys}, own, shared, {k: sums[0][k] for k in keys}, scale, np.int32(0))
    graphs.compile("update", update, *args, donate=(0, 1))(*args)
    deleted = {k for k, a in {**setup.params, **state}.items() if a.is_deleted()}
    assert deleted == {*keys, *own}
    assert not any(a.is_deleted() for a in sums[0].values())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_groups_are_in_order_and_of_about_equal_bytes(count):
    keys = [f"k{i}" for i in range(20)]
    sizes = {k: 10 + i % 3 for i, k in enumerate(keys)}
    found = groups(keys, sizes, count)
    assert len(found) == count and list(itertools.chain(*found)) == keys
    totals = [sum(sizes[k] for k in part) for part in found]
    assert max(totals) - min(totals) <= 2 * max(sizes.values())


def test_more_groups_than_parameters_are_one_each():
    assert groups(["a", "b"], {"a": 3, "b": 3}, 9) == [["a"], ["b"]]


@pytest.mark.parametrize("optimizer", [SGD(), Adafactor(min_factored=8)])
def test_split_equals_fused_for_the_other_optimizers(optimizer):
    setup = Setup(SHALLOW, optim=OptimConfig(optimizer, Constant(), learning_rate=1e-2))
    params, _, _ = split(setup, packed_batch(), 1, 2)
    expected, _, _ = fused(setup, packed_batch(), 1)
    assert_near(params, expected, 1e-6)
