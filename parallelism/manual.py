"""What is done by hand on every device and not left to the compiler: ``shard_map`` under the active context's rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from parallelism.sharding import current, manual_axes, platform


def on_devices(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """``fn`` on each device's shards, over all mesh axes that are not manual already."""
    context, manual = current(), manual_axes()
    assert context is not None, "on_devices needs a sharding_context"
    return jax.shard_map(
        fn,
        mesh=None if manual else context.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(context.mesh.axis_names) - manual,
        check_vma=False,
    )


def width_axes(row_axes: tuple[str, ...], width: int) -> tuple[str, ...]:
    """The mesh axes over which the gradient of a kernel [..., width] leaves scattered.

    Parameters are split over fsdp and expert along the width.
    """
    context = current()
    assert context is not None
    axes = tuple(axis for axis in ("fsdp", "expert") if axis in row_axes)
    return axes if width % math.prod(context.mesh.shape[axis] for axis in axes) == 0 else ()


def sum_gradient(d: jax.Array, row_axes: tuple[str, ...], scatter: tuple[str, ...]) -> jax.Array:
    """The sum of a kernel's gradient [V, width] over devices that hold different rows, scattered along the width."""
    d = lax.psum(d, tuple(axis for axis in row_axes if axis not in scatter))
    return scattered_sum(d, scatter, 1) if scatter else d


def scattered_sum(d: jax.Array, axes: str | tuple[str, ...], dimension: int) -> jax.Array:
    """The sum over mesh axes of d [..., n * w, ...], of which each device keeps its w of that dimension."""
    if platform() != "tpu":
        return lax.psum_scatter(d, axes, scatter_dimension=dimension, tiled=True)
    # The parts in a dimension of their own: this compiler would sum all of a gradient on every device and cut it then
    # where a part does not fill its tiles (64 of a width of 8192, beside a vocabulary that does not either), or where
    # the dimension beside it has size 1 (one expert a device). Elsewhere that costs a copy of it.
    n = lax.axis_size(axes)
    parts = d.reshape(*d.shape[:dimension], n, d.shape[dimension] // n, *d.shape[dimension + 1 :])
    return lax.psum_scatter(parts, axes, scatter_dimension=dimension)
