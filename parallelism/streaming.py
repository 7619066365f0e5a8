"""Arrays in host memory inside traced code: brought to the device a few at a time, and put back.

In JAX the memory that a value lies in is part of its type, so what is to be moved is read off the values; on CPU, where
the two memories are one, the same program runs and moves nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from parallelism.mesh import STAGE
from parallelism.sharding import current, manual_axes

Tree = TypeVar("Tree")
Arrays = dict[str, jax.Array]

HOST = "pinned_host"  # the memory kind, in shardings
AHEAD = 2  # groups on the device at once: one is computed on while the next comes


def in_host(x: jax.Array) -> bool:
    """Whether a value, of a type that a trace knows, lies in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def to_device(tree: Tree) -> Tree:
    """Everything in device memory; what is there already stays."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if in_host(x) else x, tree)


def to_host(x: jax.Array) -> jax.Array:
    """An array in host memory."""
    return jax.device_put(x, jax.memory.Space.Host)


def like_before(tree: Tree, before: Tree) -> Tree:
    """Each array in the memory of its counterpart in ``before``."""
    return jax.tree.map(lambda x, old: to_host(x) if in_host(old) else x, tree, before)


# ------------------------------------------------------------------------------------------------- groups of an update


def in_turn(fn: Callable[[Tree], Any], groups: Iterable[Tree]) -> list[Any]:
    """``fn(group)`` of each, at most ``AHEAD`` at a time: a group waits for the result of the one so many before it.

    ``fn`` fetches what it needs (``to_device``) and puts back what it should (``like_before``), so that one group's
    transfers overlap with another's computation.
    """
    results: list[Any] = []
    for group in groups:
        if len(results) >= AHEAD:
            group, results[-AHEAD] = lax.optimization_barrier((group, results[-AHEAD]))
        results.append(fn(group))
    return results


def over_rows(fn: Callable[[Any, Any], Any], stacks: Tree, read: Any) -> Tree:
    """``stacks`` with row i of all arrays replaced by ``fn(row i of stacks, row i of read)``, for every i in order.

    All arrays have the same first dimension. What of ``stacks`` lies in host memory stays there: one row is computed
    on while the next comes, in place (donate the stacks). Rows that the active context's mesh has on several stages are
    done on each stage for itself.
    """
    if (context := current()) is not None and context.mesh.shape.get(STAGE, 1) > 1 and STAGE not in manual_axes():
        rows = PartitionSpec(STAGE)
        each = jax.shard_map(
            partial(over_rows, fn),
            mesh=context.mesh,
            in_specs=rows,
            out_specs=rows,
            axis_names={STAGE},
            check_vma=False,
        )
        return each(stacks, read)
    leaves, tree = jax.tree.flatten(stacks)
    hosted = [in_host(x) for x in leaves]
    rows = leaves[0].shape[0]

    def row(x: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(x, i, keepdims=False)

    def fetched(leaves: list[jax.Array], i: jax.Array) -> list[jax.Array | None]:
        return [to_device(row(x, i)) if away else None for x, away in zip(leaves, hosted, strict=True)]

    def step(carry: Any, i: jax.Array) -> Any:
        leaves, here = carry
        now = [row(x, i) if y is None else y for x, y in zip(leaves, here, strict=True)]
        ahead = fetched(leaves, jnp.minimum(i + 1, rows - 1))
        # A row is written after the next one has been read, or the GPU's compiler copies whole stacks, each time round.
        ordered = [
            (x, y) if y is None else lax.optimization_barrier((x, y)) for x, y in zip(leaves, ahead, strict=True)
        ]
        leaves, ahead = [x for x, _ in ordered], [y for _, y in ordered]
        new = fn(jax.tree.unflatten(tree, now), jax.tree.map(lambda x: row(x, i), read))
        new = [like_before(x, old) for x, old in zip(jax.tree.leaves(new), leaves, strict=True)]
        leaves = [lax.dynamic_update_index_in_dim(old, x, i, 0) for old, x in zip(leaves, new, strict=True)]
        return (leaves, ahead), None

    (leaves, _), _ = lax.scan(step, (leaves, fetched(leaves, jnp.int32(0))), jnp.arange(rows))
    return jax.tree.unflatten(tree, leaves)


# --------------------------------------------------------------------------------------------- parameters of one layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streamed:
    """A parameter in host memory, and what stands for it where gradients are taken.

    The gradient of a value lies where the value does, which would be the host. ``tap`` is in device memory, has no
    content, and gets the gradient.
    """

    host: jax.Array
    tap: jax.Array


def taps(params: Mapping[str, jax.Array]) -> Arrays:
    """What to differentiate by instead of ``params``: a tap for each array in host memory, the array itself else."""
    return {key: jnp.zeros(x.shape, x.dtype) if in_host(x) else x for key, x in params.items()}


def tapped(params: Mapping[str, jax.Array], taps: Mapping[str, jax.Array]) -> dict[str, Any]:
    """``params`` such that gradients go to ``taps``: ``Streamed`` for those in host memory, the tap itself else."""
    return {key: Streamed(x, taps[key]) if in_host(x) else taps[key] for key, x in params.items()}


def is_streamed(x: Any) -> bool:
    """Whether ``fetch`` has anything to do."""
    return isinstance(x, Streamed) or in_host(x)


def fetch(x: Any) -> jax.Array:
    """The array in device memory; x: a ``Streamed``, or an array in either memory."""
    return _fetch(x.host, x.tap) if isinstance(x, Streamed) else to_device(x)


@jax.custom_vjp
def _fetch(host: jax.Array, tap: jax.Array) -> jax.Array:
    return to_device(host)


_fetch.defvjp(lambda host, tap: (_fetch(host, tap), None), lambda _, g: (None, g))


# --------------------------------------------------------------------------------------------------------- activations


def offloading(policy: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """A ``jax.checkpoint`` policy: values of these names wait in host memory, ``policy`` decides on all others.

    names: as given by ``jax.ad_checkpoint.checkpoint_name``. Name what comes into a scanned layer, not what it returns:
    a scan keeps its carry by itself.
    """
    named = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), offload_src="device", offload_dst=HOST
    )

    def decide(primitive: Any, *avals: Any, **params: Any) -> Any:
        mine = primitive.name == "name" and params["name"] in names
        return (named if mine else policy)(primitive, *avals, **params)

    return decide
