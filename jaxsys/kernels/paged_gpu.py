"""Attention over pages on GPU: a Pallas kernel (Triton) for each item, key/value head and share of an item's keys.

Where items are few their keys are split over programs, whose results come together by their running softmaxes
(Dao et al. 2023, Flash-Decoding). Which keys a program has follows from their positions alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxsys.kernels.masked import NEVER, cap

BLOCK = 64  # keys that are multiplied at a time
ROWS = (16, 64)  # queries times heads of a program: at least what a tensor core multiplies, at most what registers hold
PROGRAMS, SPLITS = 264, 32  # as many as keep a large GPU busy: two for each of its processors; and parts of an item


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

    interpret: whether to run it without a GPU.
    """
    # JAX is to drop it: where there is no GPU nothing needs it.
    from jax.experimental.pallas import triton

    I, Q, K, G, h = queries.shape
    C, page = page_table.shape[1], keys.shape[3]
    rows = min(max(pl.next_power_of_2(Q * G), ROWS[0]), ROWS[1])
    groups, lanes = -(-Q * G // rows), pl.next_power_of_2(h)

    def grouped(a, fill):
        """[I, Q, K, G, ...] to [I, groups, K, rows, ...]."""
        a = jnp.moveaxis(a, 1, 2).reshape(I, a.shape[2], Q * G, *a.shape[4:])
        a = jnp.pad(a, ((0, 0), (0, 0), (0, groups * rows - Q * G), *((0, 0),) * (a.ndim - 3)), constant_values=fill)
        return jnp.moveaxis(a.reshape(I, -1, groups, rows, *a.shape[3:]), 2, 1)

    padded = jnp.pad(queries, ((0, 0),) * 4 + ((0, lanes - h),))
    grouped_at = grouped(jnp.broadcast_to(at[:, :, None, None], (I, Q, 1, G)), -1)[:, :, 0]
    last = grouped_at.max(-1)
    window = jnp.asarray(np.iinfo(np.int32).max if window is None else window, jnp.int32)
    first = jnp.where(grouped_at >= 0, jnp.maximum(grouped_at - window, -1) + 1, np.iinfo(np.int32).max).min(-1)
    splits = min(pl.next_power_of_2(-(-PROGRAMS // (I * groups * K))), SPLITS, -(-C * page // BLOCK))

    def whole(a):
        return pl.BlockSpec(a.shape, lambda *_: (0,) * a.ndim)

    small = window[None], first, last, sequences, layers, page_table
    top, total, out = pl.pallas_call(
        partial(_kernel, h=h, page=page, splits=splits, scale=scale, softcap=softcap),
        grid=(I * groups, K, splits),
        in_specs=[
            *(whole(a) for a in small),
            pl.BlockSpec((None, None, rows), lambda i, k, s: (i // groups, i % groups, 0)),
            pl.BlockSpec((None, None, None, rows, lanes), lambda i, k, s: (i // groups, i % groups, k, 0, 0)),
            whole(keys),
            whole(values),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows), lambda i, k, s: (s, i, k, 0)),
            pl.BlockSpec((None, None, None, rows), lambda i, k, s: (s, i, k, 0)),
            pl.BlockSpec((None, None, None, rows, lanes), lambda i, k, s: (s, i, k, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((splits, I * groups, K, rows, *more), jnp.float32) for more in ((), (), (lanes,))
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(*small, grouped_at, grouped(padded, 0), keys, values)
    weight = jnp.exp(top - top.max(0))
    out = (out * weight[..., None]).sum(0) / jnp.maximum((total * weight).sum(0), 1e-30)[..., None]
    out = jnp.moveaxis(out.reshape(I, groups, K, rows, lanes), 1, 2).reshape(I, K, groups * rows, lanes)
    return jnp.moveaxis(out[:, :, : Q * G, :h].reshape(I, K, Q, G, h), 1, 2)


def _kernel(
    window,
    first,
    last,
    sequences,
    layers,
    page_table,
    at,
    queries,
    keys,
    values,
    top,
    total,
    out,
    *,
    h,
    page,
    splits,
    scale,
    softcap,
):
    """The running softmax of some rows of an item over every ``splits``th block of its keys."""
    from jax.experimental.pallas import triton

    groups = first.shape[1]
    item, group, head, split = pl.program_id(0) // groups, pl.program_id(0) % groups, pl.program_id(1), pl.program_id(2)
    begins, ends, sequence, layer = first[item, group], last[item, group], sequences[item], layers[item]
    q, places, seen_from = queries[...], at[...], window[0]
    lane = lax.broadcasted_iota(jnp.int32, (1, q.shape[1]), 1)

    def one_block(n, state):
        top, total, out = state
        key_at = (n * splits + split) * BLOCK + jnp.arange(BLOCK)
        # What no row sees is not read: it may be anything, and zero weight times NaN would be NaN.
        there = (key_at >= begins) & (key_at <= ends)
        pages = triton.load(page_table.at[sequence, key_at // page], mask=there, other=0)
        where = layer, pages[:, None], head, (key_at % page)[:, None], lane
        there = there[:, None] & (lane < h)
        k, v = (triton.load(pool.at[where], mask=there, other=0.0) for pool in (keys, values))
        s = cap(triton.dot(q, k.T) * scale, softcap)
        away = places[:, None] - key_at[None, :]
        seen = (away >= 0) & (away < seen_from)
        new = jnp.maximum(top, jnp.where(seen, s, NEVER).max(-1))
        p = jnp.where(seen, jnp.exp(s - new[:, None]), 0.0)
        shrink = jnp.exp(top - new)
        return new, total * shrink + p.sum(-1), out * shrink[:, None] + triton.dot(p.astype(v.dtype), v)

    none = jnp.zeros(places.shape, jnp.float32)
    start = none + NEVER, none, jnp.zeros(q.shape, jnp.float32)
    # Of blocks split, split + splits, ...: those between the first and the last that are seen.
    begin = jnp.maximum(begins // BLOCK - split + splits - 1, 0) // splits
    end = jnp.maximum(ends // BLOCK - split + splits, 0) // splits
    top[...], total[...], out[...] = lax.fori_loop(begin, jnp.where(ends >= 0, end, begin), one_block, start)
