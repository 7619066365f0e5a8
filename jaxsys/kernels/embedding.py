"""The one embedding look-up of the models: ``lookup``.

On a mesh it is done by hand: a device looks up what its rows of the table hold, the others add nothing (Shoeybi et al.
2019, section 3). Left to itself the compiler gathers the table, and sums its whole gradient on every device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from parallelism.manual import on_devices, sum_gradient, width_axes
from parallelism.sharding import axes_of, current, platform, spec_of


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of ``table`` [V, D] for int32 ``tokens`` [B, T]: [B, T, D] in the table's dtype."""
    context = current()
    if context is None or context.mesh.size == 1:
        return _local(table, tokens)
    rows = spec_of(tokens.shape, ("batch", "seq"))
    split = spec_of(table.shape, ("act_vocab", None))
    row_axes, table_axes = axes_of(rows), axes_of(split)
    scatter = width_axes(row_axes, table.shape[1])
    found = PartitionSpec(*rows, None)

    def here(table, tokens):
        """Places of the tokens in this device's rows, and which are there."""
        place = tokens - lax.axis_index(table_axes) * table.shape[0] if table_axes else tokens
        return jnp.clip(place, 0, table.shape[0] - 1), ((place >= 0) & (place < table.shape[0]))[..., None]

    def forward(table, tokens):
        place, mine = here(table, tokens)
        return lax.psum(jnp.where(mine, _local(table, place), 0), table_axes)

    def backward(table, tokens, g):
        place, mine = here(table, tokens)
        wide = jnp.promote_types(g.dtype, jnp.float32)
        d = jnp.zeros(table.shape, wide).at[place].add(jnp.where(mine, g, 0).astype(wide))
        return sum_gradient(d, row_axes, scatter).astype(table.dtype)

    # Both made here, where the context is: a gradient may be traced after it has ended.
    forwards = on_devices(forward, (split, rows), found)
    backwards = on_devices(backward, (split, rows, found), PartitionSpec(split[0], scatter or None))

    @jax.custom_vjp
    def run(table, tokens):
        return forwards(table, tokens)

    def run_forward(table, tokens):
        return run(table, tokens), (table, tokens)

    def run_backward(saved, g):
        table, tokens = saved
        return backwards(table, tokens, g), None

    run.defvjp(run_forward, run_backward)
    return run(table, tokens)


def _local(table: jax.Array, tokens: jax.Array) -> jax.Array:
    if platform() == "cpu":
        # XLA:CPU gathers bfloat16 as float32, and out of a decode loop it would hoist that conversion, of the whole
        # table: 60 ms a dispatch for 49152 x 576. Tied to the tokens the table is no invariant of the loop.
        table, tokens = lax.optimization_barrier((table, tokens))
    return table[tokens]
