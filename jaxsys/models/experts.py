"""The mixture-of-experts layer: a router, its experts, and what routing came to.

Shapes: B batch, T tokens, D model width, E experts, F feed-forward width of one, k experts a token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxsys.kernels.grouped import grouped_linear
from jaxsys.kernels.matmul import linear
from jaxsys.models.config import Experts, ModelConfig
from jaxsys.models.mlp import ACTIVATIONS, MLP, Linear
from parallelism import experts
from parallelism.experts import EXPERTS, WIDTH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What routing came to: sums over tokens, in at least float32; padding does not count.

    load: [E] tokens that chose each expert. probability: [E] of each. z: scalar, squared log-sum-exp of the logits.
    dropped: scalar, (token, expert) pairs over the capacity. Of several layers [L, E] and [L].
    """

    load: jax.Array
    probability: jax.Array
    z: jax.Array
    dropped: jax.Array


class MixtureOfExperts(nnx.Module):
    """Gated linear units of which each token goes through a few, and one that all go through (Shazeer et al. 2017)."""

    def __init__(self, c: ModelConfig, e: Experts, *, dtype, rngs):
        D, E, F = c.d_model, e.number, e.width
        out_std = 0.02 / np.sqrt(2 * c.n_layers)
        self.settings, self.activation = e, c.activation
        self.router = Linear((E, D), ("router", "embed"), dtype=dtype, rngs=rngs)
        self.gate = Linear((E, F, D), ("experts", "expert_mlp", "expert_embed"), dtype=dtype, rngs=rngs)
        self.up = Linear((E, F, D), ("experts", "expert_mlp", "expert_embed"), dtype=dtype, rngs=rngs)
        self.down = Linear((E, D, F), ("experts", "expert_embed", "expert_mlp"), std=out_std, dtype=dtype, rngs=rngs)
        self.shared = MLP(c, e.shared_width, dtype=dtype, rngs=rngs) if e.shared_width else None

    def __call__(self, x: jax.Array, used: jax.Array, *, drop: bool) -> tuple[jax.Array, RouterSums]:
        """x [B, T, D], used [B, T] bool: [B, T, D], and the sums. drop: whether the capacity holds."""
        e = self.settings
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = linear(x.astype(wide), self.router.kernel[...].astype(wide))
        routes, probability = route(logits, used, e)
        kernels = {"gate": self.gate.kernel[...], "up": self.up.kernel[...], "down": self.down.kernel[...]}
        axes = {
            "gate": (EXPERTS, "act_mlp", WIDTH),
            "up": (EXPERTS, "act_mlp", WIDTH),
            "down": (EXPERTS, WIDTH, "act_mlp"),
        }
        y, dropped = experts.apply(
            self._units, x, routes, kernels, axes, capacity_factor=e.capacity_factor if drop else None
        )
        if self.shared is not None:
            y = y + self.shared(x)
        counts = used.astype(wide)[..., None]
        chosen = (routes.expert[..., None] == jnp.arange(e.number)).any(2)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        return y, RouterSums(
            (chosen * counts).sum((0, 1)), (probability * counts).sum((0, 1)), (z * counts).sum(), dropped
        )

    def _units(self, rows, sizes, kernels):
        hidden = ACTIVATIONS[self.activation](grouped_linear(rows, kernels["gate"], sizes))
        return grouped_linear(hidden * grouped_linear(rows, kernels["up"], sizes), kernels["down"], sizes)


def route(logits: jax.Array, used: jax.Array, e: Experts) -> tuple[experts.Routes, jax.Array]:
    """logits [B, T, E] to each token's experts with their weights, and the probabilities [B, T, E] of all."""
    if e.routing == "softmax":
        scores = probability = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
        probability = scores / scores.sum(-1, keepdims=True)
    weight, expert = lax.top_k(scores, e.per_token)
    if e.normalise:
        weight = weight / weight.sum(-1, keepdims=True)
    return experts.Routes(expert, weight * e.scale, used), probability


def balance_loss(sums: RouterSums, load: jax.Array, tokens: jax.Array) -> jax.Array:
    """The part of the load-balance loss that these sums are, of a batch of so many ``tokens`` and of this ``load``."""
    fraction, probability = load / jnp.maximum(tokens, 1), sums.probability / jnp.maximum(tokens, 1)
    return load.shape[-1] * (lax.stop_gradient(fraction) * probability).sum(-1).mean()


def z_loss(sums: RouterSums, tokens: jax.Array) -> jax.Array:
    """The part of the router's z-loss that these sums are, of a batch of so many ``tokens``."""
    return sums.z.mean() / jnp.maximum(tokens, 1)


def router_metrics(sums: RouterSums, tokens: jax.Array) -> dict[str, jax.Array]:
    """Of a whole batch: both losses without their coefficients, the largest load of an expert over its layer's mean,
    and the share of (token, expert) pairs that were dropped."""
    pairs = jnp.maximum(sums.load.sum(-1), 1)
    return {
        "balance_loss": balance_loss(sums, sums.load, tokens),
        "z_loss": z_loss(sums, tokens),
        "expert_load": (sums.load.max(-1) * sums.load.shape[-1] / pairs).max(),
        "expert_dropped": sums.dropped.sum() / pairs.sum(),
    }
