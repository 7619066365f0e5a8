"""Experts over the mesh axis ``expert``: tokens go to the devices that own their experts, and the results come back.

Each device lays the rows of its tokens out by expert and exchanges them with the owners (all-to-all), which put what
they received in the order of their own experts; then the same way back (Lepikhin et al. 2021, GShard; Gale et al. 2023,
MegaBlocks, for the mode without a capacity).

Dropless, a device may send all that it has to one owner. Where the platform has a ragged all-to-all only the rows that
there are travel; CPU has none, and there slots for the worst case do. With a capacity the slots are those of the
capacity, and what does not fit is dropped. Each row of a batch has its own capacity, and its earlier tokens come first:
what is dropped depends neither on the mesh nor on the microbatches, and no later token changes an earlier one.

Rows are moved by gathers only, in the gradient too: a scatter of rows is slow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from parallelism import sequence
from parallelism.errors import UserError
from parallelism.manual import on_devices, scattered_sum
from parallelism.sharding import axes_of, current, platform, spec_of

EXPERTS, WIDTH = "act_experts", "act_expert_embed"
"""Logical axes of a kernel: its experts, and the dimension that is read whole and whose gradient is scattered. Others
stay split."""

Axes = tuple[str, ...]
Compute = Callable[[jax.Array, jax.Array | None, dict[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Routes:
    """Where tokens go.

    expert: [B, T, k] int32, each token's experts, all different. weight: [B, T, k], what their results are multiplied
    by. used: [B, T] bool, False for tokens that go nowhere (padding).
    """

    expert: jax.Array
    weight: jax.Array
    used: jax.Array


def apply(
    compute: Compute,
    x: jax.Array,
    routes: Routes,
    kernels: Mapping[str, jax.Array],
    axes: Mapping[str, Axes],
    *,
    capacity_factor: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the experts' results for each token [B, T, D], in x's dtype, and how many of the (token,
    expert) pairs were dropped, a float scalar. Traceable; differentiable in x, ``routes.weight`` and the kernels.

    compute: (rows, sizes, kernels) to rows, on one device and for its experts: rows [R, D] sorted by expert, sizes
      [experts] int32 of them each, zeros after the last; with a capacity rows [experts, C, D], sizes None. It may
      return one device's part of a sum where its kernels are split.
    x: [B, T, D]; its tokens are split as the active ``sharding_context`` says, if there is one.
    kernels: [E, ...] each. axes: the logical axes (of activations) of each, EXPERTS first.
    capacity_factor: an expert takes so many times its even share of a row's tokens, rounded up; None takes all.
    Raises UserError for rules that split experts or kernels over mesh axes where that cannot be.
    """
    context = current()
    work = partial(
        _on_device,
        compute=compute,
        axes=axes,
        capacity_factor=capacity_factor,
        number=next(iter(kernels.values())).shape[0],
    )
    arguments = (x, routes.expert, routes.weight, routes.used)
    if context is None or context.mesh.size == 1:
        return work(*arguments, dict(kernels), dict(kernels), split=_Split())
    tokens = spec_of(x.shape, ("batch", "residual", "act_embed"))
    ordered = (n := context.mesh.shape[sequence.AXIS]) == 1 or sequence.AXIS in axes_of(PartitionSpec(tokens[1]))
    if capacity_factor is not None and not ordered:
        raise UserError(
            f"experts with a capacity on {sequence.AXIS}={n}: rows of {x.shape[1]} tokens are not split over it "
            f"between blocks (activation rule residual={context.rules['residual']}), so which come first is lost: make "
            "the length divide, or leave capacity_factor out"
        )
    specs = {name: spec_of(kernel.shape, axes[name]) for name, kernel in kernels.items()}
    split = _split(dict(context.mesh.shape), tokens, specs, axes)
    each = PartitionSpec(*tokens[:2])
    whole = {
        name: PartitionSpec(*(None if axis == WIDTH else entry for axis, entry in zip(axes[name], spec, strict=True)))
        for name, spec in specs.items()
    }
    run = on_devices(partial(work, split=split), (tokens, each, each, each, whole, specs), (tokens, PartitionSpec()))
    # Kernels are read with their WIDTH whole, which gathers those that are split and costs nothing where parameters are
    # whole (ZeRO-1 and 2). Their gradients leave scattered all the same, through pieces of which nothing else is read,
    # summed over devices in the dtype that crosses the border: at least float32.
    read = {name: lax.stop_gradient(kernel) for name, kernel in kernels.items()}
    return run(*arguments, read, {name: kernel.astype(_wide(kernel.dtype)) for name, kernel in kernels.items()})


