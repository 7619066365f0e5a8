"""Runs any table: the loss and its gradients, in one program over the mesh axis ``stage``.

One scan over ticks inside a ``shard_map`` over ``stage``; the other axes are the compiler's. At a tick a stage does
what the table gives it, each action a branch that is skipped where there is none, and what was made is sent on by
permutations at the tick's end. The gradient is written, not derived through the scan: a layer's passes come from
``pipelines.split``, and what they leave for later lies in buffers as deep as the table needs (``pipelines.buffers``).
What the table offloads goes to a buffer in host memory and comes back layer by layer, beside the layers of the action
that the stage does in that tick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from parallelism.errors import UserError
from parallelism.hlo import Program
from parallelism.mesh import STAGE
from parallelism.streaming import to_device, to_host
from pipelines.buffers import Buffers, allocate
from pipelines.pieces import Pieces
from pipelines.schedule import NONE, B, F, O, R, Table, W
from pipelines.split import passes

Tree = Any
LANES = 128
OUT, BACK = 1, 2  # what moves beside an action, as bits


class Layered(Protocol):
    """A model of layers that are alike. shared: parameters of what is before and after them, which may be one and the
    same. batch: one microbatch. Each is traced once."""

    def place(self, x: jax.Array) -> jax.Array:
        """x as it lies between layers over the mesh's other axes (``with_sharding_constraint``), or as it is."""

    def embed(self, shared: Tree, batch: Tree) -> jax.Array:
        """What the first layer gets."""

    def context(self, batch: Tree) -> Tree:
        """What every layer may see of a microbatch: arrays, none of which depends on parameters."""

    def layer(self, params: Tree, x: jax.Array, context: Tree, index: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
        """Layer ``index`` of ``x``: what the next gets, like x; a loss of its own, a scalar; and what it tells of
        itself, a tree of arrays without a gradient (None: nothing), which is summed over microbatches, floats in at
        least float32."""

    def head(self, shared: Tree, x: jax.Array, batch: Tree) -> jax.Array:
        """The loss of a microbatch, a scalar; those of all microbatches and layers add up."""


def value_and_grad(
    model: Layered,
    table: Table,
    pieces: Pieces,
    mesh: Mesh,
    *,
    remat: Callable[[Callable], Callable] | None = None,
    recompute: bool = False,
) -> Callable[[Tree, Tree, Tree], tuple]:
    """``(shared, stacked layers, batches [microbatches, ...]) -> ((loss, told), (gradients of shared, of layers))``;
    traceable.

    pieces: how layers are dealt out, and stacked. told: what they tell, stacked as they are. Gradients are in at least
    float32. remat: wraps a layer's function, ``jax.checkpoint`` with a policy, so that a layer keeps less for its
    backward pass. recompute: a microbatch keeps the input of a stage's chunk and nothing else; its backward pass begins
    with another forward one.
    Raises UserError for a mesh or pieces of another number of stages than the table's, for batches of another number of
    microbatches and stacks of other pieces, and to recompute under a table that has W apart, where both B and W would
    have to.
    """
    _check(table, pieces, mesh)
    if recompute and table.split:
        raise UserError(
            f"schedule {table.name!r}: recompute with B and W apart would compute the forward pass three times: take a "
            "schedule that has them together, or remat, which keeps less of each layer"
        )
    run = _Run(model, table, allocate(table), pieces, remat or (lambda layer: layer), recompute)
    split, whole = PartitionSpec(STAGE), PartitionSpec()
    return _sized(run, mesh, ((whole, split), (whole, split)))


def tell(model: Layered, table: Table, pieces: Pieces, mesh: Mesh) -> Callable[[Tree, Tree, Tree], Tree]:
    """``(shared, stacked layers, batches [microbatches, ...])`` to what layers tell, stacked as they are, by the
    table's forwards alone; traceable. Raises UserError as ``value_and_grad`` does."""
    _check(table, pieces, mesh)
    forwards = table.forwards
    run = _Run(model, forwards, allocate(forwards), pieces, lambda layer: layer, False)
    return _sized(run, mesh, PartitionSpec(STAGE))


def _check(table: Table, pieces: Pieces, mesh: Mesh) -> None:
    table.check()
    if pieces.placement != table.placement:
        raise UserError(f"layers dealt out for {pieces.placement}, expected {table.placement} of {table.name!r}")
    if mesh.shape.get(STAGE) != table.placement.stages:
        raise UserError(
            f"mesh axis stage={mesh.shape.get(STAGE)}: expected the {table.placement.stages} stages of the schedule "
            f"{table.name!r}"
        )


def _sized(run: _Run, mesh: Mesh, out_specs: Any) -> Callable[[Tree, Tree, Tree], Any]:
    """``run`` on every stage, of arguments whose sizes are the table's: others would be read beyond their ends."""
    table, pieces = run.table, run.pieces
    whole = PartitionSpec()
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(whole, PartitionSpec(STAGE), whole), out_specs=out_specs, axis_names={STAGE},
        check_vma=False,
    )  # fmt: skip

    def sized(shared: Tree, stacked: Tree, batches: Tree) -> Any:
        grid = table.placement.stages, table.placement.chunks, pieces.most
        for what, tree, expected, meaning in (
            ("the batches", batches, (table.microbatches,), "one a microbatch of the schedule"),
            ("the stacked layers", stacked, grid, "stages, chunks and rows of Pieces.stack"),
        ):
            for path, a in jax.tree_util.tree_leaves_with_path(tree):
                if a.shape[: len(expected)] != expected:
                    raise UserError(
                        f"{what}{jax.tree_util.keystr(path)}: shape {list(a.shape)}, expected "
                        f"{', '.join(map(str, expected))} first: {meaning} {table.name!r}"
                    )
        return mapped(shared, stacked, batches)

    return sized


