"""The linear layer, and the feed-forward part of a block."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxsys.kernels.matmul import linear
from jaxsys.models.config import ModelConfig
from parallelism.sharding import constrain

GATE, UP = "gate", "up"  # names of what a layer may keep, see decoder.py
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


class Linear(nnx.Module):
    """A kernel [out..., in...]; ``axes`` names every dimension, ``contract`` of them are inputs."""

    def __init__(self, shape, axes, *, contract=1, std=0.02, dtype, rngs):
        self.contract = contract
        # float: a numpy scalar would decide the dtype of the product.
        self.kernel = nnx.Param(float(std) * jax.random.normal(rngs.params(), shape, dtype), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.kernel[...], self.contract)


class MLP(nnx.Module):
    """Gated linear unit (Shazeer 2020)."""

    def __init__(self, c: ModelConfig, width: int, *, dtype, rngs):
        out_std = 0.02 / np.sqrt(2 * c.n_layers)
        self.activation = c.activation
        self.gate = Linear((width, c.d_model), ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.up = Linear((width, c.d_model), ("mlp", "embed"), dtype=dtype, rngs=rngs)
        self.down = Linear((c.d_model, width), ("embed", "mlp"), std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = gathered(x)
        gate, up = (constrain(linear(x), ("batch", "seq", "act_mlp")) for linear in (self.gate, self.up))
        gate, up = checkpoint_name(gate, GATE), checkpoint_name(up, UP)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


def gathered(x: jax.Array) -> jax.Array:
    """Tokens that are split over ``tensor`` between blocks, together: once for all projections that read them.

    Without the first constraint the compiler gathers what they are made of, which is wider.
    """
    return constrain(constrain(x, ("batch", "residual", "act_embed")), ("batch", "seq", "act_embed"))
