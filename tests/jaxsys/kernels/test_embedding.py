"""The embedding look-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsys.kernels.embedding import lookup
from parallelism import MeshSpec, sharding_context

TOKENS = np.array([[3, 1, 3]], np.int32)


def test_rows_of_the_table_and_their_gradient():
    table = np.arange(10, dtype=np.float32).reshape(5, 2)
    rows, pull = jax.vjp(lambda t: lookup(t, TOKENS), table)
    np.testing.assert_array_equal(rows, table[TOKENS])
    (gradient,) = pull(np.ones((1, 3, 2), np.float32))
    np.testing.assert_array_equal(gradient, np.array([0, 1, 0, 2, 0])[:, None] * np.ones(2))


def test_a_decode_loop_keeps_no_converted_copy_of_the_table():
    table = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)

    def decode(table, tokens, steps):
        def step(_, tokens):
            return (tokens + lookup(table, tokens).astype(jnp.float32).sum(-1).astype(jnp.int32)) % 4096

        return lax.fori_loop(0, steps, step, tokens)

    compiled = jax.jit(decode).lower(table, np.zeros(4, np.int32), np.int32(2)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 64


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=4,context=2", "tensor=4"])
def test_on_a_mesh_rows_and_gradient_are_the_same(mesh):
    """A table of 6 rows: split over 2 devices, whole where 4 do not divide it."""
    table = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    tokens = np.random.default_rng(0).integers(0, 6, (4, 16)).astype(np.int32)
    weight = np.random.default_rng(1).standard_normal((4, 16, 8)).astype(np.float32)
    built = MeshSpec.parse(mesh).build()

    def total(table):
        with sharding_context(built):
            rows = lookup(table, tokens)
        return (rows * weight).sum(), rows

    (_, rows), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(table)
    np.testing.assert_array_equal(rows, table[tokens])
    expected = np.zeros(table.shape)
    np.add.at(expected, tokens, weight)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
