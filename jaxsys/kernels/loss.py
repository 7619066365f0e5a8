"""Cross-entropy that never holds the logits of all tokens.

Tokens go through in chunks along the sequence; where a gradient is asked for, each chunk's is computed while
its logits are there (as Liger Kernel does, Hsu et al. 2024), so nothing is computed twice.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.kernels.matmul import linear, weight_gradient
from parallelism.sharding import constrain

# Logits alive at once, in elements over all devices: large enough for full-speed matmuls.
CHUNK_LOGITS = 1 << 23


def chunk_length(batch: int, length: int, width: int, vocabulary: int) -> int:
    """Positions a chunk, such that its logits [batch, chunk, vocabulary] are few: see CHUNK_LOGITS.

    They may also be as many as the hidden states [batch, length, width] are, which are alive anyway: each chunk reads
    the kernel and adds to its gradient, so that chunks of a few rows of a large batch would be all memory traffic.
    The largest divisor of ``length`` is taken if it is near to what is allowed; else the last chunk is filled up.
    """
    allowed = max(CHUNK_LOGITS, batch * length * width) // (batch * vocabulary)
    allowed = min(max(1, allowed), length)
    divisor = max(n for n in range(1, allowed + 1) if length % n == 0)
    return divisor if 2 * divisor > allowed else -(-length // -(-length // allowed))


def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, vocabulary: int, softcap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(target) and the number of targets, both float scalars of at least float32.

    hidden: [B, T, D]. kernel: [V, D]. targets: [B, T] int32, negative ones do not count.
    vocabulary: rows of ``kernel`` from there on are padding, and no token.
    """
    total = _cross_entropy(hidden, kernel, targets, vocabulary, softcap)
    return total, (targets >= 0).sum().astype(total.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(hidden, kernel, targets, vocabulary, softcap):
    def step(total, chunk):
        h, t = chunk
        return total + _chunk(h, kernel, t, vocabulary, softcap)[0], None

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return lax.scan(step, jnp.zeros((), wide), _chunks(hidden, kernel, targets))[0]


def _forward(hidden, kernel, targets, vocabulary, softcap):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def step(state, chunk):
        total, d_kernel = state
        h, t = chunk
        nll, d_logits = _chunk(h, kernel, t, vocabulary, softcap)
        d = d_logits.astype(kernel.dtype)
        d_h = jnp.einsum("bcv,vd->bcd", d, kernel, preferred_element_type=wide).astype(hidden.dtype)
        rows = d.shape[0] * d.shape[1]
        d_kernel += weight_gradient(d.reshape(rows, -1), h.astype(kernel.dtype).reshape(rows, -1))
        return (total + nll, d_kernel), d_h

    start = (jnp.zeros((), wide), jnp.zeros(kernel.shape, wide))
    (total, d_kernel), d_hidden = lax.scan(step, start, _chunks(hidden, kernel, targets))
    B, T, D = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
    return total, (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(vocabulary, softcap, saved, g):
    d_hidden, d_kernel = saved
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_kernel).astype(d_kernel.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _chunks(hidden, kernel, targets):
    """hidden and targets with chunks in front, filled up with zeros that are no targets."""
    B, T, D = hidden.shape
    c = chunk_length(B, T, D, kernel.shape[0])
    if missing := -T % c:
        hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=-1)
    return tuple(jnp.moveaxis(a.reshape(B, -1, c, *a.shape[2:]), 1, 0) for a in (hidden, targets))


def _chunk(h, kernel, targets, vocabulary, softcap):
    """Loss of one chunk h [B, c, D], and its gradient with respect to the logits [B, c, V] before the cap."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    raw = constrain(linear(h.astype(wide), kernel), ("batch", "seq", "act_vocab"))
    logits = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    # A comparison and a sum instead of a gather: it stays where the vocabulary is sharded.
    token = lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    if kernel.shape[0] > vocabulary:
        logits = jnp.where(token < vocabulary, logits, -jnp.inf)
    hit = token == targets[..., None]
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    e = jnp.exp(logits - top)
    normaliser = e.sum(-1, keepdims=True)
    log_normaliser = jnp.log(normaliser) + top
    valid = (targets >= 0)[..., None]
    nll = jnp.where(valid, log_normaliser - jnp.where(hit, logits, 0).sum(-1, keepdims=True), 0).sum()
    d = jnp.where(valid, e / normaliser - hit, 0)
    if softcap is not None:
        d = d * (1 - jnp.square(jnp.tanh(raw / softcap)))
    return nll, d
