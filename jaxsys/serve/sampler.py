"""Choosing tokens on the device. Settings are data: one graph serves every mix of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsys.serve.sampling import ALTERNATIVES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Sampling settings of each sequence, [...] each: as in ``sampling.Sampling``.

    temperature, top_p, min_p, repetition, presence, frequency: float32. top_k: int32. seed: uint32.
    prompt: int32, tokens of the prompt. ends: int32, the first position where a stop token may be made.
    biased, bias: [..., BIASES] int32 and float32, tokens (-1 for none) and what is added to their logits.
    allowed: [..., ceil(V / 32)] uint32, a bit a token; looked at where limited: bool.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    prompt: jax.Array
    ends: jax.Array
    biased: jax.Array
    bias: jax.Array
    allowed: jax.Array
    limited: jax.Array

    @property
    def penalised(self) -> jax.Array:
        """Whether what is in the text changes the logits."""
        return (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax(logits)[tokens]: logits [..., V], tokens [...] int32, to [...] float32."""
    # A comparison and a maximum instead of a gather: it stays where the vocabulary is sharded. A sum of one number is
    # the same, but takes XLA:CPU ten times as long.
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == tokens[..., None]
    picked = jnp.where(hit, logits, -jnp.inf).max(-1)
    return (picked - log_total(logits)[..., 0]).astype(jnp.float32)


def log_total(logits: jax.Array) -> jax.Array:
    """log of the sum of exp(logits [..., V]), [..., 1]; the largest is finite."""
    top = logits.max(-1, keepdims=True)
    return top + jnp.log(jnp.exp(logits - top).sum(-1, keepdims=True))


def likeliest(logits: jax.Array) -> jax.Array:
    """The first token with the highest of logits [..., V], [...] int32; the last of all where one is NaN.

    What ``jnp.argmax`` gives, which takes XLA:CPU six times as long.
    """
    tokens = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    last = logits.shape[-1] - 1
    return jnp.where(logits == logits.max(-1, keepdims=True), tokens, last).min(-1)


def alternatives(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens and log softmax(logits) of them: [..., ALTERNATIVES] int32 and float32."""
    best, tokens = lax.top_k(logits, min(ALTERNATIVES, logits.shape[-1]))
    found = (best - log_total(logits)).astype(jnp.float32)
    missing = [(0, 0)] * (logits.ndim - 1) + [(0, ALTERNATIVES - best.shape[-1])]
    return jnp.pad(tokens.astype(jnp.int32), missing), jnp.pad(found, missing, constant_values=-jnp.inf)


def processed(
    logits: jax.Array,
    settings: Settings,
    positions: jax.Array,
    stop: jax.Array,
    text: Callable[[], tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Logits after penalties, biases and what is not allowed, before temperature: [N, V] to [N, V].

    positions: [N], of the token that is made. stop: [N, E], -1 for none. text: what has the tokens at positions 0 to
    S - 1, [N, S], and bool [N, S], those that there are. Where nobody asks for any of it the logits are as they were.
    """
    rows = jnp.arange(logits.shape[0])[:, None]

    def penalties(x):
        tokens, known = text()
        made = known & (jnp.arange(tokens.shape[1]) >= settings.prompt[:, None])
        seen = jnp.zeros(x.shape, bool).at[rows, tokens].max(known)
        count = jnp.zeros(x.shape, x.dtype).at[rows, tokens].add(made.astype(x.dtype))
        repetition = settings.repetition[:, None]
        x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
        return x - settings.frequency[:, None] * count - settings.presence[:, None] * (count > 0)

    def biases(x):
        return x.at[rows, jnp.where(settings.biased >= 0, settings.biased, x.shape[-1])].add(settings.bias, mode="drop")

    def limits(x):
        every = np.arange(x.shape[-1])
        bit = settings.allowed[:, every // 32] >> (every % 32).astype(np.uint32) & 1
        return jnp.where(settings.limited[:, None] & (bit == 0), -jnp.inf, x)

    def goes_on(x):
        early = (positions < settings.ends)[:, None] & (stop >= 0)
        return x.at[rows, jnp.where(early, stop, x.shape[-1])].set(-jnp.inf, mode="drop")

    for wanted, change in (
        (settings.penalised, penalties),
        (settings.biased >= 0, biases),
        (settings.limited, limits),
        (positions < settings.ends, goes_on),
    ):
        logits = lax.cond(wanted.any(), change, lambda x: x, logits)
    return logits


def sample(logits: jax.Array, settings: Settings, positions: jax.Array, wanted: jax.Array) -> tuple[jax.Array, ...]:
    """One token a row, int32 [...], and its log-probability under the distribution it was drawn from, float32 [...].

    logits: [..., V], processed. positions: [...] int32, of the token that is made. A row's noise is a function of its
    seed and position alone, so its token does not depend on what else is in the batch. wanted: whether anybody wants
    the log-probabilities; they are 0 otherwise, as they are where the temperature is 0.
    """
    tokens = likeliest(logits)
    nothing = jnp.zeros(tokens.shape, jnp.float32)

    def draw():
        scaled = logits.astype(jnp.float32) - logits.max(-1, keepdims=True).astype(jnp.float32)
        scaled = scaled / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[..., None]
        restricted = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
        kept = lax.cond(restricted.any(), lambda: _restrict(scaled, settings), lambda: scaled)
        noise = _noise(settings.seed.ravel(), positions.ravel(), logits.shape[-1]).reshape(logits.shape)
        drawn = likeliest(kept + noise)
        chosen = jnp.where(settings.temperature > 0, drawn, tokens)
        found = lax.cond(wanted, lambda: log_probability(kept, drawn), lambda: nothing)
        return chosen, jnp.where(settings.temperature > 0, found, 0.0)

    return lax.cond((settings.temperature > 0).any(), draw, lambda: (tokens, nothing))


def _noise(seeds: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Gumbel noise [rows, size]: the largest of noise + logits is a draw from softmax(logits)."""

    def row(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,), jnp.float32)

    return jax.vmap(row)(seeds, positions)


def _restrict(scaled: jax.Array, settings: Settings) -> jax.Array:
    """-inf for tokens outside the top k, then outside the top p of what is left, then below min_p of the first."""
    V = scaled.shape[-1]
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, V), V)
    order = _ordered(scaled)
    order_k = _largest_with(order, jnp.ones_like(scaled), k.astype(jnp.float32))
    scaled = jnp.where(order >= order_k[..., None], scaled, -jnp.inf)
    p = jnp.exp(scaled - log_total(scaled))
    # The most likely token is kept however small top_p: one below the smallest normal number counts as zero.
    order_p = jnp.minimum(_largest_with(order, p, settings.top_p), order.max(-1))
    order_p = jnp.where(settings.top_p < 1, order_p, 0)
    scaled = jnp.where(order >= order_p[..., None], scaled, -jnp.inf)
    # The largest is 0: see the caller.
    return jnp.where(scaled >= jnp.log(settings.min_p)[..., None], scaled, -jnp.inf)


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
