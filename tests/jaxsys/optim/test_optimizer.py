"""Optimizers against plain optax on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.optim import SGD, WSD, Adafactor, AdamW, Constant, Cosine, OptimConfig, Optimizer
from parallelism import Layout, Logical, Stored
from parallelism.errors import UserError

STEPS = 7
SHAPES = {"a.kernel": (6, 4), "b.kernel": (5, 3, 4), "norm.scale": (4,)}


def layout(shapes=SHAPES, stacked=False, pad=0):
    out = []
    for key, shape in shapes.items():
        axes = ("norm",) if key.startswith("norm") else (None,) * len(shape)
        dtype = np.dtype(np.float32)
        if stacked:
            parts = tuple(Logical(f"{i}.{key}", shape, dtype, axes) for i in range(2))
            out.append(Stored(key, (2, *shape), dtype, ("layers", *axes), parts, stacked=True))
        else:
            stored = (shape[0] + pad, *shape[1:])
            out.append(Stored(key, stored, dtype, axes, (Logical(key, shape, dtype, axes),)))
    return Layout(out)


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


def ours(config, norm_scale=1.0):
    optimizer = Optimizer(config, layout(), STEPS)

    @jax.jit
    def step(params, state, grads, n):
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads.values()))
        return optimizer.update(params, state, grads, optimizer.clip_scale(norm), n)

    params, state = arrays(0), jax.jit(optimizer.init)(arrays(0))
    for n in range(STEPS):
        params, state = step(params, state, arrays(100 + n), np.int32(n))
    return params


def theirs(transform):
    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = arrays(0)
    state = transform.init(params)
    for n in range(STEPS):
        params, state = step(params, state, arrays(100 + n))
    return params


def rate(n):
    return 0.02 * 0.5 * (1 + jnp.cos(jnp.pi * n / STEPS))


MASK = {"a.kernel": True, "b.kernel": True, "norm.scale": False}
COSINE = Cosine(final=0.0)
CASES = {
    "adamw": (
        OptimConfig(AdamW(0.9, 0.95, 1e-8, 0.1), COSINE, 0.02, None),
        optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=MASK),
    ),
    "adamw, clipped": (
        OptimConfig(AdamW(0.8, 0.99, 1e-6, 0.0), COSINE, 0.02, 0.5),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, 0.8, 0.99, 1e-6, weight_decay=0.0)),
    ),
    "sgd": (OptimConfig(SGD(0.9), COSINE, 0.02, None), optax.sgd(rate, 0.9)),
    "sgd, nesterov": (OptimConfig(SGD(0.9, nesterov=True), COSINE, 0.02, None), optax.sgd(rate, 0.9, nesterov=True)),
    "sgd without momentum, clipped and decayed": (
        OptimConfig(SGD(0.0, weight_decay=0.3), COSINE, 0.02, 0.5),
        optax.chain(
            optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.3, MASK), optax.scale_by_learning_rate(rate)
        ),
    ),
    "adafactor": (
        OptimConfig(Adafactor(min_factored=4), COSINE, 0.02, None),
        optax.adafactor(rate, min_dim_size_to_factor=4, multiply_by_parameter_scale=False, clipping_threshold=1.0),
    ),
    "adafactor, nothing factored": (
        OptimConfig(Adafactor(decay_rate=0.7, clipping_threshold=0.4), COSINE, 0.02, None),
        optax.adafactor(rate, decay_rate=0.7, multiply_by_parameter_scale=False, clipping_threshold=0.4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_plain_optax(name):
    config, transform = CASES[name]
    found, expected, start = ours(config), theirs(transform), arrays(0)
    for key in SHAPES:
        moved = np.abs(np.asarray(expected[key]) - start[key]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=2e-6 * max(1.0, moved))


def test_weight_decay_spares_norms():
    zero = {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}
    optimizer = Optimizer(OptimConfig(AdamW(weight_decay=0.5), Constant(), 0.1), layout(), STEPS)
    params, _ = optimizer.update(arrays(0), optimizer.init(arrays(0)), zero, jnp.float32(1), jnp.int32(0))
    np.testing.assert_array_equal(params["norm.scale"], arrays(0)["norm.scale"])
    np.testing.assert_allclose(params["a.kernel"], 0.95 * arrays(0)["a.kernel"], rtol=1e-6)


def test_clip_scale_leaves_what_is_below_and_caps_what_is_above():
    clip = Optimizer(OptimConfig(clip_norm=2.0), layout(), STEPS).clip_scale
    assert [float(clip(jnp.float32(x))) for x in (0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 1.0, 0.25]
    assert float(Optimizer(OptimConfig(clip_norm=None), layout(), STEPS).clip_scale(jnp.float32(8.0))) == 1.0


@pytest.mark.parametrize(("form", "options"), [("padded", {"pad": 2}), ("stacked", {"stacked": True})])
def test_adafactor_refuses_a_layout_that_would_change_its_means(form, options):
    with pytest.raises(UserError, match=f"adafactor: a.kernel is stored {form}"):
        Optimizer(OptimConfig(Adafactor()), layout(**options), STEPS)


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(), Adafactor(min_factored=4)])
def test_owned_and_shared_names_are_the_whole_state_once(optimizer):
    made = Optimizer(OptimConfig(optimizer), layout(), STEPS)
    names = [*made.owned(["a.kernel"]), *made.owned(["b.kernel", "norm.scale"]), *made.shared]
    assert sorted(names) == sorted(made.init(arrays(0))) == sorted(made.layout_of_state()[0])


def test_moments_have_the_layout_of_their_parameters():
    made = Optimizer(OptimConfig(AdamW()), layout(stacked=True), STEPS)
    state, like = made.layout_of_state()
    assert like["optimizer.mu.a.kernel"] == "a.kernel" and like["optimizer.count"] is None
    assert [p.name for p in state["optimizer.nu.b.kernel"].parts] == [f"optimizer.nu.{i}.b.kernel" for i in range(2)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 1.0, 50: 1.0, 100: 1.0}),
        (Constant(warmup_steps=10), {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0}),
        (Cosine(), {0: 1.0, 50: 0.55, 100: 0.1, 120: 0.1}),
        (Cosine(warmup_steps=20, final=0.0), {0: 0.05, 19: 1.0, 20: 1.0, 40: 0.5 + 2**-1.5, 60: 0.5, 100: 0.0}),
        (WSD(), {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        (WSD(warmup_steps=4, decay=0.5, final=0.2), {0: 0.25, 3: 1.0, 50: 1.0, 75: 0.6, 100: 0.2}),
    ],
)
def test_schedules_have_their_closed_forms(schedule, expected):
    for step, factor in expected.items():
        assert float(schedule.factor(jnp.int32(step), 100)) == pytest.approx(factor, abs=1e-6), step


def test_the_learning_rate_is_the_factor_of_the_peak():
    optimizer = Optimizer(OptimConfig(schedule=WSD(decay=0.5), learning_rate=0.4), layout(), 100)
    assert float(optimizer.learning_rate(jnp.int32(75))) == pytest.approx(0.2)
