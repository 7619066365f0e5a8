"""The one matmul of the models: ``linear``, its form chosen per platform, shape and dtype.

Kernels are stored output-major ([out..., in...]): the order of Hugging Face files, and on CPU the only
one whose forward, decode and input gradient are all fast. Figures behind each choice: docs/kernels.md.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

# XLA:CPU runs a bfloat16 dot of fewer rows than this at scalar speed: 2 GB/s of weights against 20.
CPU_BF16_MIN_ROWS = 4


def activation_dtype(compute_dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations between matmuls when kernels are in ``compute_dtype``.

    On CPU element-wise work in bfloat16 is slower than in float32 and a bfloat16 result of a dot costs
    a pass, so only the operands of matmuls are bfloat16 there.
    """
    if _on_cpu() and compute_dtype == jnp.bfloat16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(compute_dtype)


def linear(x: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """``x`` [..., in...] times ``kernel`` [out..., in...] over the last ``contract`` dimensions: [..., out...].

    Operands are multiplied in the kernel's dtype, summed in at least float32, returned in x's dtype.
    """
    rows, inner = x.shape[: x.ndim - contract], x.shape[x.ndim - contract :]
    outer = kernel.shape[: kernel.ndim - contract]
    y = _dot(x.reshape(math.prod(rows), math.prod(inner)), kernel.reshape(math.prod(outer), math.prod(inner)))
    return y.reshape(*rows, *outer)


@jax.custom_vjp
def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[N, D] times [F, D] to [N, F] in x's dtype."""
    n = x.shape[0]
    a = x.astype(w.dtype)
    if _on_cpu() and w.dtype == jnp.bfloat16 and n < CPU_BF16_MIN_ROWS:
        a = jnp.pad(a, ((0, CPU_BF16_MIN_ROWS - n), (0, 0)))
    return _contract(a, w, 1, 1)[:n].astype(x.dtype)


def _dot_forward(x, w):
    return _dot(x, w), (x.astype(w.dtype), w, jnp.zeros((0,), x.dtype))


def _dot_backward(saved, g):
    x, w, like = saved
    g = g.astype(w.dtype)
    dx = _contract(g, w, 1, 0).astype(like.dtype)
    return dx, weight_gradient(g, x).astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def weight_gradient(g: jax.Array, x: jax.Array) -> jax.Array:
    """sum over rows of g [N, F] times x [N, D]: [F, D], in at least float32.

    XLA:CPU is up to four times slower when the contracted dimension of the left operand is not the minor one (and
    computes bfloat16 in float32 then), so there the narrower operand is transposed in memory first.
    """
    if not _on_cpu():
        return _contract(g, x, 0, 0)
    if g.shape[1] <= x.shape[1]:
        return _contract(_transposed(g), x, 1, 0)
    # The product too is laid out first, or XLA swaps the operands to be rid of the transpose after it.
    return _row_major(_contract(_transposed(x), g, 1, 0)).T


def _transposed(a: jax.Array) -> jax.Array:
    """The transpose in memory, where XLA would only relabel the dimensions."""
    return _row_major(a.T)


def _row_major(a: jax.Array) -> jax.Array:
    return with_layout_constraint(a, Layout((0, 1)))


def _contract(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=accumulate)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
