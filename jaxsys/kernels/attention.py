"""One attention for training, scoring, prefill and decode: ``attend(q, k, v, context, carry)``.

``context`` says where keys come from: ``Rows``, packed documents side by side, or ``Paged``, a pool of
pages written in place. ``carry`` is the pool (None for rows): it goes in and comes out, so that a loop over
layers and steps updates one buffer and never copies it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxsys.kernels.masked import NEVER, cap
from jaxsys.kernels.paged import Paged, Pool, attend_pages
from parallelism import sequence
from parallelism.sharding import constrain, platform

# Rows of at least so many tokens are gone through in chunks of queries, each with the keys up to its end: 5/8 of all
# pairs instead of all. Short rows are not worth the longer program.
CHUNKED_FROM, QUERY_CHUNKS = 256, 4
ATTENTION = "attention"  # the name of attention's output over whole rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Whole rows of packed documents.

    segments: [B, T] int32, the document of each token, 0 for padding (attends to nothing).
    positions: [B, T] int32, restarting with each document.
    """

    segments: jax.Array
    positions: jax.Array

    @property
    def used(self) -> jax.Array:
        """[B, T] bool, False for padding."""
        return self.segments > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitRows(Rows):
    """Rows whose tokens are split over the mesh axis ``context``, for ``parallelism.sequence.attention``.

    method: how queries and keys of different devices come together, one of ``parallelism.sequence.METHODS``.
    own: so many tokens of each device, its first, see only one another.
    """

    method: sequence.Method = dataclasses.field(metadata={"static": True})
    own: int = dataclasses.field(default=0, metadata={"static": True})


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Rows | SplitRows | Paged,
    carry: Pool | None = None,
    *,
    layer: jax.Array | int,
    window: jax.Array | int | None,
    scale: float,
    softcap: float | None,
    dtype: Any,
) -> tuple[jax.Array, Pool | None]:
    """Causal attention of q [B, T, H, h] over k, v [B, T, K, h], and over what ``carry`` holds: [B, T, H, h].

    window: keys a token sees, itself included; None sees all. dtype: of the operands of both matmuls over rows
    (over pages they are in the pool's); softmax and sums are in at least float32. Returns the output in q's dtype,
    and the carry.
    """
    options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap}
    if isinstance(context, SplitRows):
        return _split_rows(q, k, v, context, **options, dtype=dtype), carry
    if isinstance(context, Rows):
        return _rows(q, k, v, context, **options, dtype=dtype), carry
    assert carry is not None
    return attend_pages(q, k, v, context, carry, layer=layer, **options)


