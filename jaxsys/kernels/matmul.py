"""The one matmul of the models: ``linear``, its form chosen per platform, shape and dtype.

Kernels are stored output-major ([out..., in...]): the order of Hugging Face files, and on CPU the only
one whose forward, decode and input gradient are all fast. Figures behind each choice: docs/kernels.md.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint

from jaxsys.kernels.alike import alike
from parallelism.sharding import current, manual_axes, platform

# XLA:CPU runs a bfloat16 dot of fewer rows than this at scalar speed: 2 GB/s of weights against 20.
CPU_BF16_MIN_ROWS = 4
# Kernels with more inputs than outputs are faster as the left operand, which wants this many columns: 14 against 10.
CPU_BF16_COLUMNS = 16
# Up to so many rows a product is faster with the kernel as the left operand, up to twice: see ``_kernel_left``.
CPU_FEW_ROWS = 64


def activation_dtype(compute_dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations between matmuls when kernels are in ``compute_dtype``.

    On CPU element-wise work in bfloat16 is slower than in float32 and a bfloat16 result of a dot costs
    a pass, so only the operands of matmuls are bfloat16 there.
    """
    if _on_cpu() and compute_dtype == jnp.bfloat16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(compute_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, contract: int = 1) -> jax.Array:
    """``x`` [..., in...] times ``kernel`` [out..., in...] over the last ``contract`` dimensions: [..., out...].

    Operands are multiplied in the kernel's dtype, summed in at least float32, returned in x's dtype.
    """
    a = x.astype(kernel.dtype)
    if not _on_cpu():
        # Never flattened: where rows and tokens are split over different mesh axes, their product cannot be.
        inner = tuple(range(-contract, 0))
        return _contract(a, kernel, inner, inner).astype(x.dtype)
    rows, outer = x.shape[: x.ndim - contract], kernel.shape[: kernel.ndim - contract]
    a, w = _matrix(a, x.ndim - contract), _matrix(kernel, len(outer))
    n = a.shape[0]
    if w.dtype == jnp.bfloat16 and n < CPU_BF16_MIN_ROWS:
        y = _few_rows(a, w)
    elif _kernel_left(n, w):
        y = _row_major(_contract(w, a, (1,), (1,))).T
    else:
        y = _contract(a, w, (1,), (1,))
    return y.astype(x.dtype).reshape(*rows, *outer)


def _kernel_left(n: int, w: jax.Array) -> bool:
    """Whether w [F, D] is the left operand for n rows on CPU. Laid out as it comes, or XLA swaps the operands back."""
    f, d = w.shape
    if alike():
        return False
    if w.dtype == jnp.bfloat16:
        return d > f and 8 <= n <= CPU_FEW_ROWS
    return 1 < n <= CPU_FEW_ROWS


def _few_rows(a: jax.Array, w: jax.Array) -> jax.Array:
    """a [N, D] times w [F, D] in bfloat16 on CPU, for N so small that XLA's own form is a scalar loop."""
    (n, d), f = a.shape, w.shape[0]
    if d > f:
        return _contract(w, jnp.pad(a, ((0, CPU_BF16_COLUMNS - n), (0, 0))), (1,), (1,))[:, :n].T
    return _contract(jnp.pad(a, ((0, CPU_BF16_MIN_ROWS - n), (0, 0))), w, (1,), (1,))[:n]


def _linear_forward(x, kernel, contract):
    return linear(x, kernel, contract), (x.astype(kernel.dtype), kernel, jnp.zeros((0,), x.dtype))


def _linear_backward(contract, saved, g):
    x, kernel, like = saved
    g = g.astype(kernel.dtype)
    outer = kernel.ndim - contract
    rows = g.ndim - outer
    if not _on_cpu():
        dx = _contract(g, kernel, tuple(range(rows, g.ndim)), tuple(range(outer)))
        dw = _contract(g, x, tuple(range(rows)), tuple(range(rows)))
    else:
        dx = _contract(_matrix(g, rows), _matrix(kernel, outer), (1,), (0,)).reshape(x.shape)
        dw = weight_gradient(_matrix(g, rows), _matrix(x, rows)).reshape(kernel.shape)
    return dx.astype(like.dtype), dw.astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def _matrix(a: jax.Array, rows: int) -> jax.Array:
    """The first ``rows`` dimensions as one, the others as another."""
    return a.reshape(math.prod(a.shape[:rows]), math.prod(a.shape[rows:]))


def weight_gradient(g: jax.Array, x: jax.Array) -> jax.Array:
    """sum over rows of g [N, F] times x [N, D]: [F, D], in at least float32.

    XLA:CPU is up to four times slower when the contracted dimension of the left operand is not the minor one (and
    computes bfloat16 in float32 then), so there the narrower operand is transposed in memory first.
    """
    if not _on_cpu():
        return _contract(g, x, (0,), (0,))
    if g.shape[1] <= x.shape[1]:
        return _contract(transposed(g), x, (1,), (0,))
    # The product too is laid out first, or XLA swaps the operands to be rid of the transpose after it.
    return _row_major(_contract(transposed(x), g, (1,), (0,))).T


def transposed(a: jax.Array) -> jax.Array:
    """The transpose in memory, where XLA would only relabel the dimensions."""
    return _row_major(a.T)


ROW_MAJOR = Layout((0, 1))


def _row_major(a: jax.Array) -> jax.Array:
    context, manual = current(), manual_axes()
    shape = {} if context is None else context.mesh.shape
    if all(size == 1 or axis in manual for axis, size in shape.items()):
        return with_layout_constraint(a, ROW_MAJOR)
    # Where some axes are manual (stages of a pipeline) and others not, a partitioning of one's own fails to compile.
    return a if manual else _row_major_pieces(a)


@custom_partitioning
def _row_major_pieces(a: jax.Array) -> jax.Array:
    """Each device's piece of ``a``: left to itself the compiler gathers the whole of what a layout constraint takes."""
    return with_layout_constraint(a, ROW_MAJOR)


def _split_row_major(mesh: Any, arguments: Any, _: Any) -> tuple:
    sharding = arguments[0].sharding
    return mesh, lambda a: with_layout_constraint(a, ROW_MAJOR), sharding, (sharding,)


_row_major_pieces.def_partition(partition=_split_row_major, sharding_rule="i j -> i j")


def _contract(a: jax.Array, b: jax.Array, over_a: tuple[int, ...], over_b: tuple[int, ...]) -> jax.Array:
    over = tuple(i % a.ndim for i in over_a), tuple(i % b.ndim for i in over_b)
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (over, ((), ())), preferred_element_type=accumulate)


def _on_cpu() -> bool:
    return platform() == "cpu"
