"""The grouped matmul of expert layers: rows sorted by expert, each times the kernel of its expert.

TPU and GPU have one (``lax.ragged_dot_general``). XLA:CPU multiplies every row by every kernel there, so on CPU it is a
loop over the experts that have rows and over blocks of those: see docs/kernels.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.kernels.matmul import weight_gradient
from parallelism.sharding import platform

# Rows of a block on CPU: multiples of 16, so that a row's result does not depend on its place in one; few enough that
# even shares fill two, and no more than full speed needs.
MIN_BLOCK, MAX_BLOCK = 16, 256


def grouped_linear(rows: jax.Array, kernel: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """``rows`` times their experts' kernels [E, F, D], output-major as in ``linear``: operands in the kernel's dtype,
    sums in at least float32, the result in the rows' dtype.

    rows: [R, D], the first ``sizes[0]`` of expert 0 and so on, sizes [E] int32: [R, F], zeros after the last.
    With sizes None rows are [E, C, D], equally many of each expert: [E, C, F].
    """
    a = rows.astype(kernel.dtype)
    if sizes is not None:
        return _grouped(a, kernel, sizes).astype(rows.dtype)
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum("ecd,efd->ecf", a, kernel, preferred_element_type=wide).astype(rows.dtype)


@jax.custom_vjp
def _grouped(a, kernel, sizes):
    """In at least float32."""
    return _product(a, kernel, sizes, 2)


def _grouped_forward(a, kernel, sizes):
    return _grouped(a, kernel, sizes), (a, kernel, sizes)


def _grouped_backward(saved, g):
    a, kernel, sizes = saved
    g = g.astype(kernel.dtype)
    d_kernel = _kernel_gradient(g, a, sizes)
    return _product(g, kernel, sizes, 1).astype(a.dtype), d_kernel.astype(kernel.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _product(a, kernel, sizes, over: int):
    """a [R, X] times the kernels [E, F, D], dimension ``over`` of which is X."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    if platform() != "cpu":
        numbers = lax.RaggedDotDimensionNumbers((((1,), (over,)), ((), ())), [0], [0])
        return lax.ragged_dot_general(a, kernel, sizes, numbers, preferred_element_type=wide)
    block = _block(a.shape[0], kernel.shape[0])

    def one_expert(e, start, stop, out):
        w = kernel[e]

        def one_block(at, out):
            y = lax.dot_general(_rows(a, at, block), w, (((1,), (over - 1,)), ((), ())), preferred_element_type=wide)
            # What lies after the expert's rows is another's, who comes later, or nobody's.
            return lax.dynamic_update_slice_in_dim(out, jnp.where(_within(at, stop, block), y, 0), at, 0)

        return _blocks(one_block, start, stop, block, out)

    R, X = a.shape[0], kernel.shape[3 - over]
    a = jnp.pad(a, ((0, block), (0, 0)))
    return _experts(one_expert, sizes, jnp.zeros((R + block, X), wide))[:R]


def _kernel_gradient(g, a, sizes):
    """sum over the rows of each expert of g [R, F] times a [R, D]: [E, F, D], in at least float32."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    if platform() != "cpu":
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return lax.ragged_dot_general(g, a, sizes, numbers, preferred_element_type=wide)
    E, F, D = sizes.shape[0], g.shape[1], a.shape[1]
    block = _block(g.shape[0], E)
    g, a = (jnp.pad(x, ((0, block), (0, 0))) for x in (g, a))

    def one_expert(e, start, stop, out):
        def one_block(at, total):
            own = jnp.where(_within(at, stop, block), _rows(g, at, block), 0)
            return total + weight_gradient(own, _rows(a, at, block))

        return out.at[e].set(_blocks(one_block, start, stop, block, jnp.zeros((F, D), wide)))

    return _experts(one_expert, sizes, jnp.zeros((E, F, D), wide))


def _block(rows: int, experts: int) -> int:
    """A power of two, about half of an even share."""
    share = rows // (2 * experts)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << share.bit_length() - 1 if share else 0))


def _experts(one, sizes, out):
    """``out`` after ``one(e, start, stop, out)`` for the experts that have rows, in order."""
    stops = jnp.cumsum(sizes, dtype=sizes.dtype)
    busy = jnp.argsort(sizes == 0, stable=True)
    count = (sizes > 0).sum(dtype=sizes.dtype)

    def body(i, out):
        e = busy[i]
        return one(e, stops[e] - sizes[e], stops[e], out)

    return lax.fori_loop(0, count, body, out)


def _blocks(one, start, stop, block, out):
    """``out`` after ``one(at, out)`` for each block of rows from ``start`` to ``stop``."""
    state = lax.while_loop(lambda s: s[0] < stop, lambda s: (s[0] + block, one(*s)), (start, out))
    return state[1]


def _rows(x, at, block):
    return lax.dynamic_slice_in_dim(x, at, block, 0)


def _within(at, stop, block):
    return (at + lax.broadcasted_iota(at.dtype, (block, 1), 0)) < stop