def _rows(q, k, v, context, *, window, scale, softcap, dtype):
    B, T, H, h = q.shape
    K = k.shape[2]
    tokens = (context.segments, context.positions)
    seen = _seen(tokens, tokens, None if window is None else jnp.broadcast_to(window, (B, T)))
    # Or the compiler lays it out as others do their tokens (experts', over ``tensor``), and exchanges pieces of it.
    seen = constrain(seen, ("batch", "seq", None))
    grouped, k, v = q.reshape(B, T, K, H // K, h).astype(dtype), k.astype(dtype), v.astype(dtype)

    def chunk(start, stop):
        """Queries ``start`` to ``stop``: no key after them is seen, so none is multiplied."""
        masked = seen[:, None, None, start:stop, :stop]
        return _masked(grouped[:, start:stop], k[:, :stop], v[:, :stop], masked, scale, softcap)

    n = QUERY_CHUNKS if T >= CHUNKED_FROM and T % QUERY_CHUNKS == 0 else 1
    o = jnp.concatenate([chunk(i * T // n, (i + 1) * T // n) for i in range(n)], axis=1)
    return o.reshape(B, T, H, h).astype(q.dtype)


def _seen(queries, keys, windows):
    """[B, Q, S] bool, which keys each query sees, from (segments, positions) of both [B, ...] and windows [B, Q]."""
    (segments, positions), (key_segments, key_positions) = queries, keys
    away = positions[:, :, None] - key_positions[:, None, :]
    found = (segments[:, :, None] == key_segments[:, None, :]) & (segments > 0)[:, :, None] & (away >= 0)
    return found if windows is None else found & (away < windows[:, :, None])


def _split_rows(q, k, v, context, *, window, scale, softcap, dtype):
    """As ``_rows``, by the devices that ``context`` splits the tokens over."""
    B, T, H, h = q.shape
    K = k.shape[2]
    windows = jnp.broadcast_to(jnp.iinfo(jnp.int32).max if window is None else window, (B, T)).astype(jnp.int32)

    def seen(queries, keys):
        return _seen(queries[:2], keys[:2], queries[2])

    def forward(q, k, v, seen):
        out, (*_, normaliser) = _masked_forward(q, k, v, seen[:, None, None], scale, softcap)
        return out, jnp.moveaxis(normaliser[..., 0], 3, 1)

    def backward(q, k, v, seen, normaliser, delta, g):
        normaliser, delta = (jnp.moveaxis(a, 1, 3)[..., None] for a in (normaliser, delta))
        return _masked_gradients(q, k, v, seen[:, None, None], normaliser, delta, g, scale, softcap)

    block = sequence.Block(seen, forward, backward)
    grouped = q.reshape(B, T, K, H // K, h).astype(dtype)
    tokens = (context.segments, context.positions, windows)
    o = sequence.attention(grouped, k.astype(dtype), v.astype(dtype), tokens, block, context.method, context.own)
    return o.reshape(B, T, H, h).astype(q.dtype)


def _named_forward(q, k, v, seen, scale, softcap):
    """Forward of a gradient: what only attention itself can make again has a name for ``jax.checkpoint`` policies."""
    o, (*inputs, _, normaliser) = _masked_forward(q, k, v, seen, scale, softcap)
    o, normaliser = checkpoint_name(o, ATTENTION), checkpoint_name(normaliser, ATTENTION)
    return o, (*inputs, o, normaliser)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _masked(q, k, v, seen, scale, softcap):
    """q [B, Q, K, G, h], k and v [B, S, K, h], seen [B, 1, 1, Q, S]: [B, Q, K, G, h] in at least float32."""
    return _masked_forward(q, k, v, seen, scale, softcap)[0]


def _masked_scores(q, k, seen, scale, softcap):
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    s = cap(jnp.einsum("nqkgh,nskh->nkgqs", q, k, preferred_element_type=accumulate) * scale, softcap)
    return jnp.where(seen, s, NEVER)


def _masked_forward(q, k, v, seen, scale, softcap):
    s = _masked_scores(q, k, seen, scale, softcap)
    top = s.max(-1, keepdims=True)
    p = jnp.where(seen, jnp.exp(s - top), 0.0)
    total = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    o = jnp.einsum("nkgqs,nskh->nqkgh", (p / total).astype(v.dtype), v, preferred_element_type=s.dtype)
    return o, (q, k, v, seen, o, top + jnp.log(total))


def _masked_backward(scale, softcap, saved, g):
    """The probabilities again from the normaliser (Dao et al. 2022, algorithm 4), not kept from the forward pass.

    The softmax's own gradient needs the sum over keys of p * dp, which is the product of output and gradient.
    """
    q, k, v, seen, o, normaliser = saved
    delta = jnp.einsum("nqkgh,nqkgh->nkgq", g, o)[..., None]
    dq, dk, dv = _masked_gradients(q, k, v, seen, normaliser, delta, g, scale, softcap)
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), None


def _masked_gradients(q, k, v, seen, normaliser, delta, g, scale, softcap):
    """Of q, k and v, in the dtype of g [B, Q, K, G, h]; normaliser and delta (the sum of output times gradient):
    [B, K, G, Q, 1], over all keys even where these are some of them."""
    wide, dtype = g.dtype, q.dtype
    s = _masked_scores(q, k, seen, scale, softcap)
    p = jnp.where(seen, jnp.exp(s - normaliser), 0.0)
    d = g.astype(dtype)
    dp = jnp.einsum("nqkgh,nskh->nkgqs", d, v, preferred_element_type=wide)
    ds = p * (dp - delta) * scale
    if softcap is not None:
        ds *= jnp.where(seen, 1 - jnp.square(s / softcap), 0.0)
    dq = jnp.einsum("nkgqs,nskh->nqkgh", ds.astype(dtype), k, preferred_element_type=wide)
    # XLA:CPU has no bfloat16 dot for a left operand whose contracted dimensions are not the minor ones.
    over_rows = wide if platform() == "cpu" else dtype
    dk = jnp.einsum("nkgqs,nqkgh->nskh", ds.astype(over_rows), q.astype(over_rows), preferred_element_type=wide)
    dv = jnp.einsum("nkgqs,nqkgh->nskh", p.astype(over_rows), d.astype(over_rows), preferred_element_type=wide)
    return dq, dk, dv


_masked.defvjp(_named_forward, _masked_backward)
