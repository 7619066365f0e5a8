"""Attention over pages on TPU: a Pallas kernel that goes through one item after another, each as far as it reaches.

Pages are copied from HBM to VMEM by number, a block of them while the block before is computed on, across items too
(as JAX's own paged attention does: Kwon et al. 2023, PagedAttention; Jiang et al. 2026, Ragged Paged Attention).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsys.kernels.masked import NEVER, cap

# Of one block, of keys or of values: enough that its copies take longer than they take to begin, and that two blocks
# of each and the scores of one fit VMEM several times.
BLOCK_BYTES, SCORE_BYTES = 512 << 10, 512 << 10
VMEM_BYTES = 16 << 20  # what the compiler lets a kernel have unless asked
SUBLANES, LANES = 8, 128  # of a vector: what rows and columns in memory are multiples of


def attend(
    queries: jax.Array,
    at: jax.Array,
    sequences: jax.Array,
    layers: jax.Array,
    page_table: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    window: jax.Array | int | None,
    scale: float,
    softcap: float | None,
    interpret: Any = False,
) -> jax.Array:
    """queries [I, Q, K, G, h] at positions ``at`` [I, Q] (-1: none) of ``sequences`` [I], whose pages of keys and
    values [L, P, K, page, h], in ``layers`` [I], are in ``page_table`` [N, C]: [I, Q, K, G, h] float32, zeros for none.

    h: a multiple of 128. interpret: how to run it without a TPU, see ``pallas_call``.
    """
    I, Q, K, G, h = queries.shape
    C, page = page_table.shape[1], keys.shape[3]
    rows = -(-G * Q // SUBLANES) * SUBLANES
    together = _pages_together(K, rows, page, h, keys.dtype.itemsize, C)

    def turned(a, fill):
        """[I, Q, K, G, ...] to [I, K, rows, ...]."""
        a = jnp.moveaxis(a, 1, 3).reshape(I, a.shape[2], G * Q, *a.shape[4:])
        return jnp.pad(a, ((0, 0), (0, 0), (0, rows - G * Q), *((0, 0),) * (a.ndim - 3)), constant_values=fill)

    turned_at = turned(jnp.broadcast_to(at[:, :, None, None, None], (I, Q, 1, G, 1)), -1)[:, 0]
    first, last, following = _reaches(at, window)
    window = jnp.asarray(np.iinfo(np.int32).max if window is None else window, jnp.int32)
    block = pl.BlockSpec((1, K, rows, h), lambda i, *_: (i, 0, 0, 0))
    S = together * page
    memory = 4 * K * S * h * keys.dtype.itemsize + 4 * K * rows * (4 * h + 2 * LANES + 4 * S)  # in use at a time
    out = pl.pallas_call(
        partial(_kernel, columns=C, page=page, together=together, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=7,
            grid=(I,),
            in_specs=[
                pl.BlockSpec((1, rows, 1), lambda i, *_: (i, 0, 0)),
                block,
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM((2, K, S, h), keys.dtype),
                pltpu.VMEM((2, K, S, h), values.dtype),
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((I, K, rows, h), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=2 * memory if memory > VMEM_BYTES // 2 else None
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        window[None], first, last, following, sequences, layers, page_table.reshape(-1),
        turned_at, turned(queries, 0), keys, values,
    )  # fmt: skip
    return jnp.moveaxis(out[:, :, : G * Q].reshape(I, K, G, Q, h), 3, 1)


def _pages_together(heads: int, rows: int, page: int, h: int, itemsize: int, most: int) -> int:
    """Pages of a block: a power of two, as lanes are."""
    positions = min(BLOCK_BYTES // (heads * h * itemsize), SCORE_BYTES // (heads * rows * 4))
    return 1 << int(math.log2(max(1, min(positions // page, most))))


def _reaches(at, window):
    """Of each item, and of a last one that is none: the first position that it sees, its last position (-1: it has no
    query), and the next item that has one."""
    I = at.shape[0]
    last = at.max(1)
    first = jnp.where(at >= 0, at, np.iinfo(np.int32).max).min(1)
    first = jnp.zeros_like(last) if window is None else jnp.where(last >= 0, jnp.maximum(first - window + 1, 0), 0)
    here = jnp.where(last >= 0, jnp.arange(I, dtype=jnp.int32), I)
    at_or_after = lax.cummin(here, reverse=True)
    following = jnp.append(at_or_after[1:], jnp.int32(I))
    return jnp.append(first, 0), jnp.append(last, -1), following


def _kernel(
    window, first, last, following, sequences, layers, page_table, at, queries, keys, values, out,
    some_keys, some_values, top, total, slot, arrived, *, columns, page, together, scale, softcap,
):  # fmt: skip
    """One item. some_keys, some_values: [2, K, S, h], the blocks computed on and to come; top, total: [K, rows, 1], of
    the running softmax; slot: where this item's first block comes to."""
    item, items = pl.program_id(0), pl.num_programs(0)
    S = together * page

    def begin(item):
        return first[item] // S

    def copies(item, block, slot, act):
        """Of the pages of a block that the item sees, each to its place."""

        def one(column, _):
            number = page_table[sequences[item] * columns + column]
            here = pl.ds(pl.multiple_of((column - block * together) * page, page), page)
            for pool, some in ((keys, some_keys), (values, some_values)):
                act(pltpu.make_async_copy(pool.at[layers[item], number], some.at[slot, :, here], arrived.at[slot]))

        stop = jnp.minimum((block + 1) * together, last[item] // page + 1)
        lax.fori_loop(jnp.maximum(block * together, first[item] // page), stop, one, None)

    def start(item, block, slot):
        @pl.when(item < items)
        def _():
            copies(item, block, slot, lambda copy: copy.start())

    @pl.when(item == 0)
    def _():
        slot[0] = 0
        one = jnp.where(last[0] >= 0, 0, following[0])
        start(one, begin(one), 0)

    top[...] = jnp.full_like(top, NEVER)
    total[...] = jnp.zeros_like(total)
    out[...] = jnp.zeros_like(out)

    def one_block(block, here):
        over = (block + 1) * S > last[item]
        coming = jnp.where(over, following[item], item)
        start(coming, jnp.where(over, begin(coming), block + 1), 1 - here)
        copies(item, block, here, lambda copy: copy.wait())
        k, v = some_keys[here], some_values[here]
        s = lax.dot_general(queries[0], k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        s = cap(s * scale, softcap)
        away = at[0] - block * S - lax.broadcasted_iota(jnp.int32, (1, S), 1)
        seen = ((away >= 0) & (away < window[0]))[None]
        # Where nothing was copied to, or written yet, there may be anything: zero weight times NaN would be NaN.
        key_at = block * S + lax.broadcasted_iota(jnp.int32, (1, S, 1), 1)
        v = jnp.where((key_at >= first[item]) & (key_at <= last[item]), v, jnp.zeros_like(v))
        new = jnp.maximum(top[...], jnp.where(seen, s, NEVER).max(-1, keepdims=True))
        p = jnp.where(seen, jnp.exp(s - new), 0.0)
        shrink = jnp.exp(top[...] - new)
        o = lax.dot_general(p.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        top[...], total[...] = new, total[...] * shrink + p.sum(-1, keepdims=True)
        out[0] = out[0] * shrink + o
        return 1 - here

    blocks = jnp.where(last[item] >= 0, last[item] // S + 1, 0)
    slot[0] = lax.fori_loop(begin(item), blocks, one_block, slot[0])
    out[0] = out[0] / jnp.maximum(total[...], 1e-30)