@dataclasses.dataclass(frozen=True)
class _Run:
    model: Layered
    table: Table
    buffers: Buffers
    pieces: Pieces
    remat: Callable[[Callable], Callable]
    recompute: bool

    def __call__(self, shared: Tree, stacked: Tree, batches: Tree) -> Any:
        """On one stage. Of a table without backwards: what layers tell, and nothing else."""
        table, buffers, model = self.table, self.buffers, self.model
        placement, most = table.placement, self.pieces.most
        stage = lax.axis_index(STAGE)
        mine = jax.tree.map(lambda a: a[0], stacked)  # [chunks, layers, ...]
        numbers = np.array([placement.numbers(s) for s in range(placement.stages)], np.int32)
        firsts, counts = (np.array(each, np.int32)[numbers] for each in (self.pieces.firsts, self.pieces.counts))
        number_of, first_of, count_of = (jnp.asarray(a)[stage] for a in (numbers, firsts, counts))
        last = placement.count - 1

        def at(tree: Tree, index: jax.Array) -> Tree:
            return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tree)

        def put(tree: Tree, value: Tree, *index: jax.Array) -> Tree:
            def one(a: jax.Array, v: jax.Array) -> jax.Array:
                return lax.dynamic_update_slice(
                    a, v.reshape((1,) * len(index) + v.shape).astype(a.dtype), _from(a, index)
                )

            return jax.tree.map(one, tree, value)

        one_batch = at(batches, jnp.int32(0))
        x = jax.eval_shape(model.embed, shared, one_batch)
        context = jax.eval_shape(model.context, one_batch)
        one = jax.eval_shape(lambda t: jax.tree.map(lambda a: a[0, 0], t), mine)

        def layer(params: Tree, x: jax.Array, context: Tree) -> tuple[jax.Array, jax.Array, Tree]:
            return model.layer(params, x, context[0], context[1])

        arguments = one, x, (context, jax.ShapeDtypeStruct((), np.int32))
        aux, told = _told(jax.eval_shape(layer, *arguments), x)
        split = passes(self.remat(layer), *arguments, split=table.split)

        def empty(shape: tuple[int, ...], like: Any) -> jax.Array:
            """NaN: what is read before it was written shows."""
            fill = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
            return jnp.full((*shape, *like.shape), fill, like.dtype)

        wide = jax.tree.map(
            lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)),
            (shared, mine) if table.learns else ((), ()),
        )
        parts = 1 if self.recompute else most
        like = ([x] if self.recompute else map(_dense, split.kept)) if table.learns else []
        kept = [empty((buffers.made.depth, parts), each) for each in like]
        state = {
            "inputs": empty((buffers.inputs.depth + 1,), x),
            "gradients": empty((buffers.gradients.depth + 1,), x),
            "kept": kept,
            "host": [_in_host((buffers.host_away.depth + 1) * parts, k) for k in kept] if table.offloads else [],
            "saved": [empty((buffers.cotangents.depth, most), _dense(each)) for each in split.saved]
            if table.split
            else [],
            "shared": wide[0],
            "layers": wide[1],
            "loss": jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32)),
            "told": jax.tree.map(lambda a: jnp.zeros((placement.chunks, most, *a.shape), _wide(a.dtype)), told),
        }

        def leave(kept: list, host: list, row: dict, place: jax.Array, slot: jax.Array) -> list:
            """A piece of what goes to the host; slot: of the host."""
            return [
                put(h, to_host(_one_of(k, row["away"], place)), slot * parts + place)
                for k, h in zip(kept, host, strict=True)
            ]

        def come(host: list, row: dict, place: jax.Array) -> list:
            """A piece of what comes back."""
            return [to_device(_one_of(h, row["host_back"] * parts + place)) for h in host]

        def exchange(kept: list, host: list, row: dict, moves: int, begin: Any, end: Any) -> tuple[list, list]:
            """Pieces of what leaves and what comes, with nothing beside them. In this order: the other way round the
            compiler copies the whole buffer in host memory."""

            def turn(place: jax.Array, carry: Any) -> Any:
                kept, host = carry
                host = leave(kept, host, row, place, row["host_away"]) if moves & OUT else host
                back = come(host, row, place) if moves & BACK else []
                return put(kept, back, row["back"], place) if moves & BACK else kept, host

            if not moves:
                return kept, host
            return lax.fori_loop(jnp.int32(begin), jnp.int32(end), turn, (kept, host))

        def over_layers(
            chunk: jax.Array,
            body: Callable[[Any, list, jax.Array, jax.Array], tuple[Any, list]],
            carry: Any,
            state: dict,
            row: dict,
            moves: int,
            reverse: bool,
        ) -> tuple[Any, dict]:
            """Body of the layers of a chunk that there are: (carry, kept, place in the chunk, number of the layer) ->
            (carry, kept). Beside each a piece of what moves: where it is what this action makes (lag) that of the
            layer before, where it is what this action needs (lead) that of the next."""
            count, first, step = count_of[chunk], first_of[chunk], -1 if reverse else 1

            def place_of(i: Any) -> Any:
                return count - 1 - i if reverse else i

            def turn(i: jax.Array, carry: Any) -> Any:
                carry, kept, host = carry
                place = place_of(i)
                if moves & OUT:
                    leaves = jnp.clip(place - step * row["lag"], 0, count - 1)
                    early = (i == 0) & (row["lag"] > 0)
                    host = leave(kept, host, row, leaves, jnp.where(early, buffers.host_away.depth, row["host_away"]))
                if moves & BACK:
                    comes = jnp.clip(place + step * row["lead"], 0, count - 1)
                    back = come(host, row, comes)
                carry, kept = body(carry, kept, place, first + place)
                return carry, put(kept, back, row["back"], comes) if moves & BACK else kept, host

            kept, host = state["kept"], state["host"]
            if self.recompute or not moves:
                carry, kept = lax.fori_loop(
                    0, count, lambda i, c: body(c[0], c[1], place_of(i), first + place_of(i)), (carry, kept)
                )
            else:
                begin = place_of(0)
                kept, host = exchange(kept, host, row, moves & BACK, begin, begin + row["lead"])
                carry, kept, host = lax.fori_loop(0, count, turn, (carry, kept, host))
                end = place_of(count - 1)
                kept, host = exchange(kept, host, row, moves & OUT, end, end + row["lag"])
                kept, host = exchange(kept, host, row, moves, count, parts)
            return carry, state | {"kept": kept, "host": host}

        def params_of(chunk: jax.Array, place: jax.Array) -> Tree:
            return jax.tree.map(lambda a: _one_of(a, chunk, place), mine)

        def laid(a: jax.Array) -> jax.Array:
            """In the order that host memory has: the compiler would turn whole buffers between two actions."""
            a = a.reshape(_dense(a).shape)
            return with_layout_constraint(a, Layout(tuple(range(a.ndim)))) if table.offloads else a

        def read(buffers: list, like: tuple, slot: jax.Array, place: jax.Array) -> list[jax.Array]:
            return [laid(_one_of(a, slot, place)).reshape(k.shape) for a, k in zip(buffers, like, strict=True)]

        def add(total: Tree, chunk: jax.Array, place: jax.Array, gradients: list[Any]) -> Tree:
            """What each layer has, with more of one; gradients: a list of leaves, None for nothing."""

            def one(a: jax.Array, g: jax.Array | None) -> jax.Array:
                if g is None:
                    return a
                new = _one_of(a, chunk, place) + g.astype(a.dtype)
                return lax.dynamic_update_slice(a, new[None, None], _from(a, (chunk, place)))

            leaves, tree = jax.tree.flatten(total)
            return jax.tree.unflatten(tree, [one(a, g) for a, g in zip(leaves, gradients, strict=True)])

        def merged(small: list[Any], others: list[Any] | None) -> list[Any]:
            """Gradients of all leaves, None where they are not there."""
            a, b = iter(small), iter(others or [])
            return [next(a) if mine else (next(b) if others is not None else None) for mine in split.small]

        def forward(state: dict, row: dict, moves: int) -> tuple[dict, jax.Array]:
            m, chunk = row["microbatch"][F], row["chunk"][F]
            batch, number = at(batches, m), number_of[chunk]
            context = model.context(batch)
            # Branches that place what they give out otherwise do not compile.
            begin = lax.cond(
                number == 0,
                lambda: model.place(model.embed(shared, batch)),
                lambda: model.place(at(state["inputs"], row["inputs"])),
            )

            def one(carry: Any, kept: list, place: jax.Array, index: jax.Array) -> Any:
                x, loss, told = carry
                y, aux, more, new = split.forward(params_of(chunk, place), x, (context, index))
                if kept and not self.recompute:
                    kept = put(kept, [laid(a) for a in new], row["made"], place)
                return (y, loss + aux.astype(loss.dtype), add(told, chunk, place, jax.tree.leaves(more))), kept

            if self.recompute:
                state = whole(state | {"kept": put(state["kept"], [begin], row["made"], jnp.int32(0))}, row, moves)
            carry = begin, state["loss"], state["told"]
            (y, loss, told), state = over_layers(chunk, one, carry, state, row, moves, False)
            if not table.learns:
                return state | {"told": told}, y

            def head() -> tuple:
                value, (d_shared, dy) = jax.value_and_grad(model.head, (0, 1))(shared, y, batch)
                total = jax.tree.map(lambda a, g: a + g.astype(a.dtype), state["shared"], d_shared)
                return total, loss + value.astype(loss.dtype), put(state["gradients"], dy, row["heads"])

            total, loss, gradients = lax.cond(number == last, head, lambda: (state["shared"], loss, state["gradients"]))
            return state | {"loss": loss, "told": told, "shared": total, "gradients": gradients}, y

        def backward(state: dict, row: dict, moves: int) -> tuple[dict, jax.Array]:
            m, chunk = row["microbatch"][B], row["chunk"][B]
            batch, number = at(batches, m), number_of[chunk]
            context = model.context(batch)
            dy = at(state["gradients"], row["gradients"])
            if self.recompute:

                def again(carry: Any, kept: list, place: jax.Array, index: jax.Array) -> Any:
                    y, _, _, new = split.forward(params_of(chunk, place), carry[0], (context, index))
                    return (y, put(carry[1], new, place)), kept

                state = whole(state, row, moves)
                room = [empty((most,), each) for each in split.kept]
                begin = _one_of(state["kept"][0], row["used"], jnp.int32(0))
                (_, computed), state = over_layers(chunk, again, (begin, room), state, row, 0, False)

            def one(carry: Any, kept: list, place: jax.Array, index: jax.Array) -> Any:
                dy, total, saved = carry
                params = params_of(chunk, place)
                here = (
                    [_one_of(a, place) for a in computed]
                    if self.recompute
                    else read(kept, split.kept, row["used"], place)
                )
                dx, small, new = split.backward(params, (context, index), here, dy, jnp.ones((), aux.dtype))
                if not table.split:
                    return (dx, add(total, chunk, place, small), saved), kept
                saved = put(saved, [laid(a) for a in new], row["cotangents"], place)
                return (dx, add(total, chunk, place, merged(small, None)), saved), kept

            carry = dy, state["layers"], state["saved"]
            (dx, total, saved), state = over_layers(chunk, one, carry, state, row, moves, True)

            def first() -> Tree:
                (d_shared,) = jax.vjp(lambda shared: model.embed(shared, batch), shared)[1](dx)
                return jax.tree.map(lambda a, g: a + g.astype(a.dtype), state["shared"], d_shared)

            shared_total = lax.cond(number == 0, first, lambda: state["shared"])
            return state | {"layers": total, "saved": saved, "shared": shared_total}, dx

        def weights(state: dict, row: dict, moves: int) -> tuple[dict, jax.Array]:
            m, chunk = row["microbatch"][W], row["chunk"][W]
            context = model.context(at(batches, m))

            def one(total: Tree, kept: list, place: jax.Array, index: jax.Array) -> Any:
                here = read(kept, split.kept, row["weight_residuals"], place)
                saved = read(state["saved"], split.saved, row["weight_cotangents"], place)
                found = split.weights(params_of(chunk, place), (context, index), here, saved)
                none = [None] * sum(split.small)
                return add(total, chunk, place, merged(none, found)), kept

            total, state = over_layers(chunk, one, state["layers"], state, row, moves, False)
            return state | {"layers": total}, nothing

        def whole(state: dict, row: dict, moves: int) -> dict:
            kept, host = exchange(state["kept"], state["host"], row, moves, 0, parts)
            return state | {"kept": kept, "host": host}

        def alone(state: dict, row: dict, moves: int) -> tuple[dict, jax.Array]:
            return whole(state, row, moves), nothing

        nothing = empty((), x)

        options, rows = self._rows()

        def tick(state: dict, rows: dict) -> tuple[dict, None]:
            row = jax.tree.map(lambda a: a[stage], rows)
            made = [nothing] * len(options)
            for i, action in enumerate((forward, backward, weights, alone)):
                for n, moves in enumerate(options[i]):
                    # One after the other: of a conditional with more than two branches XLA copies the buffers.
                    state, made[i] = lax.cond(
                        row["branch"][i] == n + 1,
                        lambda s, out, action=action, moves=moves: action(s, row, moves),
                        lambda s, out: (s, out),
                        state,
                        made[i],
                    )
            y, dx, *_ = made
            for name, what, sent in (("inputs", y, row["forward"]), ("gradients", dx, row["backward"])):
                channels = buffers.forward if name == "inputs" else buffers.backward
                trash = (buffers.inputs if name == "inputs" else buffers.gradients).depth
                for channel, slot in zip(channels, sent, strict=True):
                    come = _sent(what, channel.shift, placement.stages)
                    state[name] = put(state[name], come, jnp.where(slot == NONE, trash, slot))
            return state, None

        state, _ = lax.scan(tick, state, rows)
        told, layers = (jax.tree.map(lambda a: a[None], state[name]) for name in ("told", "layers"))
        if not table.learns:
            return told
        loss, d_shared = jax.tree.map(lambda a: lax.psum(a, STAGE), (state["loss"], state["shared"]))
        return (loss, told), (d_shared, layers)

    def _rows(self) -> tuple[list[list[int]], dict[str, Any]]:
        """What may move beside each action (F, B, W, none), as bits; and the table and its slots, [ticks, stages, ...]:
        ``branch``, [4], is which of these an action is done with, from 1 on, and 0 if it is not done."""
        table, b = self.table, self.buffers
        m, chunk = table.microbatch, table.chunk
        does = m != NONE
        moves = OUT * does[..., O] + BACK * does[..., R]
        # The first action of a tick has the transfers beside it.
        before = np.cumsum(does[..., : W + 1], -1) - does[..., : W + 1]
        beside = np.where(does[..., : W + 1], np.where(before, 0, moves[..., None]), NONE)
        alone = np.where(does[..., : W + 1].any(-1) | (moves == 0), NONE, moves)
        beside = np.concatenate([beside, alone[..., None]], -1)
        options = [sorted(set(beside[..., i].ravel().tolist()) - {NONE}) for i in range(beside.shape[-1])]
        branch = [np.searchsorted([NONE, *each], beside[..., i]) for i, each in enumerate(options)]

        def same(kind: int, action: int) -> np.ndarray:
            """Whether what moves is of the microbatch and chunk of the action beside it."""
            of = does[..., kind] & does[..., action] & (m[..., kind] == m[..., action])
            return of & (chunk[..., kind] == chunk[..., action]) & (before[..., action] == 0)

        rows = {
            "microbatch": m, "chunk": chunk, "branch": np.stack(branch, -1), "lag": same(O, F), "lead": same(R, B),
            "inputs": b.inputs.slot, "gradients": b.gradients.slot, "heads": b.heads,
            "made": b.made.slot, "used": b.used.slot, "cotangents": b.cotangents.slot,
            "weight_residuals": b.weight_residuals.slot, "weight_cotangents": b.weight_cotangents.slot,
            "away": b.away.slot, "back": b.back.slot, "host_away": b.host_away.slot, "host_back": b.host_back.slot,
            "forward": [each.arrives for each in b.forward], "backward": [each.arrives for each in b.backward],
        }  # fmt: skip
        return options, jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), rows)


