"""Cross-entropy that never holds the logits of all tokens, nor gathers those of a vocabulary that is split.

Each device goes through its tokens in chunks; where a gradient is asked for, a chunk's is computed while its logits are
there (as Liger Kernel does, Hsu et al. 2024), so nothing is computed twice. On a mesh that is done by hand and not left
to the compiler, which would sum the kernel's gradient over the devices at every chunk: here it is summed once. Over a
vocabulary that is split, only maxima and sums of a chunk's rows are exchanged (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxsys.kernels.matmul import linear, weight_gradient
from parallelism.manual import on_devices, sum_gradient, width_axes
from parallelism.sharding import axes_of, current, spec_of

# Logits alive at once on a device, in elements: large enough for full-speed matmuls.
CHUNK_LOGITS = 1 << 23


def chunk_rows(rows: int, width: int, vocabulary: int) -> int:
    """Tokens a chunk, such that its logits [chunk, vocabulary] are few: see CHUNK_LOGITS.

    They may also be as many as the hidden states [rows, width] are, which are alive anyway: each chunk reads the
    kernel and adds to its gradient, so that chunks of few tokens would be all memory traffic.
    """
    allowed = min(max(1, max(CHUNK_LOGITS, rows * width) // vocabulary), rows)
    return -(-rows // -(-rows // allowed))


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
    return _on_mesh(hidden, kernel, targets, vocabulary, softcap, gradients=False)[0]


def _forward(hidden, kernel, targets, vocabulary, softcap):
    total, d_hidden, d_kernel = _on_mesh(hidden, kernel, targets, vocabulary, softcap, gradients=True)
    return total, (d_hidden, d_kernel)


def _backward(vocabulary, softcap, saved, g):
    d_hidden, d_kernel = saved
    return (g * d_hidden).astype(d_hidden.dtype), (g * d_kernel).astype(d_kernel.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(hidden, kernel, targets, vocabulary, softcap, *, gradients):
    """The loss and, with ``gradients``, those of hidden and kernel."""
    context = current()
    if context is None or context.mesh.size == 1:
        return _local(hidden, kernel, targets, vocabulary, softcap, (), (), (), gradients)
    rows = spec_of(targets.shape, ("batch", "seq"))
    split = spec_of(kernel.shape, ("act_vocab", None))
    row_axes, vocabulary_axes = axes_of(rows), axes_of(split)
    scatter = width_axes(row_axes, kernel.shape[1])
    tokens = PartitionSpec(*rows, None)
    outputs = (PartitionSpec(), tokens, PartitionSpec(split[0], scatter or None)) if gradients else (PartitionSpec(),)
    local = partial(
        _local, vocabulary=vocabulary, softcap=softcap, row_axes=row_axes, vocabulary_axes=vocabulary_axes,
        scatter=scatter, gradients=gradients,
    )  # fmt: skip
    return on_devices(local, (tokens, split, rows), outputs)(hidden, kernel, targets)


def _local(hidden, kernel, targets, vocabulary, softcap, row_axes, vocabulary_axes, scatter, gradients):
    """One device's tokens [b, t] and rows of the vocabulary; sums are over the devices of the given mesh axes."""
    D, V = hidden.shape[-1], kernel.shape[0]
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    N = targets.size
    c = chunk_rows(N, D, V)
    missing = -N % c
    h = jnp.pad(hidden.reshape(N, D), ((0, missing), (0, 0))).reshape(-1, c, D)
    t = jnp.pad(targets.reshape(N), (0, missing), constant_values=-1).reshape(-1, c)
    offset = lax.axis_index(vocabulary_axes) * V if vocabulary_axes else 0

    def step(state, chunk):
        total, d_kernel = state
        h, t = chunk
        nll, d_logits = _chunk(h, kernel, t, offset, vocabulary, softcap, vocabulary_axes)
        if not gradients:
            return (total + nll, d_kernel), None
        d = d_logits.astype(kernel.dtype)
        d_h = jnp.einsum("nv,vd->nd", d, kernel, preferred_element_type=wide)
        d_kernel += weight_gradient(d, h.astype(kernel.dtype))
        return (total + nll, d_kernel), d_h if vocabulary_axes else d_h.astype(hidden.dtype)

    start = (jnp.zeros((), wide), jnp.zeros(kernel.shape if gradients else (), wide))
    (total, d_kernel), d_hidden = lax.scan(step, start, (h, t))
    total = lax.psum(total, row_axes)
    if not gradients:
        return (total,)
    d_hidden = lax.psum(d_hidden, vocabulary_axes).reshape(-1, D)[:N].reshape(hidden.shape)
    d_kernel = sum_gradient(d_kernel, row_axes, scatter)
    return total, d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype)


def _chunk(h, kernel, targets, offset, vocabulary, softcap, axes):
    """Loss of one chunk h [c, D], and its gradient with respect to the logits [c, V] before the cap.

    kernel: rows ``offset`` and following of the vocabulary, the others are on the devices along ``axes``.
    """
    wide = jnp.promote_types(h.dtype, jnp.float32)
    raw = linear(h.astype(wide), kernel)
    logits = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    # A comparison and a sum instead of a gather: a target is on one of the devices.
    token = offset + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(token < vocabulary, logits, -jnp.inf)
    hit = token == targets[:, None]
    top = lax.pmax(lax.stop_gradient(logits.max(-1, keepdims=True)), axes) if axes else logits.max(-1, keepdims=True)
    e = jnp.exp(logits - top)
    normaliser = lax.psum(e.sum(-1, keepdims=True), axes)
    found = lax.psum(jnp.where(hit, logits, 0).sum(-1, keepdims=True), axes)
    valid = (targets >= 0)[:, None]
    nll = jnp.where(valid, jnp.log(normaliser) + top - found, 0).sum()
    d = jnp.where(valid, e / normaliser - hit, 0)
    if softcap is not None:
        d = d * (1 - jnp.square(jnp.tanh(raw / softcap)))
    return nll, d
