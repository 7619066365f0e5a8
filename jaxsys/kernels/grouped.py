"""The grouped matmul of expert layers: rows sorted by expert, each times the kernel of its expert.

TPU and GPU have one (``lax.ragged_dot_general``). XLA:CPU multiplies every row by every kernel there, so on CPU it is a
loop over the experts that have rows and over blocks of those: see docs/kernels.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.kernels.matmul import transposed
from parallelism.sharding import platform

# Rows of a block on CPU: multiples of 16, so that a row's result does not depend on its place in one, and no more than
# full speed needs. Blocks of two sizes waste fewer rows, but a row's result then depends on how many its expert has: so
# only for shares above those of the program that computes bitwise the same whatever else is in a batch (64 rows).
MIN_BLOCK, MAX_BLOCK, MIXED_BLOCKS = 16, 256, 128


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
    (R, _), (E, X) = a.shape, (kernel.shape[0], kernel.shape[3 - over])
    blocks = _block_sizes(R, E)
    a = _at_least(a, blocks[-1])

    def one_expert(e, start, stop, out):
        w = _rows(kernel, e, 1)[0]

        def one_block(here, block, inside, out):
            y = lax.dot_general(_rows(a, here, block), w, (((1,), (over - 1,)), ((), ())), preferred_element_type=wide)
            y = y if inside is None else jnp.where(inside, y, _rows(out, here, block))
            return lax.dynamic_update_slice_in_dim(out, y, here, 0)

        return _blocks(one_block, start, stop, a.shape[0], blocks, out)

    return _experts(one_expert, sizes, jnp.zeros((a.shape[0], X), wide))[:R]


def _kernel_gradient(g, a, sizes):
    """sum over the rows of each expert of g [R, F] times a [R, D]: [E, F, D], in at least float32."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    if platform() != "cpu":
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return lax.ragged_dot_general(g, a, sizes, numbers, preferred_element_type=wide)
    (R, F), D, E = g.shape, a.shape[1], sizes.shape[0]
    blocks = _block_sizes(R, E)
    g, a = (_at_least(x, blocks[-1]) for x in (g, a))
    # The narrower operand is transposed in memory, see ``weight_gradient``; the sum is turned once, at its end.
    narrow = F <= D
    left, right = (g, a) if narrow else (a, g)

    def one_expert(e, start, stop, out):
        def one_block(here, block, inside, total):
            own, turned = _rows(right, here, block), transposed(_rows(left, here, block))
            own = own if inside is None else jnp.where(inside, own, 0)
            return total + lax.dot_general(turned, own, (((1,), (0,)), ((), ())), preferred_element_type=wide)

        total = jnp.zeros((left.shape[1], right.shape[1]), wide)
        total = _blocks(one_block, start, stop, a.shape[0], blocks, total)
        return lax.dynamic_update_slice_in_dim(out, (total if narrow else total.T)[None], e, 0)

    return _experts(one_expert, sizes, jnp.zeros((E, F, D), wide))


def _block_sizes(rows: int, experts: int) -> tuple[int, int]:
    """Rows of the blocks that an expert's rows are cut into, and of those that take what is left over: powers of two.

    Of one size, about half an even share, where that is few rows, as where a model serves.
    """
    share = rows // experts
    if share < MIXED_BLOCKS:
        block = max(MIN_BLOCK, 1 << (share // 2).bit_length() >> 1)
        return block, block
    large = min(MAX_BLOCK, 1 << share.bit_length() - 1)
    return large, large // 4


def _at_least(x, rows: int):
    return jnp.pad(x, ((0, max(rows - x.shape[0], 0)), (0, 0)))


def _experts(one, sizes, out):
    """``out`` after ``one(e, start, stop, out)`` for the experts that have rows, in order."""
    stops = jnp.cumsum(sizes, dtype=sizes.dtype)
    busy = jnp.argsort(sizes == 0, stable=True)
    count = (sizes > 0).sum(dtype=sizes.dtype)

    def body(i, out):
        e = busy[i]
        return one(e, stops[e] - sizes[e], stops[e], out)

    return lax.fori_loop(0, count, body, out)


def _blocks(one, start, stop, length: int, sizes: tuple[int, int], out):
    """``out`` after ``one(here, size, inside, out)`` for blocks of rows that together have those from ``start`` to
    ``stop``. inside: which of a block's are of them, bool [size, 1]; None where all are."""
    large, small = sizes
    state = lax.while_loop(
        lambda s: s[0] + large <= stop, lambda s: (s[0] + large, one(s[0], large, None, s[1])), (start, out)
    )

    def rest(s):
        at, out = s
        here = jnp.minimum(at, length - small)
        row = here + lax.broadcasted_iota(here.dtype, (small, 1), 0)
        return at + small, one(here, small, (row >= at) & (row < stop), out)

    return lax.while_loop(lambda s: s[0] < stop, rest, state)[1]


def _rows(x, at, count):
    """``count`` of x from ``at`` on, along the first dimension.

    As integers: XLA:CPU makes a float32 copy of all of a bfloat16 array that is sliced at a place it does not know.
    """
    if x.dtype != jnp.bfloat16:
        return lax.dynamic_slice_in_dim(x, at, count, 0)
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(x, jnp.uint16), at, count, 0)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)
