"""Learning-rate schedules by name: a factor in [0, 1] on the peak rate."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxsys.configuration import expect, expect_at_least


@dataclasses.dataclass(frozen=True)
class Constant:
    """The peak rate after a linear warm-up."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        expect_at_least(self, 0, "warmup_steps")

    def factor(self, step: jax.Array, steps: int) -> jax.Array:
        return _warm(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to ``final`` of the peak at the last step."""

    warmup_steps: int = 0
    final: float = 0.1

    def __post_init__(self) -> None:
        expect_at_least(self, 0, "warmup_steps")
        _expect_share(self, "final")

    def factor(self, step: jax.Array, steps: int) -> jax.Array:
        t = jnp.clip((step - self.warmup_steps) / max(steps - self.warmup_steps, 1), 0.0, 1.0)
        return _warm(step, self.warmup_steps) * (self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * t)))


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: linear to ``final`` over the last ``decay`` of all steps (Hu et al. 2024, section 4)."""

    warmup_steps: int = 0
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        expect_at_least(self, 0, "warmup_steps")
        _expect_share(self, "decay", "final")

    def factor(self, step: jax.Array, steps: int) -> jax.Array:
        length = max(self.decay * steps, 1.0)
        t = jnp.clip((step - (steps - length)) / length, 0.0, 1.0)
        return _warm(step, self.warmup_steps) * (1 - (1 - self.final) * t)


def _warm(step: jax.Array, warmup_steps: int) -> jax.Array:
    # The first step is 1/warmup of the peak and not zero: a step that changes nothing is a step lost.
    return jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1)).astype(jnp.float32)


def _expect_share(schedule: object, *names: str) -> None:
    expect(schedule, "a share from 0 to 1", lambda value: 0 <= value <= 1, *names)
