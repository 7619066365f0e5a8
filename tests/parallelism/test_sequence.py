"""Context parallelism against full attention on one device in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallelism import MeshSpec, UserError, sharding_context
from parallelism.sequence import METHODS, Block, attention, balanced_order

SOFTCAP = 5.0


def scores(q, k, scale=0.5):
    s = jnp.einsum("bqkgh,bskh->bqkgs", q, k) * scale
    return SOFTCAP * jnp.tanh(s / SOFTCAP)


def forward(q, k, v, seen):
    s = jnp.where(seen[:, :, None, None], scores(q, k), -1e30)
    top = s.max(-1, keepdims=True)
    p = jnp.where(seen[:, :, None, None], jnp.exp(s - top), 0)
    total = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bqkgs,bskh->bqkgh", p / total, v), (top + jnp.log(total))[..., 0]


def backward(q, k, v, seen, normaliser, delta, g):
    s, pull = jax.vjp(scores, q, k)
    p = jnp.where(seen[:, :, None, None], jnp.exp(s - normaliser[..., None]), 0)
    ds = p * (jnp.einsum("bqkgh,bskh->bqkgs", g, v) - delta[..., None])
    dq, dk = pull(ds)
    return dq, dk, jnp.einsum("bqkgs,bqkgh->bskh", p, g)


def block(window=None):
    def seen(queries, keys):
        (qs, qp), (ks, kp) = queries, keys
        away = qp[:, :, None] - kp[:, None, :]
        found = (qs[:, :, None] == ks[:, None, :]) & (qs > 0)[:, :, None] & (away >= 0)
        return found if window is None else found & (away < window)

    return Block(seen, forward, backward)


def material(B=2, T=32, K=3, G=3, h=4, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s) for s in ((B, T, K, G, h), (B, T, K, h), (B, T, K, h)))
    at = np.arange(T)
    segments = np.stack([np.where(at < 13, 1, 2) * (at < 29), np.ones(T)])[:B].astype(np.int32)
    positions = np.stack([np.where(at < 13, at, at - 13), at])[:B].astype(np.int32)
    return q, k, v, (segments, positions)


def both(fn, q, k, v, tokens):
    """Output and the three gradients."""

    def everything(q, k, v, tokens):
        return fn(q, k, v, tokens), jax.grad(weighted(fn), (0, 1, 2))(q, k, v, tokens)

    def weighted(fn):
        # A weight that goes with the token, whatever the order.
        def value(q, k, v, tokens):
            weight = 1 + jnp.cos(tokens[1] * 7.0 + tokens[0] * 3.0)
            return (fn(q, k, v, tokens) * weight[:, :, None, None, None]).sum()

        return value

    out, grads = jax.jit(everything)(q, k, v, tokens)
    return [np.asarray(a) for a in (out, *grads)]


def parallel(mesh, method, window, arrays, tokens):
    built = MeshSpec.parse(mesh).build()
    order = balanced_order(arrays[0].shape[1], built.shape["context"])

    def fn(q, k, v, tokens):
        with sharding_context(built):
            return attention(q, k, v, tokens, block(window), method)

    placed = [a[:, order] for a in arrays]
    found = both(fn, *placed, jax.tree.map(lambda a: a[:, order], tokens))
    return [a[:, np.argsort(order)] for a in found]


@pytest.fixture(autouse=True)
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


CASES = {
    "two pieces": ("context=2", 3, 3, None),
    "four pieces, heads that do not divide": ("context=4", 3, 3, None),
    "a window": ("context=4", 2, 2, 5),
    "heads over tensor": ("context=2,tensor=2", 4, 1, None),
    "heads over tensor and rows over data": ("data=2,context=2,tensor=2", 2, 2, 7),
    "one key/value head for all": ("context=4", 1, 4, None),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_full_attention(method, case):
    mesh, K, G, window = CASES[case]
    q, k, v, tokens = material(K=K, G=G)
    b = block(window)
    expected = both(lambda q, k, v, t: forward(q, k, v, b.seen(t, t))[0], q, k, v, tokens)
    for found, want in zip(parallel(mesh, method, window, (q, k, v), tokens), expected, strict=True):
        assert np.linalg.norm(found - want) <= 1e-9 * np.linalg.norm(want)


def test_each_piece_has_an_equal_share_of_the_triangle():
    for n in (1, 2, 4, 8):
        order = balanced_order(32, n).reshape(n, -1)
        assert sorted(order.ravel()) == list(range(32))
        assert len({int((piece + 1).sum()) for piece in order}) == 1


def test_a_row_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"rows of 30 tokens on context=4: .* multiple of 16"):
        balanced_order(30, 4)


def test_an_unknown_method_names_the_nearest():
    q, k, v, tokens = material()
    with pytest.raises(UserError, match=r"'token_rng'.*'token_ring'"), sharding_context(MeshSpec(context=2).build()):
        attention(q, k, v, tokens, block(), "token_rng")
