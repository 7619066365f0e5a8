"""The grouped matmul against a loop over experts in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import x64

from jaxsys.kernels import grouped
from jaxsys.kernels.grouped import _block_sizes, grouped_linear

R, E, D, F = 75, 5, 12, 7
SIZES = {
    "all rows": (20, 0, 33, 1, 21),
    "some rows": (0, 17, 0, 30, 16),
    "one expert": (0, 0, 75, 0, 0),
    "none": (0,) * 5,
}


def material(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((R, D)), rng.standard_normal((E, F, D)), rng.standard_normal((R, F))


def by_hand(rows, kernel, sizes):
    out, at = np.zeros((R, F)), 0
    for e, size in enumerate(sizes):
        out[at : at + size] = rows[at : at + size] @ kernel[e].T
        at += size
    return out


def gradients_by_hand(rows, kernel, g, sizes):
    d_rows, d_kernel, at = np.zeros_like(rows), np.zeros_like(kernel), 0
    for e, size in enumerate(sizes):
        here = slice(at, at + size)
        d_rows[here], d_kernel[e] = g[here] @ kernel[e], g[here].T @ rows[here]
        at += size
    return d_rows, d_kernel


@jax.jit
def product_and_gradients(rows, kernel, sizes, g):
    out, pull = jax.vjp(lambda r, k: grouped_linear(r, k, sizes), rows, kernel)
    return out, *pull(g)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients_equal_a_loop_over_experts(sizes):
    rows, kernel, g = material()
    with x64():
        found = product_and_gradients(rows, kernel, np.array(sizes, np.int32), g)
    expected = (by_hand(rows, kernel, sizes), *gradients_by_hand(rows, kernel, g, sizes))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_rows_that_belong_to_nobody_are_not_read():
    rows, kernel, _ = material()
    sizes = SIZES["some rows"]
    poisoned = rows.copy()
    poisoned[sum(sizes) :] = np.nan
    with x64():
        found = jax.jit(grouped_linear)(poisoned, kernel, np.array(sizes, np.int32))
    np.testing.assert_allclose(found, by_hand(rows, kernel, sizes), rtol=0, atol=1e-12)


def test_bfloat16_is_summed_in_float32():
    rows, kernel, g = (a.astype(jnp.bfloat16) for a in material())
    sizes = SIZES["all rows"]
    found = product_and_gradients(rows.astype(np.float32), kernel, np.array(sizes, np.int32), g.astype(np.float32))
    wide = [a.astype(np.float64) for a in (rows, kernel, g)]
    expected = (by_hand(*wide[:2], sizes), *gradients_by_hand(*wide, sizes))
    assert [a.dtype for a in found] == [np.float32, np.float32, jnp.bfloat16]
    for a, b, tolerance in zip(found, expected, (1e-6, 1e-2, 1e-2), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * np.linalg.norm(b)


def test_equally_many_rows_of_each_expert_are_a_batched_product():
    rows, kernel, _ = material()
    each = rows.reshape(E, R // E, D)
    with x64():
        found = jax.jit(lambda r, k: grouped_linear(r, k, None))(each, kernel)
    np.testing.assert_allclose(
        np.asarray(found).reshape(R, F), by_hand(rows, kernel, (R // E,) * E), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_blocks_of_two_sizes_give_the_same(monkeypatch, sizes):
    monkeypatch.setattr(grouped, "_block_sizes", lambda rows, experts: (32, 16))
    rows, kernel, g = material()
    with x64():
        found = jax.jit(lambda *of: product_and_gradients.__wrapped__(*of))(rows, kernel, np.array(sizes, np.int32), g)
    expected = (by_hand(rows, kernel, sizes), *gradients_by_hand(rows, kernel, g, sizes))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "experts", "blocks"),
    [(8, 8, (16, 16)), (512, 8, (32, 32)), (1024, 8, (128, 32)), (4096, 8, (256, 64)), (1 << 20, 8, (256, 64))],
)
def test_blocks_are_powers_of_two_of_one_size_where_an_even_share_is_few_rows(rows, experts, blocks):
    assert _block_sizes(rows, experts) == blocks


def test_a_rows_result_does_not_depend_on_how_many_its_expert_has_where_blocks_are_of_one_size():
    rows, kernel, _ = (a.astype(np.float32) for a in material())
    alone = jax.jit(grouped_linear)(np.roll(rows, -3, 0), kernel, np.array((1, 0, 0, 0, 0), np.int32))[0]
    among = jax.jit(grouped_linear)(rows, kernel, np.array((40, 35, 0, 0, 0), np.int32))[3]
    np.testing.assert_array_equal(alone, among)


def test_the_work_on_cpu_is_that_of_the_rows_and_not_of_all_experts():
    """Blocks gone through: each expert's rows rounded up, and none for an expert without rows."""
    rows, kernel, _ = material()
    text = (
        jax.jit(grouped_linear)
        .lower(rows.astype(np.float32), kernel.astype(np.float32), np.zeros(E, np.int32))
        .as_text()
    )
    assert f"tensor<{_block_sizes(R, E)[0]}x{D}xf32>" in text and f"tensor<{R}x{E}x" not in text