def refuse_unmoved(table: Table, host_bytes: int | None) -> None:
    """Raises UserError where a compiled program keeps in device memory what its table offloads.

    host_bytes: of its temporaries, what lies in host memory; None where the back end has but one memory (CPU).
    """
    if table.offloads and host_bytes == 0:
        moved = int((table.microbatch[..., O] != NONE).sum())
        raise UserError(
            f"schedule {table.name!r} brings {moved} residuals to host memory, and the compiled program has none "
            "there: this back end cannot do it, leave the offload out"
        )


def _dense(a: Any) -> jax.ShapeDtypeStruct:
    """Like an array, with no dimension of one and a last of at least ``LANES`` where it has as much: a TPU pads it to
    that. Dimensions are merged from the end, so what is split over a mesh axis stays so."""
    shape = [n for n in a.shape if n > 1]
    while len(shape) > 1 and shape[-1] < LANES:
        last = shape.pop()
        shape[-1] *= last
    return jax.ShapeDtypeStruct(tuple(shape) or (1,), a.dtype)


def _told(found: Any, x: Any) -> tuple[Any, Tree]:
    """What a layer gives beside what the next one gets. Raises UserError where it is no layer."""

    def said(a: Any) -> str:
        leaves = jax.tree.leaves(a)
        each = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
        return each[0] if len(each) == 1 and a is leaves[0] else f"{type(a).__name__} of {', '.join(each) or 'nothing'}"

    if not hasattr(x, "shape"):
        raise UserError(f"embed gives a {said(x)}, expected one array: what goes from stage to stage")
    if not isinstance(found, tuple) or len(found) != 3:
        raise UserError(f"layer gives a {said(found)}, expected what the next gets, a loss, what it tells")
    y, aux, told = found
    if not hasattr(y, "shape") or (y.shape, y.dtype) != (x.shape, x.dtype):
        raise UserError(f"layer gives {said(y)} for {said(x)}, expected alike: cast it, or give the first layer that")
    if getattr(aux, "shape", None) != ():
        raise UserError(f"a layer's loss is {said(aux)}, expected a scalar")
    return aux, told


