"""Residuals read off compiled programs whose forward passes keep what is known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from parallelism.residuals import residuals

L, B, D = 4, 8, 16


def text(layer, repeat=1):
    """The gradient of L layers, summed over ``repeat`` batches one after the other."""

    def loss(w, x):
        return lax.scan(lambda x, w: (layer(x, w), None), x, w)[0].sum()

    def grads(w, xs):
        return lax.scan(lambda sums, x: (sums + jax.grad(loss)(w, x), None), jnp.zeros_like(w), xs)[0]

    w, xs = jax.ShapeDtypeStruct((L, D, D), jnp.float32), jax.ShapeDtypeStruct((repeat, B, D), jnp.float32)
    return jax.jit(grads).lower(w, xs).compile().as_text()


def layer(x, w):
    return jnp.tanh(jnp.sin(x @ w) @ w)


@pytest.mark.parametrize("repeat", [1, 3])
def test_what_every_layer_keeps_is_counted_once_a_batch(repeat):
    found = residuals(text(layer, repeat))
    stacked = [r for r in found if r.nbytes == L * B * D * 4]
    assert len(stacked) >= 2 and f"f32[{L},{B},{D}]" in stacked[0].shape
    assert "test_residuals.py" in stacked[0].source


def test_a_layer_that_is_computed_again_keeps_its_input_only():
    again = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    assert sum(r.nbytes for r in residuals(text(again))) == L * B * D * 4


def test_a_program_without_a_gradient_keeps_nothing():
    assert residuals(jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((4, 4))).compile().as_text()) == []
