"""Cross-entropy against float64 numpy that holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import x64

from jaxsys.kernels import loss

B, T, D, V, PADDED = 3, 13, 4, 21, 24


def oracle(hidden, kernel, targets, vocabulary, softcap):
    """Sum of -log p, targets, gradients with respect to hidden and kernel, in float64."""
    hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
    raw = hidden @ kernel[:vocabulary].T
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    shifted = logits - logits.max(-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    valid = targets >= 0
    hit = np.eye(vocabulary)[np.maximum(targets, 0)]
    total = -(np.log(p) * hit).sum(-1)[valid].sum()
    d = (p - hit) * valid[..., None]
    if softcap is not None:
        d = d * (1 - np.tanh(raw / softcap) ** 2)
    d_kernel = np.zeros(kernel.shape)
    d_kernel[:vocabulary] = np.einsum("btv,btd->vd", d, hidden)
    return total, valid.sum(), d @ kernel[:vocabulary], d_kernel


def inputs(dtype, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, V, (B, T))
    targets[rng.random((B, T)) < 0.3] = -1
    return rng.standard_normal((B, T, D)).astype(dtype), rng.standard_normal((PADDED, D)).astype(dtype), targets


def value_and_grads(hidden, kernel, targets, softcap):
    def total(hidden, kernel):
        value, count = loss.cross_entropy(hidden, kernel, targets, V, softcap)
        return value, count

    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (value, count), (d_hidden, d_kernel) = compiled(jnp.asarray(hidden), jnp.asarray(kernel))
    return value, count, d_hidden, d_kernel


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("allowed", "chunk"), [(2, 2), (4, 4), (6, 5), (13, 13)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_value_and_gradients_equal_the_oracle_at_any_chunk(monkeypatch, dtype, tolerance, allowed, chunk, softcap):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", allowed * B * PADDED)
    assert loss.chunk_length(B, T, D, PADDED) == chunk
    hidden, kernel, targets = inputs(dtype)
    with x64(dtype == "float64"):
        found = value_and_grads(hidden, kernel, targets, softcap)
    for got, want in zip(found, oracle(hidden, kernel, targets, V, softcap), strict=True):
        assert np.linalg.norm(np.asarray(got) - want) <= tolerance * np.linalg.norm(want)


def test_rows_beyond_the_vocabulary_change_nothing_and_get_no_gradient():
    hidden, kernel, targets = inputs("float32")
    other = kernel.copy()
    other[V:] = 50.0
    one, two = value_and_grads(hidden, kernel, targets, None), value_and_grads(hidden, other, targets, None)
    assert float(one[0]) == float(two[0])
    assert not np.asarray(two[3])[V:].any()


def test_a_batch_without_targets_has_loss_and_gradients_zero():
    hidden, kernel, targets = inputs("float32")
    value, count, d_hidden, d_kernel = value_and_grads(hidden, kernel, np.full_like(targets, -1), None)
    assert (float(value), float(count)) == (0.0, 0.0)
    assert not np.asarray(d_hidden).any() and not np.asarray(d_kernel).any()


def test_the_value_without_a_gradient_is_the_same():
    hidden, kernel, targets = inputs("float32")
    plain = jax.jit(lambda h, k: loss.cross_entropy(h, k, targets, V)[0])(hidden, kernel)
    assert float(plain) == pytest.approx(float(value_and_grads(hidden, kernel, targets, None)[0]), rel=1e-6)


def test_the_logits_of_all_tokens_are_never_held(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)  # then as many as the hidden states: two positions
    hidden, kernel, targets = inputs("float32")
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: loss.cross_entropy(h, kernel, targets, V)[0]))(hidden)
    assert f"{B},{T},{PADDED}]" not in str(jaxpr)
    assert f"{B},2,{PADDED}]" in str(jaxpr)


@pytest.mark.parametrize(
    ("batch", "length", "width", "vocabulary", "expected"),
    [
        (8, 256, 576, 49152, 16),
        (8, 127, 576, 49152, 19),
        (8, 251, 576, 49152, 21),
        (64, 4096, 2048, 128256, 64),
        (8, 256, 384, 8192, 128),
        (2, 1, 16, 1 << 24, 1),
    ],
)
def test_chunks_are_large_whatever_divides_the_length(batch, length, width, vocabulary, expected):
    found = loss.chunk_length(batch, length, width, vocabulary)
    assert found == expected
    assert batch * found * vocabulary <= max(loss.CHUNK_LOGITS, batch * length * width) or found == 1
    assert -length % found < -(-length // found)
