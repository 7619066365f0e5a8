"""A model opened, put on one device and run: what the tests here compare with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.kernels.attention import Rows
from jaxsys.models.pretrained import Pretrained
from jaxsys.models.state import Model, build
from parallelism import MeshSpec, plan, put

GOLDENS = Path(__file__).parents[2] / "goldens"
FAMILIES = ("llama2", "llama3", "smollm2", "gemma2")


def load(pretrained: Pretrained, storage: str = "listed") -> tuple[Model, dict[str, jax.Array]]:
    model = build(pretrained.config, dtype=jnp.float32, storage=storage)
    placed = plan(model.layout, MeshSpec().build(jax.devices()[:1]), units=model.units)
    return model, put(placed, pretrained.reader)


@pytest.fixture
def forward() -> Callable[..., np.ndarray]:
    """``forward(pretrained, tokens [B, T], storage)``: float32 logits [B, T, V]."""

    def run(pretrained: Pretrained, tokens: np.ndarray, storage: str = "listed") -> np.ndarray:
        model, params = load(pretrained, storage)

        @jax.jit
        def logits(params, tokens, rows):
            decoder = model.bind(params)
            return decoder.logits(decoder(tokens, rows)[0])

        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        rows = Rows(segments=np.ones(tokens.shape, np.int32), positions=positions)
        return np.asarray(logits(params, tokens, rows))

    return run


@pytest.fixture(params=FAMILIES)
def golden(request) -> Path:
    """The directory of each tiny model that transformers wrote."""
    return GOLDENS / request.param
