"""The tiny models that transformers wrote, and a model put on one device."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxsys.models.pretrained import Pretrained
from jaxsys.models.state import Model, build
from parallelism import MeshSpec, plan, put

GOLDENS = Path(__file__).parents[2] / "goldens"
FAMILIES = ("llama2", "llama3", "smollm2", "gemma2", "mixtral", "qwen3_moe", "olmoe")


def load(pretrained: Pretrained, storage: str = "listed") -> tuple[Model, dict[str, jax.Array]]:
    model = build(pretrained.config, dtype=jnp.float32, storage=storage)
    placed = plan(model.layout, MeshSpec().build(jax.devices()[:1]), units=model.units)
    return model, put(placed, pretrained.reader)
