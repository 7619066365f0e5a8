"""Rotary position embedding (Su et al. 2021), in the two-halves form of the Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.kernels.matmul import transposed
from jaxsys.models.config import ModelConfig
from parallelism.sharding import platform


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position, [h/2] float64."""
    inverse = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    # Llama 3: long wavelengths are divided by the factor, short ones kept, those between blended.
    turns = scaling.original_max_position * inverse / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * inverse + (1 - keep) * inverse / scaling.factor


def rotations(positions: jax.Array, config: ModelConfig, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] to (cos, sin), each [B, T, 1, h/2], computed in at least float32."""
    wide = jnp.promote_types(dtype, jnp.float32)
    inverse = jnp.asarray(frequencies(config), wide)
    if platform() == "cpu":
        # A transpose in memory ends XLA:CPU's fusion: else sines are computed again for every head of every layer.
        angle = inverse[:, None] * positions.reshape(-1).astype(wide)
        cos, sin = (transposed(turn).reshape(*positions.shape, 1, -1) for turn in (jnp.cos(angle), jnp.sin(angle)))
        return cos, sin
    angle = positions[..., None, None].astype(wide) * inverse
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x [B, T, H, h]: each pair (x[i], x[i + h/2]) turned by its angle."""
    cos, sin = angles
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
