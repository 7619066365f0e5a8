"""One attention for training, scoring, prefill and decode: ``attend(q, k, v, context, carry)``.

``context`` says where keys come from: ``Rows``, packed documents side by side, or ``Paged``, a pool of
pages written in place. ``carry`` is the pool (None for rows): it goes in and comes out, so that a loop over
layers and steps updates one buffer and never copies it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

NEVER = -1e30  # a masked score: finite, so that a row with no key at all gives zeros and not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Whole rows of packed documents.

    segments: [B, T] int32, the document of each token, 0 for padding (attends to nothing).
    positions: [B, T] int32, restarting with each document.
    """

    segments: jax.Array
    positions: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """Token rows of many sequences, keys and values in pages. R replicas, each with pages of its own.

    positions: [R, T] int32 position of each row in its sequence, -1 for an unused row.
    sequences: [R, T] int32, the sequence (0..N-1) of each row.
    page_table: [R, N, C] int32, the page that holds positions c*page_size ... of a sequence.
    items: [R, I, Q] int32, rows grouped by sequence: an item's rows all belong to one sequence; T means none.
    context: [R] int32, the longest context of any row (positions used): how far attention has to look.
    """

    positions: jax.Array
    sequences: jax.Array
    page_table: jax.Array
    items: jax.Array
    context: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys and values of all layers: [L, R, P, page_size, K, h] each. Page 0 takes the writes of unused rows."""

    k: jax.Array
    v: jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Rows | Paged,
    carry: Any = None,
    *,
    layer: jax.Array | int,
    window: jax.Array | int | None,
    scale: float,
    softcap: float | None,
    dtype: Any,
) -> tuple[jax.Array, Any]:
    """Causal attention of q [B, T, H, h] over k, v [B, T, K, h], and over what ``carry`` holds: [B, T, H, h].

    window: keys a token sees, itself included; None sees all. dtype: of the operands of both matmuls;
    softmax and sums are in at least float32. Returns the output in q's dtype, and the carry.
    """
    options = {"window": window, "scale": scale, "softcap": softcap, "dtype": dtype}
    if isinstance(context, Rows):
        return _rows(q, k, v, context, **options), carry
    return _paged(q, k, v, context, carry, layer=layer, **options)


def _scores(q, k, scale, softcap, dtype):
    """q [N, Q, K, G, h], k [N, S, K, h] to float scores [N, K, G, Q, S]."""
    accumulate = jnp.promote_types(dtype, jnp.float32)
    s = jnp.einsum("nqkgh,nskh->nkgqs", q.astype(dtype), k.astype(dtype), preferred_element_type=accumulate) * scale
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


def _rows(q, k, v, context, *, window, scale, softcap, dtype):
    B, T, H, h = q.shape
    K = k.shape[2]
    s = _scores(q.reshape(B, T, K, H // K, h), k, scale, softcap, dtype)
    index = jnp.arange(T)
    seen = (index[:, None] >= index[None, :]) & (context.segments[:, :, None] == context.segments[:, None, :])
    seen &= (context.segments > 0)[:, :, None]
    if window is not None:
        seen &= context.positions[:, :, None] - context.positions[:, None, :] < window
    seen = seen[:, None, None]
    s = jnp.where(seen, s, NEVER)
    p = jnp.where(seen, jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True))), 0.0)
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    accumulate = jnp.promote_types(dtype, jnp.float32)
    o = jnp.einsum("nkgqs,nskh->nqkgh", p.astype(dtype), v.astype(dtype), preferred_element_type=accumulate)
    return o.reshape(B, T, H, h).astype(q.dtype)


def _paged(q, k, v, context, pool, *, layer, window, scale, softcap, dtype):
    """Writes k and v to the pool, then attends block by block of pages with a running softmax.

    The running softmax (Milakov and Gimelshein 2018) makes a row's result independent of how far the
    longest sequence of the batch reaches: a block with no key of the row changes nothing in it.
    """
    R, T, H, h = q.shape
    K, page = k.shape[2], pool.k.shape[3]
    replica = jnp.arange(R)[:, None]
    used = context.positions >= 0
    slot = jnp.where(used, context.positions, 0)
    pages = jnp.where(used, context.page_table[replica, context.sequences, slot // page], 0)
    write = (layer, replica, pages, slot % page)
    pool = Pool(pool.k.at[write].set(k.astype(pool.k.dtype)), pool.v.at[write].set(v.astype(pool.v.dtype)))

    N, C = context.page_table.shape[1:]
    I, Q = context.items.shape[1:]
    replica3 = replica[:, :, None]
    padded = jnp.concatenate([q, jnp.zeros_like(q[:, :1])], axis=1)
    item_q = padded[replica3, context.items].reshape(R * I, Q, K, H // K, h)
    row = jnp.minimum(context.items, T - 1)
    live = (context.items < T) & used[replica3, row]
    at = jnp.where(live, context.positions[replica3, row], -1).reshape(R * I, Q)
    sequence = context.sequences[replica, row[:, :, 0]]
    table = context.page_table[replica, sequence].reshape(R, I, C)

    accumulate = jnp.promote_types(dtype, jnp.float32)

    def block(c, state):
        top, total, out = state
        where = (layer, replica, table[:, :, c])
        keys = pool.k[where].reshape(R * I, page, K, h)
        values = pool.v[where].reshape(R * I, page, K, h)
        s = _scores(item_q, keys, scale, softcap, dtype)
        key_at = c * page + jnp.arange(page)
        seen = key_at[None, None, :] <= at[:, :, None]
        if window is not None:
            seen &= at[:, :, None] - key_at[None, None, :] < window
        seen = seen[:, None, None]
        new = jnp.maximum(top, jnp.where(seen, s, NEVER).max(-1))
        p = jnp.where(seen, jnp.exp(s - new[..., None]), 0.0)
        shrink = jnp.exp(top - new)
        o = jnp.einsum("nkgqs,nskh->nkgqh", p.astype(dtype), values.astype(dtype), preferred_element_type=accumulate)
        return new, total * shrink + p.sum(-1), out * shrink[..., None] + o

    G = H // K
    start = (
        jnp.full((R * I, K, G, Q), NEVER, accumulate),
        jnp.zeros((R * I, K, G, Q), accumulate),
        jnp.zeros((R * I, K, G, Q, h), accumulate),
    )
    blocks = (context.context.max() + page - 1) // page
    _, total, out = lax.fori_loop(0, blocks, block, start)
    out = out / jnp.maximum(total, 1e-30)[..., None]
    out = out.transpose(0, 3, 1, 2, 4).reshape(R, I * Q, H, h)
    # Each row sits in exactly one item: scatter the items' rows back to where they came from.
    back = jnp.zeros((R, T + 1, H, h), out.dtype).at[replica, context.items.reshape(R, I * Q)].set(out)
    return back[:, :T].astype(q.dtype), pool