def _wide(dtype: Any) -> Any:
    """For a sum over microbatches: in bfloat16 it would stop growing at 256."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _in_host(length: int, like: jax.Array) -> jax.Array:
    """A buffer in host memory for so many pieces of one on the device [slots, pieces, ...]: made there, as one of zeros
    would be made on the device first. NaN, so that what is read before it was written shows. With one dimension of
    pieces, as a transfer is cut out of one dimension only."""
    fill = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.broadcast_to(to_host(jnp.asarray(fill, like.dtype)), (length, *like.shape[2:]))


def refuse_permutations(text: str) -> None:
    """Raises UserError for a compiled program (its text) in which a branch holds a collective-permute.

    A stage takes a branch that others do not. Where it then sends within itself, over another mesh axis, devices of
    other stages never answer, and the program hangs.
    """
    program = Program(text)
    for _, instruction, _ in program.walk():
        if instruction.opcode != "conditional":
            continue
        for branch in program.branches(instruction):
            for _, inner, _ in program.walk(branch):
                if inner.opcode in ("collective-permute", "collective-permute-start"):
                    raise UserError(
                        f"a stage of the pipeline sends {inner.shape.split('{')[0]} by collective-permute over another "
                        "mesh axis, which hangs as other stages do not take part: use "
                        "all-gather or all-to-all inside stages, as the context methods all_gather and all_to_all do"
                    )


def _from(a: jax.Array, index: tuple[jax.Array, ...]) -> list[Any]:
    """Where what has this index in the first dimensions begins."""
    return [*index, *[np.int32(0)] * (a.ndim - len(index))]


def _one_of(a: jax.Array, *index: jax.Array) -> jax.Array:
    """What has this index in the first dimensions."""
    n = len(index)
    return lax.dynamic_slice(a, _from(a, index), (*(1,) * n, *a.shape[n:])).reshape(a.shape[n:])


def _sent(x: jax.Array, shift: int, stages: int) -> jax.Array:
    if shift == 0:
        return x
    return lax.ppermute(x, STAGE, [(i, (i + shift) % stages) for i in range(stages)])
