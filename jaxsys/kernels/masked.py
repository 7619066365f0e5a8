"""What every form of attention does with a score."""

from __future__ import annotations

import jax.numpy as jnp

NEVER = -1e30  # a masked score: finite, so that a row with no key at all gives zeros and not NaN


def cap(scores, softcap: float | None):
    """Scores kept within -softcap to softcap; None leaves them."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
