"""Logical layout + mesh + rules -> where every array lies; arrays made there, and moved there and back."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored
from parallelism.mesh import AXES
from parallelism.rules import ACTIVATIONS, PARAMETERS, Rules

# ---------------------------------------------------------------------------------------------------------- planning


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was done with one dimension that does not divide over its mesh axes.

    array: key of the stored array; axis, size: the dimension's logical name and size.
    mesh_axes: the mesh axes that its rule asks for, with their sizes; unit: what the size counts in (see ``plan``).
    stored: the size it has now: larger than ``size`` if padded, the same if kept whole.
    """

    array: str
    axis: str
    size: int
    mesh_axes: tuple[tuple[str, int], ...]
    unit: int
    action: Literal["replicate", "pad"]
    stored: int

    def __str__(self) -> str:
        """One phrase, without the array."""
        done = f"padded to {self.stored}" if self.action == "pad" else "kept whole"
        return f"{self.axis}={self.size} does not divide over {_over(self.mesh_axes, self.unit)}: {done}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout on a mesh.

    layout: the given one with the padding that the rules added; shardings: one a stored array;
    decisions: every dimension that did not divide.
    """

    layout: Layout
    mesh: Mesh
    rules: Rules
    shardings: dict[str, NamedSharding]
    decisions: tuple[Decision, ...]


def plan(layout: Layout, mesh: Mesh, rules: Rules = PARAMETERS, units: Mapping[str, int] | None = None) -> Plan:
    """Decide the sharding, and where necessary the padding, of every stored array.

    layout: padding that it already has is dropped first, so that a plan for another mesh starts afresh.
    units: logical axes whose size counts in blocks that must not be cut: ``{"heads": H // K}`` keeps the query heads
    of one key/value head together, so that ``heads`` and ``kv_heads`` are split, padded or kept whole alike (H query
    heads, K key/value heads).
    Raises UserError, naming the array, for an axis name without a rule, two dimensions on one mesh axis, and a
    dimension that does not divide under ``error``.
    """
    stored, shardings, decisions = [], {}, []
    for key, array in layout.items():
        placed = _place(key, _unpadded(array), array.axes, dict(mesh.shape), rules, units or {})
        stored.append(dataclasses.replace(array, shape=placed.shape))
        shardings[key] = NamedSharding(mesh, placed.spec)
        decisions += placed.decisions
    return Plan(Layout(stored), mesh, rules, shardings, tuple(decisions))


def refuse_idle_axes(plan: Plan, activations: Rules, used: Iterable[str]) -> None:
    """Raises UserError for a mesh axis that splits nothing: its devices would all do the same work.

    plan: of the parameters. used: the axes of ``activations`` that the model's activations have.
    """
    by_activations = {mesh_axis for axis in used for mesh_axis in activations[axis].mesh_axes}
    busy = by_activations | {axis for sharding in plan.shardings.values() for axis in axes_of(sharding.spec)}
    named = by_activations | {
        mesh_axis
        for array in plan.layout.values()
        for axis in array.axes
        if axis
        for mesh_axis in plan.rules[axis].mesh_axes
    }
    for axis, size in plan.mesh.shape.items():
        if size > 1 and axis not in busy:
            raise UserError(
                f"mesh {axis}={size}: no parameter and no activation is split over {axis!r}, so its devices would only "
                f"repeat each other's work: expected one of {', '.join(a for a in AXES if a in named - {axis})}; "
                f"leave {axis} out"
            )


def _unpadded(stored: Stored) -> tuple[int, ...]:
    """The smallest shape that holds the logical arrays, in as many rows of a stack."""
    inner = tuple(map(max, zip(*(part.shape for part in stored.parts), strict=True)))
    return (stored.shape[0], *inner) if stored.stacked else inner


@dataclasses.dataclass(frozen=True)
class _Placed:
    shape: tuple[int, ...]
    spec: PartitionSpec
    decisions: list[Decision]


def _place(
    array: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mapping[str, int],
    rules: Rules,
    units: Mapping[str, int],
) -> _Placed:
    """Spec and padded shape of one array; ``mesh`` has the sizes of the mesh axes that may be used."""
    if len(shape) != len(axes):
        raise ValueError(f"{array}: shape {tuple(shape)} has {len(shape)} dimensions, axes {tuple(axes)} {len(axes)}")
    sizes: list[int] = []
    spec: list[tuple[str, ...] | str | None] = []
    decisions: list[Decision] = []
    for size, axis, rule in zip(shape, axes, rules.rules_of(array, tuple(axes)), strict=True):
        over = tuple((a, mesh[a]) for a in rule.mesh_axes if mesh.get(a, 1) > 1)
        names = tuple(a for a, _ in over)
        unit = units.get(axis or "", 1)
        multiple = math.prod(n for _, n in over) * unit
        stored = size
        if over and size % multiple:
            if rule.indivisible == "error":
                ways = f"{axis}=:pad or {axis}=:replicate" if axis in rules.paddable else f"{axis}=:replicate"
                raise UserError(
                    f"{array}: axis {axis!r} of size {size} does not divide over {_over(over, unit)}: "
                    f"change the mesh, or the {rules.name} rule with {ways}"
                )
            if rule.indivisible == "pad":
                stored = -(-size // multiple) * multiple
            else:
                names = ()
            decisions.append(Decision(array, str(axis), size, over, unit, rule.indivisible, stored))
        sizes.append(stored)
        spec.append(names if len(names) > 1 else names[0] if names else None)
    return _Placed(tuple(sizes), PartitionSpec(*spec), decisions)


def _over(mesh_axes: Sequence[tuple[str, int]], unit: int) -> str:
    axes = ",".join(f"{a}={n}" for a, n in mesh_axes)
    return axes if unit == 1 else f"{axes} in units of {unit}"


# ------------------------------------------------------------------------------------- constraints inside traced code


@dataclasses.dataclass(frozen=True)
class ShardingContext:
    """What ``constrain`` goes by: the mesh and the rules for activations."""

    mesh: Mesh
    rules: Rules


_context: ContextVar[ShardingContext | None] = ContextVar("sharding_context", default=None)


def current() -> ShardingContext | None:
    """The innermost active context, or None."""
    return _context.get()


@contextlib.contextmanager
def sharding_context(mesh: Mesh, rules: Rules = ACTIVATIONS) -> Iterator[ShardingContext]:
    """Make ``constrain`` put activations where ``rules`` say on ``mesh``.

    Enter it inside the traced function: a compile cache does not see the context, so a function traced under one
    context and called under another would keep the first one's constraints.
    """
    if padded := [axis for axis, rule in rules.items() if rule.indivisible == "pad"]:
        raise UserError(f"{rules.name} rules pad {padded[0]!r}: activations cannot be padded, use error or replicate")
    token = _context.set(ShardingContext(mesh, rules))
    try:
        yield ShardingContext(mesh, rules)
    finally:
        _context.reset(token)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """``x``, laid out as the active context's rules say for dimensions named ``axes``; traceable.

    None keeps a dimension whole. The identity where there is no context. Inside ``shard_map`` the manual mesh axes
    are left out, as ``x`` is already a piece along them.
    Raises UserError for an axis name without a rule, two dimensions on one mesh axis, and a dimension that does
    not divide under ``error``; ValueError unless there is one name a dimension.
    """
    return x if current() is None else lay_out(x, spec_of(x.shape, axes))


def lay_out(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """``x`` laid out over the active context's mesh without its manual axes, which ``spec`` may not name; traceable."""
    context, manual = current(), manual_axes()
    assert context is not None, "lay_out needs a sharding_context"
    if context.mesh.size == math.prod(context.mesh.shape[axis] for axis in manual):
        return x
    mesh = jax.sharding.get_abstract_mesh() if manual else context.mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(x: jax.Array, used: PartitionSpec, summed: PartitionSpec, whole: bool) -> jax.Array:
    """``x`` laid out as it is used, by one spec, and its gradient as it is summed, by another; traceable.

    whole: the gradient is laid out as ``used`` first. Where tokens are split over several mesh axes in several ways,
    the compiler would else gather and scatter over one and bring the pieces to another by collective-permute.
    """
    return lay_out(x, used)


def _gathered_forward(x: jax.Array, used: PartitionSpec, *_: Any) -> tuple[jax.Array, None]:
    return lay_out(x, used), None


def _gathered_backward(
    used: PartitionSpec, summed: PartitionSpec, whole: bool, _: None, g: jax.Array
) -> tuple[jax.Array]:
    return (lay_out(lay_out(g, used) if whole else g, summed),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def platform() -> str:
    """What the code being traced will run on, for choices between forms: ``cpu``, ``gpu`` or ``tpu``.

    The platform of the active context's mesh, which need not be of this machine (ahead-of-time compilation); else JAX's
    default.
    """
    context = current()
    name = jax.default_backend() if context is None else context.mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def spec_of(shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """How the active context's rules split an activation of this shape; raises what ``constrain`` does."""
    context = current()
    assert context is not None, "spec_of needs a sharding_context"
    free = {axis: n for axis, n in context.mesh.shape.items() if axis not in manual_axes()}
    return _place(f"activation {tuple(shape)}", shape, axes, free, context.rules, {}).spec


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Mesh axes that a spec names, in order."""
    return tuple(name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry))


def without(spec: PartitionSpec, axes: Iterable[str]) -> PartitionSpec:
    """A spec that splits nothing over some mesh axes."""
    dropped = set(axes)
    kept = (tuple(name for name in axes_of(PartitionSpec(entry)) if name not in dropped) for entry in spec)
    return PartitionSpec(*(names or None for names in kept))


def manual_axes() -> frozenset[str]:
    """Mesh axes of the ``shard_map`` that is being traced."""
    traced = jax.sharding.get_abstract_mesh()
    return frozenset() if traced.empty else frozenset(traced.manual_axes)


# ------------------------------------------------------------------------------------------- arrays in their sharding


def create(
    plan: Plan,
    init: Callable[..., Mapping[str, jax.Array]],
    compile: Callable[..., Callable[..., dict[str, jax.Array]]],
    *args: Any,
) -> dict[str, jax.Array]:
    """The state ``init(*args)``, computed directly in its sharding: never whole on one device.

    init: traceable; returns every stored array by key, in its dtype, without padding and with the parts of a stack in
    order (zeros are appended and rows put in their places here).
    compile: called as ``compile(fn, out_shardings=...)``, returns the compiled ``fn``, as ``jax.jit`` does.
    args: passed through, so that a seed is data and not a constant of the program.
    """

    def create_state(*args: Any) -> dict[str, jax.Array]:
        arrays = init(*args)
        if arrays.keys() != plan.layout.keys():
            raise ValueError(f"init and layout differ in {sorted(arrays.keys() ^ plan.layout.keys())}")
        return {key: _padded(arrays[key], stored) for key, stored in plan.layout.items()}

    return compile(create_state, out_shardings=plan.shardings)(*args)


def _padded(x: jax.Array, stored: Stored) -> jax.Array:
    shape = _unpadded(stored)
    given = (len(stored.parts), *shape[1:]) if stored.stacked else shape
    if (x.shape, x.dtype) != (given, stored.dtype):
        raise ValueError(f"{stored.key}: init made {x.dtype}{x.shape}, the layout says {stored.dtype}{given}")
    if stored.rows is not None:
        x = jnp.zeros(shape, x.dtype).at[np.array(stored.rows)].set(x)
    return jnp.pad(x, [(0, n - m) for m, n in zip(shape, stored.shape, strict=True)]) if x.shape != stored.shape else x


def restored(arrays: Mapping[str, jax.Array], before: Layout, after: Layout) -> dict[str, jax.Array]:
    """The same logical arrays in another layout: stacked or listed, in other rows, padded otherwise; traceable.

    arrays: by key of ``before``, in any dtype.
    """
    logical: dict[str, jax.Array] = {}
    for key, stored in before.items():
        for n, part in enumerate(stored.parts):
            row = arrays[key][n if stored.rows is None else stored.rows[n]] if stored.stacked else arrays[key]
            logical[part.name] = row[part.box] if row.shape != part.shape else row

    def one(stored: Stored) -> jax.Array:
        inner = stored.shape[1:] if stored.stacked else stored.shape
        padded = [
            jnp.pad(logical[part.name], [(0, n - m) for m, n in zip(part.shape, inner, strict=True)])
            for part in stored.parts
        ]
        if not stored.stacked:
            return padded[0]
        if stored.rows is None:
            return jnp.stack(padded)
        return jnp.zeros(stored.shape, padded[0].dtype).at[np.array(stored.rows)].set(jnp.stack(padded))

    return {key: one(stored) for key, stored in after.items()}


def put(plan: Plan, reader: Callable[[Logical, tuple[slice, ...]], np.ndarray]) -> dict[str, jax.Array]:
    """Every stored array, built on its devices from host data; padding is zero.

    reader: ``reader(logical, box)`` returns that box of the logical array, in ``logical.dtype``. It is asked only for
    what this process's devices hold, once for each distinct shard, one shard at a time.
    """
    return {key: _put(stored, plan.shardings[key], reader) for key, stored in plan.layout.items()}


def _put(stored: Stored, sharding: NamedSharding, reader: Callable[..., np.ndarray]) -> jax.Array:
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(stored.shape).items():
        devices.setdefault(_bounds(index or (), stored.shape), []).append(device)
    shards = []
    for bounds, holders in devices.items():
        # A fresh piece each time: a CPU device may keep the host memory it is given as its own.
        piece = np.zeros([hi - lo for lo, hi in bounds], stored.dtype)
        for region in stored.regions(tuple(slice(lo, hi) for lo, hi in bounds)):
            box = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
            data = reader(region.logical, box)
            if data.shape != region.size or data.dtype != region.logical.dtype:
                expected = f"{region.logical.dtype}{region.size}"
                raise ValueError(
                    f"{region.logical.name}: the reader gave {data.dtype}{data.shape}, expected {expected}"
                )
            piece[region.within] = data
        shards += [jax.device_put(piece, SingleDeviceSharding(d, memory_kind=sharding.memory_kind)) for d in holders]
    return jax.make_array_from_single_device_arrays(stored.shape, sharding, shards)


def to_host(layout: Layout, arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Every logical array by name, whole, without padding: the inverse of ``put``.

    Raises ValueError for an array of which this process has only a part.
    """
    out = {name: np.empty(logical.shape, logical.dtype) for name, logical in layout.logical.items()}
    for key, stored in layout.items():
        array = arrays[key]
        if array.shape != stored.shape:
            raise ValueError(f"{key}: shape {array.shape}, the layout says {stored.shape}")
        if not array.is_fully_addressable:
            raise ValueError(f"{key}: other processes hold parts of it, which to_host cannot read")
        shards = {_bounds(shard.index, stored.shape): shard for shard in array.addressable_shards}
        for shard in shards.values():
            data = np.asarray(shard.data)
            for region in stored.regions(shard.index):
                box = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
                out[region.logical.name][box] = data[region.within]
    return out


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """``Shard.index`` as (start, stop) pairs, which can be compared (slices cannot be hashed before Python 3.12)."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
