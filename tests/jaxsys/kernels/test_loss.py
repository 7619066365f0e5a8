"""Cross-entropy against float64 numpy that holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import x64

from jaxsys.kernels import loss
from parallelism import MeshSpec, sharding_context
from parallelism.collectives import collectives

B, T, D, V, PADDED = 3, 12, 4, 21, 24


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
@pytest.mark.parametrize(("allowed", "chunk"), [(6, 6), (7, 6), (13, 12), (17, 12), (36, 36)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_value_and_gradients_equal_the_oracle_at_any_chunk(monkeypatch, dtype, tolerance, allowed, chunk, softcap):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", allowed * PADDED)
    assert loss.chunk_rows(B * T, D, PADDED) == chunk
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
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)  # then as many as the hidden states: six tokens
    hidden, kernel, targets = inputs("float32")
    jaxpr = jax.make_jaxpr(jax.grad(lambda h: loss.cross_entropy(h, kernel, targets, V)[0]))(hidden)
    assert f"[{B * T},{PADDED}]" not in str(jaxpr) and f"{B},{T},{PADDED}]" not in str(jaxpr)
    assert f"[6,{PADDED}]" in str(jaxpr)


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "expected"),
    [
        (2048, 576, 49152, 158),
        (2008, 576, 49152, 168),
        (1 << 18, 2048, 128256, 4162),
        (2048, 384, 8192, 1024),
        (2, 16, 1 << 24, 1),
    ],
)
def test_chunks_are_large_whatever_divides_the_rows(rows, width, vocabulary, expected):
    found = loss.chunk_rows(rows, width, vocabulary)
    assert found == expected
    assert found * vocabulary <= max(loss.CHUNK_LOGITS, rows * width) or found == 1
    assert -rows % found < -(-rows // found)


MESHES = ("data=2,fsdp=4", "fsdp=2,tensor=3", "context=2,tensor=2", "tensor=5")


@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_mesh_it_equals_the_oracle(mesh):
    """A vocabulary of 24 rows over 3, 2 and 5 devices: split, split, and whole where it does not divide."""
    hidden, kernel, targets = inputs("float64")
    hidden, targets = np.tile(hidden, (8, 1, 1)), np.tile(targets, (8, 1))
    built = MeshSpec.parse(mesh).build()

    def total(hidden, kernel):
        with sharding_context(built):
            return loss.cross_entropy(hidden, kernel, targets, V, 2.0)

    with x64():
        (value, count), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, kernel)
        plain = jax.jit(lambda h, k: total(h, k)[0])(hidden, kernel)
    for got, want in zip((value, count, *grads), oracle(hidden, kernel, targets, V, 2.0), strict=True):
        assert np.linalg.norm(np.asarray(got) - want) <= 1e-12 * np.linalg.norm(want)
    assert float(plain) == pytest.approx(float(value), rel=1e-13)


def test_the_kernels_gradient_is_summed_over_devices_once(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)
    hidden, kernel, targets = inputs("float32")
    hidden, targets = np.tile(hidden, (8, 1, 1)), np.tile(targets, (8, 1))
    built = MeshSpec.parse("fsdp=4,tensor=2").build()

    def total(hidden, kernel):
        with sharding_context(built):
            return loss.cross_entropy(hidden, kernel, targets, V)[0]

    text = jax.jit(jax.grad(total, 1)).lower(hidden, kernel).compile().as_text()
    sums = [c for c in collectives(text, built) if c.axes == ("fsdp",) and c.nbytes >= kernel.nbytes // 2]
    assert [c.count for c in sums] == [1]
