"""The decoder transformer: one definition for training, scoring, prefill and cached decode.

Shapes: B batch (or replicas), T tokens, D model width, F feed-forward width, H query heads, K key/value
heads, h head size, V vocabulary. Kernels are output-major; counts of heads are read off the arrays, since
a layout may pad them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxsys.kernels.attention import Paged, Rows, attend
from jaxsys.kernels.embedding import lookup
from jaxsys.kernels.matmul import activation_dtype, linear
from jaxsys.models.config import ModelConfig
from jaxsys.models.experts import MixtureOfExperts, RouterSums
from jaxsys.models.layers import Layers, default_storage
from jaxsys.models.mlp import MLP, Linear, gathered
from jaxsys.models.rope import rotate, rotations
from parallelism.sharding import constrain

# Names of what a layer may keep for its backward pass, for ``jax.checkpoint`` policies and offload; see mlp.py too.
RESIDUAL, MLP_RESIDUAL, QUERY, KEY, VALUE = "residual", "mlp_residual", "query", "key", "value"
FULL = np.iinfo(np.int32).max  # the window of a layer that sees everything


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the dimensions that ``shape`` gives, in at least float32 (Zhang and Sennrich
    2019). Zeros that a layout appends to them do not count."""

    def __init__(self, *shape, axes=("norm",), eps, offset, dtype):
        self.eps, self.offset, self.count = eps, offset, math.prod(shape)
        self.scale = nnx.Param(jnp.full(shape, 1.0 - offset, dtype), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, y = self.scale[...], x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt((y * y).sum(tuple(range(-scale.ndim, 0)), keepdims=True) / self.count + self.eps)
        return (y * (self.offset + scale.astype(y.dtype))).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: ModelConfig, *, dtype, rngs):
        D, H, K, h = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
        out_std = 0.02 / np.sqrt(2 * c.n_layers)
        self.scale, self.softcap = c.scale, c.attention_softcap
        self.q = Linear((H, h, D), ("heads", "head_dim", "embed"), dtype=dtype, rngs=rngs)
        self.k = Linear((K, h, D), ("kv_heads", "head_dim", "embed"), dtype=dtype, rngs=rngs)
        self.v = Linear((K, h, D), ("kv_heads", "head_dim", "embed"), dtype=dtype, rngs=rngs)
        self.o = Linear((D, H, h), ("embed", "heads", "head_dim"), contract=2, std=out_std, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (_qk_norm(c, n, axis, dtype) for n, axis in ((H, "heads"), (K, "kv_heads")))

    def __call__(self, x, angles, context, carry, *, layer, window):
        x = gathered(x)
        # As they leave the projections: or tokens stay split over ``tensor``, kernels are gathered over it, and their
        # gradients summed.
        q = constrain(self.q(x), ("batch", "seq", "act_heads", None))
        k = constrain(self.k(x), ("batch", "seq", "act_kv_heads", None))
        q, k = rotate((self.q_norm or _same)(q), angles), rotate((self.k_norm or _same)(k), angles)
        v = constrain(self.v(x), ("batch", "seq", "act_kv_heads", None))
        q, k, v = (checkpoint_name(x, name) for x, name in ((q, QUERY), (k, KEY), (v, VALUE)))
        y, carry = attend(
            q, k, v, context, carry,
            layer=layer, window=window, scale=self.scale, softcap=self.softcap, dtype=self.q.kernel.dtype,
        )  # fmt: skip
        return self.o(constrain(y, ("batch", "seq", "act_heads", None))), carry


def _qk_norm(c: ModelConfig, heads, axis, dtype):
    if c.qk_norm is None:
        return None
    shape, axes = ((c.head_dim,), ("norm",)) if c.qk_norm == "head" else ((heads, c.head_dim), (axis, "norm"))
    return RMSNorm(*shape, axes=axes, eps=c.norm_eps, offset=c.norm_offset, dtype=dtype)


class Block(nnx.Module):
    """One layer: attention, then an MLP or a mixture of experts."""

    def __init__(self, c: ModelConfig, layer: int, *, dtype, rngs):
        def norm():
            return RMSNorm(c.d_model, eps=c.norm_eps, offset=c.norm_offset, dtype=dtype)

        self.attention_norm = norm()
        self.attention = Attention(c, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm() if c.post_norms else None
        self.mlp_norm = norm()
        experts = c.experts_of(layer)
        self.mlp = MLP(c, c.d_ff, dtype=dtype, rngs=rngs) if experts is None else None
        self.experts = None if experts is None else MixtureOfExperts(c, experts, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if c.post_norms else None

    def __call__(self, x, angles, context, carry, *, layer, window):
        x = checkpoint_name(x, RESIDUAL)
        y, carry = self.attention(self.attention_norm(x), angles, context, carry, layer=layer, window=window)
        x = constrain(x + (self.attention_post_norm or _same)(y), ("batch", "residual", "act_embed"))
        x = checkpoint_name(x, MLP_RESIDUAL)
        y, sums = self.mlp_norm(x), None
        if self.mlp is not None:
            y = self.mlp(y)
        if self.experts is not None:
            # What is served must not depend on what shares its batch.
            y, sums = self.experts(y, context.used, drop=isinstance(context, Rows))
        return constrain(x + (self.mlp_post_norm or _same)(y), ("batch", "residual", "act_embed")), carry, sums


def _same(x):
    return x


def of_layers(c: ModelConfig) -> dict[str, np.ndarray]:
    """What differs between layers and is data: arrays [L]."""
    if not c.windows:
        return {}
    return {"window": np.array([FULL if w is None else w for w in c.windows], np.int32)}


class Decoder(nnx.Module):
    """Token ids in, hidden states out; ``head`` turns hidden states into logits (the output kernel).

    dtype: of the parameters made here. Arrays of another dtype may be merged in: matmuls run in the
    dtype of their kernel, activations in ``activation_dtype`` of it. layers: whether there are any; without them it is
    what comes before and after those of a pipeline. cuts: as for ``Layers``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        storage: str | None = None,
        layers: bool = True,
        cuts: Collection[int] = (),
    ):
        c = config
        self.config = c
        self.embed = Linear((c.vocab_size, c.d_model), ("vocab", "embed"), dtype=dtype, rngs=rngs)
        self.layers = Layers(
            [Block(c, i, dtype=dtype, rngs=rngs) for i in range(c.n_layers if layers else 0)],
            storage or default_storage(),
            cuts,
        )
        self.norm = RMSNorm(c.d_model, eps=c.norm_eps, offset=c.norm_offset, dtype=dtype)
        if not c.tie_embeddings:
            self.head = Linear((c.vocab_size, c.d_model), ("vocab", "embed"), dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        context: Rows | Paged,
        carry: Any = None,
        *,
        remat: Callable[[Callable], Callable] | None = None,
    ) -> tuple[jax.Array, Any, RouterSums | None]:
        """tokens [B, T] int32 to hidden states [B, T, D] after the last norm, the carry, and what routing came to in
        the layers that have experts."""
        x = self.embedded(tokens)
        angles = rotations(jnp.maximum(context.positions, 0), self.config, x.dtype)

        def body(block, x, carry, layer, row):
            return block(x, angles, context, carry, layer=layer, window=row.get("window"))

        x, carry, sums = self.layers.apply(body, x, carry, of_layers(self.config), remat)
        return self.norm(x), carry, sums

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, T] int32 to what the first layer gets, [B, T, D]."""
        dtype = activation_dtype(self.embed.kernel.dtype)
        # Whole rows, the vocabulary still split: a look-up in a table cut along the width has to be redone whole.
        table = constrain(self.embed.kernel[...], ("act_vocab", None))
        # The factor is rounded to the kernel's dtype, as Gemma's own implementations do.
        x = lookup(table, tokens).astype(dtype) * jnp.asarray(self.config.embed_scale, table.dtype).astype(dtype)
        return constrain(x, ("batch", "residual", "act_embed"))

    @property
    def head_kernel(self) -> jax.Array:
        """[V, D]: the output projection, the embedding itself where they are tied."""
        return self.embed.kernel[...] if self.config.tie_embeddings else self.head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] to logits [..., V] in at least float32: soft cap applied, -inf where padded."""
        c, wide = self.config, jnp.promote_types(hidden.dtype, jnp.float32)
        logits = linear(hidden.astype(wide), self.head_kernel)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        if logits.shape[-1] > c.vocab_size:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < c.vocab_size, logits, -jnp.inf)
        return logits
