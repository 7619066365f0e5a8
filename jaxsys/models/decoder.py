"""The decoder transformer: one definition for training, scoring, prefill and cached decode.

Shapes: B batch (or replicas), T tokens, D model width, F feed-forward width, H query heads, K key/value
heads, h head size, V vocabulary. Kernels are output-major; counts of heads are read off the arrays, since
a layout may pad them.
"""

from __future__ import annotations

from collections.abc import Callable
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
from jaxsys.models.layers import Layers, default_storage
from jaxsys.models.rope import rotate, rotations
from parallelism.sharding import constrain

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
# Names of what a layer may keep for its backward pass, for ``jax.checkpoint`` policies and offload.
RESIDUAL, MLP_RESIDUAL, QUERY, KEY, VALUE, GATE, UP = "residual", "mlp_residual", "query", "key", "value", "gate", "up"
FULL = np.iinfo(np.int32).max  # the window of a layer that sees everything


class Linear(nnx.Module):
    """A kernel [out..., in...]; ``axes`` names every dimension, ``contract`` of them are inputs."""

    def __init__(self, shape, axes, *, contract=1, std=0.02, dtype, rngs):
        self.contract = contract
        # float: a numpy scalar would decide the dtype of the product.
        self.kernel = nnx.Param(float(std) * jax.random.normal(rngs.params(), shape, dtype), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.kernel[...], self.contract)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), in at least float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width, *, eps, offset, dtype):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, dtype), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + self.scale[...].astype(y.dtype))).astype(x.dtype)


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

    def __call__(self, x, angles, context, carry, *, layer, window):
        q = checkpoint_name(constrain(rotate(self.q(x), angles), ("batch", "seq", "act_heads", None)), QUERY)
        k = checkpoint_name(constrain(rotate(self.k(x), angles), ("batch", "seq", "act_kv_heads", None)), KEY)
        v = checkpoint_name(constrain(self.v(x), ("batch", "seq", "act_kv_heads", None)), VALUE)
        y, carry = attend(
            q, k, v, context, carry,
            layer=layer, window=window, scale=self.scale, softcap=self.softcap, dtype=self.q.kernel.dtype,
        )  # fmt: skip
        return self.o(constrain(y, ("batch", "seq", "act_heads", None))), carry


class MLP(nnx.Module):
    """Gated linear unit (Shazeer 2020)."""

    def __init__(self, c: ModelConfig, *, dtype, rngs):
        out_std = 0.02 / np.sqrt(2 * c.n_layers)
        self.activation = c.activation
        self.gate = Linear((c.d_ff, c.d_model), ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.up = Linear((c.d_ff, c.d_model), ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.down = Linear((c.d_model, c.d_ff), ("embed", "mlp"), std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(self.gate(x), GATE), checkpoint_name(self.up(x), UP)
        y = ACTIVATIONS[self.activation](gate) * up
        return self.down(constrain(y, ("batch", "seq", "act_mlp")))


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, *, dtype, rngs):
        def norm():
            return RMSNorm(c.d_model, eps=c.norm_eps, offset=c.norm_offset, dtype=dtype)

        self.attention_norm = norm()
        self.attention = Attention(c, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm() if c.post_norms else None
        self.mlp_norm = norm()
        self.mlp = MLP(c, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if c.post_norms else None

    def __call__(self, x, angles, context, carry, *, layer, window):
        x = checkpoint_name(x, RESIDUAL)
        y, carry = self.attention(self.attention_norm(x), angles, context, carry, layer=layer, window=window)
        x = constrain(x + (self.attention_post_norm or _same)(y), ("batch", "residual", "act_embed"))
        x = checkpoint_name(x, MLP_RESIDUAL)
        y = self.mlp(self.mlp_norm(x))
        return constrain(x + (self.mlp_post_norm or _same)(y), ("batch", "residual", "act_embed")), carry


def _same(x):
    return x


class Decoder(nnx.Module):
    """Token ids in, hidden states out; ``head`` turns hidden states into logits (the output kernel).

    dtype: of the parameters made here. Arrays of another dtype may be merged in: matmuls run in the
    dtype of their kernel, activations in ``activation_dtype`` of it.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, storage: str | None = None):
        c = config
        self.config = c
        self.embed = Linear((c.vocab_size, c.d_model), ("vocab", "embed"), dtype=dtype, rngs=rngs)
        self.layers = Layers(
            [Block(c, dtype=dtype, rngs=rngs) for _ in range(c.n_layers)], storage or default_storage()
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
    ) -> tuple[jax.Array, Any]:
        """tokens [B, T] int32 to hidden states [B, T, D] after the last norm, and the carry."""
        c = self.config
        dtype = activation_dtype(self.embed.kernel.dtype)
        # Whole rows, the vocabulary still split: a look-up in a table cut along the width has to be redone whole.
        table = constrain(self.embed.kernel[...], ("act_vocab", None))
        # The factor is rounded to the kernel's dtype, as Gemma's own implementations do.
        x = lookup(table, tokens).astype(dtype) * jnp.asarray(c.embed_scale, table.dtype).astype(dtype)
        x = constrain(x, ("batch", "residual", "act_embed"))
        angles = rotations(jnp.maximum(context.positions, 0), c, dtype)
        windows = {}
        if c.windows:
            windows["window"] = np.array([FULL if w is None else w for w in c.windows], np.int32)

        def body(block, x, carry, layer, row):
            return block(x, angles, context, carry, layer=layer, window=row.get("window"))

        x, carry = self.layers.apply(body, x, carry, windows, remat)
        return self.norm(x), carry

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
