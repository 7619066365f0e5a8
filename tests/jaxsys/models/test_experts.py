"""The mixture-of-experts layer against a loop over tokens and experts in numpy, float64."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import EXPERTS, LLAMA, host_arrays, packed_batch, x64

from jaxsys.kernels.attention import Rows
from jaxsys.models.config import Experts
from jaxsys.models.experts import MixtureOfExperts, balance_loss, router_metrics, z_loss
from jaxsys.models.state import build
from parallelism import UserError

B, T, D, E, K, F = 3, 11, 8, 5, 2, 6
BASE = Experts(E, K, F)
OPTIONS = {
    "softmax": BASE,
    "weights as they are": dataclasses.replace(BASE, normalise=False),
    "sigmoid, scaled": dataclasses.replace(BASE, routing="sigmoid", scale=2.5),
    "a shared expert": dataclasses.replace(BASE, shared_width=7, routing="sigmoid", normalise=False),
    "a capacity": dataclasses.replace(BASE, capacity_factor=0.7),
}


def silu(x):
    return x / (1 + np.exp(-x))


def unit(x, gate, up, down):
    return down @ (silu(gate @ x) * (up @ x))


def by_hand(p, e, x, used):
    """Output [B, T, D], and the sums of a router, token by token."""
    y, load, probability, z, dropped = np.zeros_like(x), np.zeros(E), np.zeros(E), 0.0, 0
    room = None if e.capacity_factor is None else int(np.ceil(e.capacity_factor * T * K / E))
    for b in range(B):
        taken = np.zeros(E, int)
        for t in range(T):
            if not used[b, t]:
                continue
            logits = p["router"] @ x[b, t]
            raised = np.exp(logits - logits.max())
            scores = raised / raised.sum() if e.routing == "softmax" else 1 / (1 + np.exp(-logits))
            chosen = np.argsort(-scores)[:K]
            weights = scores[chosen] * e.scale / (scores[chosen].sum() if e.normalise else 1)
            load[chosen] += 1
            probability += scores / scores.sum()
            z += np.log(np.exp(logits).sum()) ** 2
            for i, weight in zip(chosen, weights, strict=True):
                if room is not None and taken[i] >= room:
                    dropped += 1
                    continue
                taken[i] += 1
                y[b, t] += weight * unit(x[b, t], p["gate"][i], p["up"][i], p["down"][i])
            if e.shared_width:
                y[b, t] += unit(x[b, t], p["shared.gate"], p["shared.up"], p["shared.down"])
    return y, load, probability, z, dropped


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_sums_equal_a_loop_over_tokens(options):
    rng = np.random.default_rng(0)
    with x64():
        config = dataclasses.replace(LLAMA, d_model=D, experts=options)
        layer = MixtureOfExperts(config, options, dtype=np.float64, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(layer)
        state = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
        p = {".".join(map(str, path[:-1])): v[...] for path, v in nnx.to_flat_state(state)}
        x, used = rng.standard_normal((B, T, D)), rng.random((B, T)) > 0.2
        # Tokens that nobody uses may hold anything.
        poisoned = np.where(used[..., None], x, 1e30)
        run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, used, drop=True))
        found, sums = run(state, poisoned)
        y, load, probability, z, dropped = by_hand({k: np.asarray(v) for k, v in p.items()}, options, x, used)
    np.testing.assert_allclose(np.asarray(found)[used], y[used], rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(sums.load, load)
    np.testing.assert_allclose(sums.probability, probability, rtol=1e-12)
    np.testing.assert_allclose(sums.z, z, rtol=1e-12)
    assert sums.dropped == dropped and (dropped > 0) == (options.capacity_factor is not None)


def test_losses_and_metrics_are_those_of_the_papers():
    rng = np.random.default_rng(1)
    tokens, L = 40, 2
    load, probability = rng.integers(1, 9, (L, E)).astype(float), rng.random((L, E))
    from jaxsys.models.experts import RouterSums

    sums = RouterSums(load, probability, np.array([3.0, 5.0]), np.array([1.0, 0.0]))
    expected = np.mean([E * sum(load[n, i] / tokens * probability[n, i] / tokens for i in range(E)) for n in range(L)])
    assert balance_loss(sums, load, tokens) == pytest.approx(expected, rel=1e-6)
    assert z_loss(sums, tokens) == pytest.approx(8 / L / tokens)
    metrics = router_metrics(sums, tokens)
    assert metrics["expert_load"] == pytest.approx((load.max(1) / load.mean(1)).max())
    assert metrics["expert_dropped"] == pytest.approx(1 / load.sum())
    # An even load: each expert gets per_token / E of the tokens, with probability 1 / E.
    even = RouterSums(np.full((1, E), tokens * K / E), np.full((1, E), tokens / E), np.zeros(1), np.zeros(1))
    assert balance_loss(even, even.load, tokens) == pytest.approx(K)


def hidden(config, batch):
    model = build(config, dtype="float64", storage="listed")
    arrays = host_arrays(config, "float64")
    rows = Rows(batch["segments"], batch["positions"])
    return np.asarray(jax.jit(lambda p: model.bind(p)(batch["tokens"], rows)[0])(arrays))


def test_a_later_token_changes_no_earlier_one_where_experts_have_a_capacity():
    config = dataclasses.replace(EXPERTS, n_layers=1, experts=dataclasses.replace(BASE, capacity_factor=0.5))
    batch = packed_batch(1)
    changed = {**batch, "tokens": np.where(np.arange(16) < 10, batch["tokens"], 5).astype(np.int32)}
    with x64():
        np.testing.assert_array_equal(hidden(config, batch)[:, :10], hidden(config, changed)[:, :10])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 0}, "number: found 0, expected at least 1"),
        ({"per_token": 9}, "per_token: found 9, expected at most number=5"),
        ({"routing": "hash"}, "routing: found 'hash', expected softmax or sigmoid"),
        ({"capacity_factor": 0.0}, "capacity_factor: found 0.0, expected a number above 0"),
        ({"balance_loss": -1.0}, "balance_loss: found -1.0, expected at least 0"),
        ({"dense_layers": (1, 0)}, r"dense_layers: found \(1, 0\), expected layers in rising order"),
    ],
)
def test_settings_that_no_layer_has_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **change)


def test_dense_layers_that_the_model_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"experts.dense_layers: found \(2,\), expected layers below n_layers=2"):
        dataclasses.replace(LLAMA, experts=dataclasses.replace(BASE, dense_layers=(2,)))


def test_dense_layers_and_those_with_experts_are_spans_of_their_own():
    config = dataclasses.replace(LLAMA, n_layers=4, experts=dataclasses.replace(BASE, dense_layers=(0,)))
    spans = {key.split(".")[1] for key in build(config, storage="stacked").layout if key.startswith("layers.")}
    assert spans == {"0-0", "1-3"}


def test_work_of_a_token_is_that_of_the_experts_it_goes_to():
    e = dataclasses.replace(BASE, shared_width=3, dense_layers=(0,))
    dense, mixed = dataclasses.replace(LLAMA, experts=None), dataclasses.replace(LLAMA, experts=e)
    here = 3 * 32 * (K * F + 3) + 32 * E
    assert mixed.matmul_parameters() == dense.matmul_parameters() - 3 * 32 * LLAMA.d_ff + here