@dataclasses.dataclass(frozen=True)
class _Split:
    """How the work is split; the defaults are of one device.

    rows: the mesh axes that split rows of the batch. within: those that split a row's tokens, which are gathered first.
    pieces: how many devices of ``context`` a row stays split over.
    owners: the mesh axes that split experts. senders: how many devices exchange tokens; 1 where all owners have the
    same tokens, of which each does its experts' part of the sum.
    width: the mesh axes that split each kernel's WIDTH. summed: those over which results are parts of a sum.
    """

    rows: Axes = ()
    within: Axes = ()
    pieces: int = 1
    owners: Axes = ()
    senders: int = 1
    width: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    summed: Axes = ()


def _split(
    mesh: Mapping[str, int], tokens: PartitionSpec, specs: Mapping[str, PartitionSpec], axes: Mapping[str, Axes]
) -> _Split:
    rows, row = axes_of(PartitionSpec(tokens[0])), axes_of(PartitionSpec(tokens[1]))
    within = tuple(axis for axis in row if axis != sequence.AXIS)
    width: dict[str, Axes] = {}
    summed: set[str] = set()
    owners: Axes = ()
    for name, spec in specs.items():
        over = {axis: axes_of(PartitionSpec(entry)) for axis, entry in zip(axes[name], spec, strict=True)}
        owners, width[name] = over.pop(EXPERTS), over.pop(WIDTH, ())
        summed.update(*over.values())
    exchange = bool(owners) and set(owners) <= set(rows)
    if wrong := (summed & {*rows, sequence.AXIS}) or (set() if exchange else set(owners) & {*rows, *row}):
        said = ["+".join(names) or "none" for names in (rows, row, owners, sorted(summed))]
        raise UserError(
            f"activation rules: mesh axis {sorted(wrong)[0]!r} splits tokens (rows over {said[0]}, within a row over "
            f"{said[1]}) and experts' kernels (experts over {said[2]}, else over {said[3]}): let {EXPERTS} go over "
            "axes of batch, act_mlp over others"
        )
    senders = math.prod(mesh[axis] for axis in owners) if exchange else 1
    parts = (*sorted(summed), *(() if exchange else owners))
    return _Split(rows, within, mesh[sequence.AXIS] if sequence.AXIS in row else 1, owners, senders, width, parts)


