"""Choosing tokens on the device. Settings are data: one graph serves every mix of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of each sequence, [...] each: as in ``request.Sampling``.

    temperature, top_p: float32. top_k: int32. seed: uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[tokens]: logits [..., V], tokens [...] int32, to [...] float32."""
    # A comparison and a sum instead of a gather: it stays where the vocabulary is sharded.
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == tokens[..., None]
    picked = jnp.where(hit, logits, 0).sum(-1)
    return (picked - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)


def sample(logits: jax.Array, settings: Settings, positions: jax.Array) -> jax.Array:
    """One token a row: int32 [...].

    logits: [..., V]. positions: [...] int32, of the token that is made. A row's noise is a function of its seed
    and position alone, so its token does not depend on what else is in the batch.
    """
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits.astype(jnp.float32) - logits.max(-1, keepdims=True).astype(jnp.float32)
        scaled = scaled / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[..., None]
        restricted = (settings.top_k > 0) | (settings.top_p < 1)
        kept = lax.cond(restricted.any(), lambda: _restrict(scaled, settings), lambda: scaled)
        noise = _noise(settings.seed.ravel(), positions.ravel(), logits.shape[-1]).reshape(logits.shape)
        drawn = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
        return jnp.where(settings.temperature > 0, drawn, tokens)

    return lax.cond((settings.temperature > 0).any(), draw, lambda: tokens)


def _noise(seeds: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Gumbel noise [rows, size]: the largest of noise + logits is a draw from softmax(logits)."""

    def row(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,), jnp.float32)

    return jax.vmap(row)(seeds, positions)


def _restrict(scaled: jax.Array, settings: Settings) -> jax.Array:
    """-inf for tokens outside the top k, then for those outside the top p of what is left."""
    V = scaled.shape[-1]
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V)
    order = _ordered(scaled)
    order_k = _largest_with(order, jnp.ones_like(scaled), k.astype(jnp.float32))
    scaled = jnp.where(order >= order_k[..., None], scaled, -jnp.inf)
    p = jax.nn.softmax(scaled, axis=-1)
    # The most likely token is kept however small top_p: one below the smallest normal number counts as zero.
    order_p = jnp.minimum(_largest_with(order, p, settings.top_p), order.max(-1))
    order_p = jnp.where(settings.top_p < 1, order_p, 0)
    return jnp.where(order >= order_p[..., None], scaled, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 to uint32 with the same order."""
    bits = lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0.0 becomes 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_with(order: jax.Array, weight: jax.Array, need: jax.Array) -> jax.Array:
    """The largest threshold [...] such that the weight [..., V] of the entries at or above it is at least ``need``.

    Found bit by bit, which takes 32 sums and no sort: sorting a vocabulary is slow on every platform.
    """

    def bit(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.where(order >= higher[..., None], weight, 0).sum(-1) >= need
        return jnp.where(enough, higher, threshold)

    return lax.fori_loop(0, 32, bit, jnp.zeros(need.shape, jnp.uint32))
