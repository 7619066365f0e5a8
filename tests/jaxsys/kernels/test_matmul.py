"""linear: values and gradients, in each of its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import x64

from jaxsys.kernels import matmul
from jaxsys.kernels.matmul import CPU_BF16_MIN_ROWS, linear, weight_gradient


@pytest.fixture(params=["CPU", "elsewhere"], autouse=True)
def form(request, monkeypatch):
    """Every test in the form for CPU and in that for other platforms."""
    monkeypatch.setattr(matmul, "_on_cpu", lambda: request.param == "CPU")


def near(found, expected, tolerance):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def arrays(x_shape, w_shape, y_shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) for shape in (x_shape, w_shape, y_shape))


def forward_and_gradients(x, w, g, contract):
    def run(x, w, g):
        y, pull = jax.vjp(lambda x, w: linear(x, w, contract), x, w)
        return (y, *pull(g.astype(y.dtype)))

    return jax.jit(run)(jnp.asarray(x), jnp.asarray(w), jnp.asarray(g))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-6)])
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_forward_and_gradients_equal_numpy(rows, dtype, tolerance):
    x, w, g = (a.astype(dtype) for a in arrays((rows, 24), (40, 24), (rows, 40)))
    with x64(dtype == "float64"):
        y, dx, dw = forward_and_gradients(x, w, g, 1)
    for found, expected in ((y, x @ w.T), (dx, g @ w), (dw, g.T @ x)):
        near(found, expected, tolerance)


def test_two_contracted_dimensions_and_several_outputs():
    x, w, g = (a.astype(np.float32) for a in arrays((2, 5, 3, 4), (7, 6, 3, 4), (2, 5, 7, 6)))
    y, dx, dw = forward_and_gradients(x, w, g, 2)
    near(y, np.einsum("btij,fgij->btfg", x, w), 1e-6)
    near(dx, np.einsum("btfg,fgij->btij", g, w), 1e-6)
    near(dw, np.einsum("btfg,btij->fgij", g, x), 1e-6)


@pytest.mark.parametrize("rows", [1, CPU_BF16_MIN_ROWS - 1, CPU_BF16_MIN_ROWS, 64, 130])
@pytest.mark.parametrize("activations", ["bfloat16", "float32"])
def test_bfloat16_kernels_round_the_operands_and_nothing_else(rows, activations):
    """Against float64 products of the rounded operands: what is left is one rounding of each result."""
    bf16 = jnp.bfloat16
    x, w, g = arrays((rows, 48), (32, 48), (rows, 32))
    x, w, g = np.asarray(x, activations), np.asarray(w, bf16), np.asarray(g, activations)
    xr, wr, gr = (np.asarray(a, bf16).astype(np.float64) for a in (x, w, g))
    y, dx, dw = forward_and_gradients(x, w, g, 1)
    assert (y.dtype, dx.dtype, dw.dtype) == (activations, activations, bf16)
    coarse = 4e-3 if activations == "bfloat16" else 1e-6
    near(y, xr @ wr.T, coarse)
    near(dx, gr @ wr, coarse)
    near(dw, gr.T @ xr, 4e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(64, 48, 32), (33, 7, 5), (130, 96, 64)])
def test_the_weight_gradient_is_a_sum_in_float32(shape, dtype):
    n, f, d = shape
    g, x, _ = arrays((n, f), (n, d), (1,))
    g, x = np.asarray(g, dtype), np.asarray(x, dtype)
    found = jax.jit(weight_gradient)(jnp.asarray(g), jnp.asarray(x))
    assert found.dtype == jnp.float32
    near(found, g.astype(np.float64).T @ x.astype(np.float64), 1e-6)