def _on_device(x, expert, weight, used, kernels, pieces, *, compute, axes, capacity_factor, number, split: _Split):
    """One device's tokens [b, t], after those that it shares with others are gathered.

    pieces: the parts of the kernels that this device gets the gradients of.
    """
    if split.within:
        x, expert, weight, used = (
            lax.all_gather(a, split.within, axis=1, tiled=True) for a in (x, expert, weight, used)
        )
    for name, over in split.width.items():
        dimension = axes[name].index(WIDTH) if over else 0
        kernels = {**kernels, name: _whole(pieces[name], kernels[name], over, dimension)}
    (b, t, D), k, n = x.shape, expert.shape[-1], split.senders
    own = next(iter(kernels.values())).shape[0]
    if split.owners and n == 1:
        expert = expert - own * lax.axis_index(split.owners)
    # [b, t, experts within reach], 1 where a token wants an expert, then where it gets it.
    wanted = (expert[..., None] == jnp.arange(n * own, dtype=expert.dtype)).any(2) & used[..., None]
    kept = wanted = wanted.astype(jnp.int32)
    if capacity_factor is None:
        room, slots = None, b * t * min(k, own)
    else:
        # No expert is wanted more often than by every token of a row.
        share = min(math.ceil(capacity_factor * t * split.pieces * k / number), t * split.pieces)
        kept = wanted * ((sequence.earlier(wanted) if split.pieces > 1 else _before(wanted, 1)) < share)
        room = b * min(t, share)
        slots = own * room
    moves = _moves(kept.reshape(b * t, n * own), expert.reshape(b * t, k), slots, room, split)

    rows = moves.to_owners(_take(x.reshape(b * t, D), moves.source // k, moves.place))
    if room is not None:
        rows = jnp.moveaxis(rows.reshape(n, own, room, D), 0, 1).reshape(own, n * room, D)
        rows = compute(rows, None, kernels)
        rows = jnp.moveaxis(rows.reshape(own, n, room, D), 0, 1).reshape(n * slots, D)
    elif n == 1:
        rows = compute(rows, moves.counts, kernels)
    else:
        order, back, sizes = _by_expert(moves.received, slots)
        rows = compute(_take(rows, order, back[:, None]), sizes, kernels)
        rows = _take(rows, back, order[:, None])
    rows = moves.to_senders(rows)
    found = _take(rows, moves.place.reshape(-1), moves.source[:, None]).reshape(b, t, k, D)
    y = (found.astype(_wide(x.dtype)) * weight[..., None]).sum(2).astype(x.dtype)

    dropped = (wanted - kept).sum().astype(_wide(x.dtype))
    over = (*split.rows, *((sequence.AXIS,) if split.pieces > 1 else ()), *(split.owners if n == 1 else ()))
    return _left(y, split), lax.psum(dropped, over) if over else dropped


def _left(y, split: _Split):
    """The sum over devices of y [b, t, D], each with its own part of the tokens where they were gathered."""
    if rest := tuple(axis for axis in split.summed if axis not in split.within):
        y = lax.psum(y, rest)
    for axis in split.within:
        if axis in split.summed:
            y = scattered_sum(y, axis, 1)
        else:
            mine = y.shape[1] // lax.axis_size(axis)
            y = lax.dynamic_slice_in_dim(y, lax.axis_index(axis) * mine, mine, 1)
    return y


# ------------------------------------------------------------------------------------------------------------- moves


@dataclasses.dataclass(frozen=True)
class _Moves:
    """How the rows of one device's tokens travel. N tokens, k experts each, Z rows that are sent.

    source: [Z] int32, token * k + choice of each row that is sent, N * k where there is none.
    place: [N, k] int32, the row that each pair is sent as, Z where it is not.
    counts: [experts] int32, rows for each; received: [senders, own experts] int32, rows from each sender.
    ragged: what each sends and receives, where only rows that there are travel.
    """

    source: jax.Array
    place: jax.Array
    counts: jax.Array
    received: jax.Array
    ragged: tuple[jax.Array, ...] | None
    slots: int
    split: _Split

    def to_owners(self, rows):
        """[Z, D] to [senders * slots, D], what sender s sent at s * slots; zeros where there is nothing."""
        if self.split.senders == 1:
            return rows
        if self.ragged is None:
            return lax.all_to_all(rows, self.split.owners, 0, 0, tiled=True)
        return _ragged(rows.shape[0], self.split.senders * self.slots, self.split.owners, rows, self.ragged)

    def to_senders(self, rows):
        """The inverse of ``to_owners``."""
        if self.split.senders == 1:
            return rows
        if self.ragged is None:
            return lax.all_to_all(rows, self.split.owners, 0, 0, tiled=True)
        returned = _reversed(self.ragged, self.split.owners)
        return _ragged(rows.shape[0], self.source.shape[0], self.split.owners, rows, returned)


def _moves(kept, expert, slots: int, room: int | None, split: _Split) -> _Moves:
    """kept: [N, E] int32, 1 where a token goes to an expert; expert: [N, k], some of them out of range.

    slots: rows that one owner gets from one sender at most. room: those of one expert, where each has its own.
    """
    (N, k), E, n = expert.shape, kept.shape[1], split.senders
    counts = kept.sum(0)
    by_owner = counts.reshape(n, -1)
    ragged = room is None and n > 1 and platform() != "cpu"
    if room is not None:
        start = room * jnp.arange(E, dtype=jnp.int32)
    elif ragged:
        start = _before(counts)
    else:
        start = (_before(by_owner, 1) + slots * jnp.arange(n, dtype=jnp.int32)[:, None]).reshape(-1)
    sent = N * min(k, E) if ragged else n * slots
    near = jnp.clip(expert, 0, E - 1)
    goes = (jnp.take_along_axis(kept, near, 1) > 0) & (near == expert)
    place = jnp.where(goes, jnp.take_along_axis(start + _before(kept), near, 1), sent)
    pairs = jnp.arange(N * k, dtype=jnp.int32)
    source = jnp.full((sent,), N * k, jnp.int32).at[place.reshape(-1)].set(pairs, mode="drop")
    received = by_owner if n == 1 else lax.all_to_all(by_owner, split.owners, 0, 0, tiled=True)
    sizes = None
    if ragged:
        there = jnp.full((n,), slots, jnp.int32) * lax.axis_index(split.owners).astype(jnp.int32)
        sizes = (start.reshape(n, -1)[:, 0], by_owner.sum(1), there, received.sum(1))
    return _Moves(source, place, counts, received, sizes, slots, split)


def _by_expert(received, slots: int):
    """received: [n, own] int32, how many rows of each of this device's experts each sender sent, in that order, from
    row s * slots on.

    Returns, for the rows sorted by expert, where each lies among those received (n * slots: nowhere); the inverse; and
    how many rows each expert has.
    """
    n, own = received.shape
    total = n * slots
    lengths = received.T.reshape(-1)  # runs of rows in the new order: by expert, then by sender
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    here = (_before(received, 1) + slots * jnp.arange(n, dtype=jnp.int32)[:, None]).T.reshape(-1)
    row = jnp.arange(total, dtype=jnp.int32)
    run = jnp.minimum(jnp.searchsorted(ends, row, side="right"), n * own - 1)
    order = jnp.where(row < ends[-1], here[run] + row - (ends - lengths)[run], total)
    back = jnp.full((total,), total, jnp.int32).at[order].set(row, mode="drop")
    return order, back, received.sum(0)


def _before(counts, axis: int = 0):
    """The sum of what comes before, along an axis."""
    return jnp.cumsum(counts, axis, dtype=counts.dtype) - counts


@jax.custom_vjp
def _take(x, index, back):
    """Rows ``index`` of x, zeros where that is out of range. back: [rows of x, m], where each row of x went."""
    return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x, index, back):
    return _take(x, index, back), back


def _take_backward(back, g):
    if back.shape[1] == 1:
        return g.at[back[:, 0]].get(mode="fill", fill_value=0), None, None
    each = g.at[back].get(mode="fill", fill_value=0)
    return each.astype(_wide(g.dtype)).sum(1).astype(g.dtype), None, None


_take.defvjp(_take_forward, _take_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ragged(before: int, after: int, axes: Axes, rows, sizes):
    """Rows [before, D] exchanged over mesh axes to [after, D], zeros where nothing comes; as ragged_all_to_all."""
    out = jnp.zeros((after, rows.shape[1]), rows.dtype)
    return lax.ragged_all_to_all(rows, out, *sizes, axis_name=axes if len(axes) > 1 else axes[0])


def _ragged_forward(before, after, axes, rows, sizes):
    return _ragged(before, after, axes, rows, sizes), sizes


def _ragged_backward(before, after, axes, sizes, g):
    return _ragged(after, before, axes, g, _reversed(sizes, axes)), None


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _reversed(sizes, axes: Axes):
    """The exchange that undoes this one."""
    starts, send, there, receive = sizes
    starts, there = (lax.all_to_all(a, axes, 0, 0, tiled=True) for a in (starts, there))
    return there, receive, starts, send


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _whole(piece, kernel, axes: Axes, dimension: int):
    """The kernel; its gradient is the piece's, scattered over mesh axes and summed in the piece's dtype."""
    return kernel


def _whole_forward(piece, kernel, axes, dimension):
    return kernel, None


def _whole_backward(axes, dimension, _, g):
    g = g.astype(_wide(g.dtype))
    return (scattered_sum(g, axes, dimension) if axes else g), None


_whole.defvjp(_whole_forward, _whole_backward)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
