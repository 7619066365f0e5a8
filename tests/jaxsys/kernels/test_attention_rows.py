"""Attention over packed rows against a loop over tokens, in numpy."""

import jax
import numpy as np
import pytest
from tiny_models import packed_batch, x64

from jaxsys.kernels import attention
from jaxsys.kernels.attention import Rows, attend

B, T, H, K, h = 2, 16, 6, 2, 4


@pytest.fixture(params=["at once", "in chunks"], autouse=True)
def form(request, monkeypatch):
    """Every test with all queries together, and in chunks."""
    if request.param == "in chunks":
        monkeypatch.setattr(attention, "CHUNKED_FROM", T)


def oracle(q, k, v, segments, positions, window, scale, softcap):
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for t in range(T):
            keys = [
                s
                for s in range(t + 1)
                if segments[b, s] == segments[b, t] != 0
                and (window is None or positions[b, t] - positions[b, s] < window)
            ]
            if not keys:
                continue
            for head in range(H):
                kv = head // (H // K)
                scores = scale * k[b, keys, kv] @ q[b, t, head]
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                p = np.exp(scores - scores.max())
                out[b, t, head] = p / p.sum() @ v[b, keys, kv]
    return out


def inputs(dtype):
    rng = np.random.default_rng(0)
    batch = packed_batch(B, T)
    q, k, v = (rng.standard_normal((B, T, n, h)).astype(dtype) for n in (H, K, K))
    return q, k, v, batch["segments"], batch["positions"]


def run(q, k, v, segments, positions, window, softcap, dtype):
    def f(q, k, v):
        context = Rows(segments, positions)
        return attend(q, k, v, context, layer=0, window=window, scale=0.4, softcap=softcap, dtype=dtype)[0]

    return np.asarray(jax.jit(f)(q, k, v))


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_segments_windows_caps_and_grouped_heads_equal_a_loop_over_tokens(window, softcap):
    q, k, v, segments, positions = inputs("float64")
    with x64():
        found = run(q, k, v, segments, positions, window, softcap, "float64")
    np.testing.assert_allclose(found, oracle(q, k, v, segments, positions, window, 0.4, softcap), rtol=0, atol=1e-13)


def test_float32_is_close_to_the_oracle():
    q, k, v, segments, positions = inputs("float32")
    found = run(q, k, v, segments, positions, 4, None, "float32")
    expected = oracle(q, k, v, segments, positions, 4, 0.4, None)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_padding_gives_zeros_and_is_seen_by_nobody():
    q, k, v, segments, positions = inputs("float32")
    before = run(q, k, v, segments, positions, None, None, "float32")
    k[segments == 0], v[segments == 0] = 1e4, 1e4
    after = run(q, k, v, segments, positions, None, None, "float32")
    assert (segments == 0).any() and not after[segments == 0].any()
    np.testing.assert_array_equal(after, before)


def test_gradients_are_finite_where_a_row_has_no_key():
    q, k, v, segments, positions = inputs("float32")
    context = Rows(np.zeros_like(segments), positions)

    def f(q):
        return attend(q, k, v, context, layer=0, window=None, scale=0.4, softcap=None, dtype="float32")[0].sum()

    assert np.isfinite(np.asarray(jax.jit(jax.grad(f))(q))).all()


def test_chunks_multiply_no_key_that_comes_after_them(monkeypatch):
    q, k, v, segments, positions = inputs("float32")
    counted = {}
    for name, start in (("whole", T + 1), ("chunks", T)):
        monkeypatch.setattr(attention, "CHUNKED_FROM", start)

        def f(q, k, v):
            context = Rows(segments, positions)
            return attend(q, k, v, context, layer=0, window=None, scale=0.4, softcap=None, dtype="float32")[0]

        counted[name] = str(jax.make_jaxpr(f)(q, k, v)).count("dot_general")
    assert counted["chunks"] == 4 * counted["whole"]
