"""The one embedding look-up of the models: ``lookup``."""

from __future__ import annotations

import jax
from jax import lax


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of ``table`` [V, D] for int32 ``tokens`` [...]: [..., D] in the table's dtype."""
    if jax.default_backend() == "cpu":
        # XLA:CPU gathers bfloat16 as float32, and out of a decode loop it would hoist that conversion, of the whole
        # table: 60 ms a dispatch for 49152 x 576. Tied to the tokens the table is no invariant of the loop.
        table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]
