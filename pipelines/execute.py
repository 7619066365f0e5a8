"""Runs any table: the loss and its gradients, in one program over the mesh axis ``stage``.

One scan over ticks inside a ``shard_map`` over ``stage``; the other axes are the compiler's. At a tick a stage does
what the table gives it, each action a branch that is skipped where there is none, and what was made is sent on by
permutations at the tick's end. The gradient is written, not derived through the scan: a layer's passes come from
``pipelines.split``, and what they leave for later lies in buffers as deep as the table needs (``pipelines.buffers``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from parallelism.errors import UserError
from parallelism.hlo import Program
from pipelines.buffers import Buffers, Slots, allocate
from pipelines.schedule import NONE, B, F, Placement, Table, W
from pipelines.split import passes

Tree = Any
AXIS = "stage"


class Layered(Protocol):
    """A model of layers that are alike. shared: parameters of what is before and after them, which may be one and the
    same. batch: one microbatch. Each is traced once."""

    def embed(self, shared: Tree, batch: Tree) -> jax.Array:
        """What the first layer gets."""

    def context(self, batch: Tree) -> Tree:
        """What every layer may see of a microbatch: arrays, none of which depends on parameters."""

    def layer(self, params: Tree, x: jax.Array, context: Tree, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Layer ``index`` of ``x``: what the next gets, like x, and a loss of its own, a scalar."""

    def head(self, shared: Tree, x: jax.Array, batch: Tree) -> jax.Array:
        """The loss of a microbatch, a scalar; those of all microbatches and layers add up."""


def cut(layers: int, placement: Placement) -> list[range]:
    """The layers of each virtual stage: as even as can be, the first ones having one more.

    Raises UserError for fewer layers than virtual stages.
    """
    count = placement.count
    if layers < count:
        raise UserError(
            f"{layers} layers in {placement.stages} stages of {placement.chunks}: expected at least {count} layers, "
            f"one for each"
        )
    each, more = divmod(layers, count)
    ends = [each * (n + 1) + min(n + 1, more) for n in range(count)]
    return [range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def stack(params: list[Tree], placement: Placement) -> Tree:
    """Layers' parameters as the executor takes them: leaves [stages, chunks, layers of a chunk, ...], zeros where a
    chunk has fewer."""
    pieces = cut(len(params), placement)
    most = max(map(len, pieces))
    empty = jax.tree.map(jnp.zeros_like, params[0])

    def chunk(stage: int, chunk: int) -> Tree:
        mine = [params[i] for i in pieces[placement.number(stage, chunk)]]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine, *[empty] * (most - len(mine)))

    stages = [[chunk(s, c) for c in range(placement.chunks)] for s in range(placement.stages)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(jax.tree.map(lambda *x: jnp.stack(x), *s) for s in stages))


def unstack(stacked: Tree, layers: int, placement: Placement) -> list[Tree]:
    """The other way: a list of layers."""
    places = [
        (placement.stage(number), number // placement.stages, i)
        for number, piece in enumerate(cut(layers, placement))
        for i in range(len(piece))
    ]
    return [jax.tree.map(lambda a, place=place: a[place], stacked) for place in places]


def value_and_grad(
    model: Layered,
    table: Table,
    layers: int,
    mesh: Mesh,
    *,
    remat: Callable[[Callable], Callable] | None = None,
    recompute: bool = False,
) -> Callable[[Tree, Tree, Tree], tuple]:
    """``(shared, stacked layers, batches [microbatches, ...]) -> (loss, (gradients of shared, of layers))``; traceable.

    Gradients are in at least float32. remat: wraps a layer's function, ``jax.checkpoint`` with a policy, so that a
    layer keeps less for its backward pass. recompute: a microbatch keeps the input of a stage's chunk and nothing else;
    its backward pass begins with another forward one.
    Raises UserError for a mesh whose axis ``stage`` is not the table's, and to recompute under a table that has W
    apart, where both B and W would have to.
    """
    table.check()
    if recompute and table.split:
        raise UserError(
            f"schedule {table.name!r}: recompute with B and W apart would compute the forward pass three times: take a "
            "schedule that has them together, or remat, which keeps less of each layer"
        )
    if mesh.shape.get(AXIS) != table.placement.stages:
        raise UserError(
            f"mesh axis stage={mesh.shape.get(AXIS)}: expected the {table.placement.stages} stages of the schedule "
            f"{table.name!r}"
        )
    run = _Run(model, table, allocate(table), layers, remat or (lambda layer: layer), recompute)
    split, whole = PartitionSpec(AXIS), PartitionSpec()

    def call(shared: Tree, stacked: Tree, batches: Tree) -> tuple:
        inside = jax.shard_map(
            run, mesh=mesh, in_specs=(whole, split, whole), out_specs=(whole, (whole, split)), axis_names={AXIS},
            check_vma=False,
        )  # fmt: skip
        return inside(shared, stacked, batches)

    return call


@dataclasses.dataclass(frozen=True)
class _Run:
    model: Layered
    table: Table
    buffers: Buffers
    layers: int
    remat: Callable[[Callable], Callable]
    recompute: bool

    def __call__(self, shared: Tree, stacked: Tree, batches: Tree) -> tuple:
        """On one stage."""
        table, buffers, model = self.table, self.buffers, self.model
        placement = table.placement
        stage = lax.axis_index(AXIS)
        mine = jax.tree.map(lambda a: a[0], stacked)  # [chunks, layers, ...]
        pieces = cut(self.layers, placement)
        most = max(map(len, pieces))
        numbers = np.array([placement.numbers(s) for s in range(placement.stages)], np.int32)
        firsts = np.array([[pieces[n].start for n in row] for row in numbers], np.int32)
        counts = np.array([[len(pieces[n]) for n in row] for row in numbers], np.int32)
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

        def layer(params: Tree, x: jax.Array, context: Tree) -> tuple[jax.Array, jax.Array]:
            return model.layer(params, x, context[0], context[1])

        split = passes(self.remat(layer), one, x, (context, jax.ShapeDtypeStruct((), np.int32)), split=table.split)

        def empty(shape: tuple[int, ...], like: Any) -> jax.Array:
            """NaN: what is read before it was written shows."""
            fill = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
            return jnp.full((*shape, *like.shape), fill, like.dtype)

        wide = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), (shared, mine))
        depth = max(buffers.made.depth, 1)
        state = {
            "inputs": empty((buffers.inputs.depth + 1,), x),
            "gradients": empty((buffers.gradients.depth + 1,), x),
            "kept": [empty((depth,), x)] if self.recompute else [empty((depth, most), each) for each in split.kept],
            "saved": [empty((buffers.cotangents.depth, most), each) for each in split.saved] if table.split else [],
            "shared": wide[0],
            "layers": wide[1],
            "loss": jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32)),
        }

        def over_layers(
            chunk: jax.Array, body: Callable[[Any, jax.Array, jax.Array], Any], carry: Any, back: bool
        ) -> Any:
            """Body of the layers of a chunk that there are: (carry, place in the chunk, number of the layer)."""
            count, first = count_of[chunk], first_of[chunk]

            def turn(i: jax.Array, carry: Any) -> Any:
                place = count - 1 - i if back else i
                return body(carry, place, first + place)

            return lax.fori_loop(0, count, turn, carry)

        def params_of(chunk: jax.Array, place: jax.Array) -> Tree:
            return jax.tree.map(lambda a: _one_of(a, chunk, place), mine)

        def kept_of(kept: list[jax.Array], slot: jax.Array, place: jax.Array) -> list[jax.Array]:
            return [_one_of(a, slot, place) for a in kept]

        def add(total: Tree, chunk: jax.Array, place: jax.Array, gradients: Tree) -> Tree:
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

        def forward(state: dict, row: dict) -> tuple[dict, jax.Array]:
            m, chunk = row["microbatch"][F], row["chunk"][F]
            batch, number = at(batches, m), number_of[chunk]
            context = model.context(batch)
            begin = lax.cond(
                number == 0,
                lambda: model.embed(shared, batch),
                lambda: at(state["inputs"], row["inputs"]),
            )

            def one(carry: Any, place: jax.Array, index: jax.Array) -> Any:
                x, loss, kept = carry
                y, aux, new = split.forward(params_of(chunk, place), x, (context, index))
                kept = kept if self.recompute else put(kept, new, row["made"], place)
                return y, loss + aux.astype(loss.dtype), kept

            kept = put(state["kept"], [begin], row["made"]) if self.recompute else state["kept"]
            y, loss, kept = over_layers(chunk, one, (begin, state["loss"], kept), False)

            def head() -> tuple:
                value, (d_shared, dy) = jax.value_and_grad(model.head, (0, 1))(shared, y, batch)
                total = jax.tree.map(lambda a, g: a + g.astype(a.dtype), state["shared"], d_shared)
                return total, loss + value.astype(loss.dtype), put(state["gradients"], dy, row["heads"])

            total, loss, gradients = lax.cond(number == last, head, lambda: (state["shared"], loss, state["gradients"]))
            return state | {"kept": kept, "loss": loss, "shared": total, "gradients": gradients}, y

        def backward(state: dict, row: dict) -> tuple[dict, jax.Array]:
            m, chunk = row["microbatch"][B], row["chunk"][B]
            batch, number = at(batches, m), number_of[chunk]
            context = model.context(batch)
            dy = at(state["gradients"], row["gradients"])
            here, slot = state["kept"], row["used"]
            if self.recompute:

                def again(carry: Any, place: jax.Array, index: jax.Array) -> Any:
                    x, kept = carry
                    y, _, new = split.forward(params_of(chunk, place), x, (context, index))
                    return y, put(kept, new, jnp.int32(0), place)

                room = [empty((1, most), each) for each in split.kept]
                _, here = over_layers(chunk, again, (_one_of(here[0], slot), room), False)
                slot = jnp.int32(0)

            def one(carry: Any, place: jax.Array, index: jax.Array) -> Any:
                dy, total, saved = carry
                kept, params = kept_of(here, slot, place), params_of(chunk, place)
                dx, small, new = split.backward(params, (context, index), kept, dy, jnp.ones((), aux_dtype))
                if not table.split:
                    return dx, add(total, chunk, place, small), saved
                return dx, add(total, chunk, place, merged(small, None)), put(saved, new, row["cotangents"], place)

            dx, total, saved = over_layers(chunk, one, (dy, state["layers"], state["saved"]), True)

            def first() -> Tree:
                (d_shared,) = jax.vjp(lambda shared: model.embed(shared, batch), shared)[1](dx)
                return jax.tree.map(lambda a, g: a + g.astype(a.dtype), state["shared"], d_shared)

            shared_total = lax.cond(number == 0, first, lambda: state["shared"])
            return state | {"layers": total, "saved": saved, "shared": shared_total}, dx

        def weights(state: dict, row: dict) -> dict:
            m, chunk = row["microbatch"][W], row["chunk"][W]
            context = model.context(at(batches, m))

            def one(total: Tree, place: jax.Array, index: jax.Array) -> Tree:
                kept = kept_of(state["kept"], row["weight_residuals"], place)
                saved = kept_of(state["saved"], row["weight_cotangents"], place)
                found = split.weights(params_of(chunk, place), (context, index), kept, saved)
                none = [None] * sum(split.small)
                return add(total, chunk, place, merged(none, found))

            return state | {"layers": over_layers(chunk, one, state["layers"], False)}

        aux_dtype = jax.eval_shape(layer, one, x, (context, jax.ShapeDtypeStruct((), np.int32)))[1].dtype
        nothing = empty((), x)

        def tick(state: dict, rows: dict) -> tuple[dict, None]:
            row = jax.tree.map(lambda a: a[stage], rows)
            does = row["microbatch"] != NONE
            state, y = lax.cond(does[F], lambda s: forward(s, row), lambda s: (s, nothing), state)
            state, dx = lax.cond(does[B], lambda s: backward(s, row), lambda s: (s, nothing), state)
            if table.split:
                state = lax.cond(does[W], lambda s: weights(s, row), lambda s: s, state)
            for name, what, sent in (("inputs", y, row["forward"]), ("gradients", dx, row["backward"])):
                channels = buffers.forward if name == "inputs" else buffers.backward
                trash = (buffers.inputs if name == "inputs" else buffers.gradients).depth
                for channel, slot in zip(channels, sent, strict=True):
                    come = _sent(what, channel.shift, placement.stages)
                    state[name] = put(state[name], come, jnp.where(slot == NONE, trash, slot))
            return state, None

        state, _ = lax.scan(tick, state, self._rows())
        loss = lax.psum(state["loss"], AXIS)
        d_shared = jax.tree.map(lambda g: lax.psum(g, AXIS), state["shared"])
        return loss, (d_shared, jax.tree.map(lambda g: g[None], state["layers"]))

    def _rows(self) -> dict[str, Any]:
        """The table and its slots, [ticks, stages, ...]."""
        table, b = self.table, self.buffers

        def slot(slots: Slots) -> jax.Array:
            return jnp.asarray(slots.slot)

        return {
            "microbatch": jnp.asarray(table.microbatch), "chunk": jnp.asarray(table.chunk),
            "inputs": slot(b.inputs), "gradients": slot(b.gradients), "heads": jnp.asarray(b.heads),
            "made": slot(b.made), "used": slot(b.used),
            "cotangents": slot(b.cotangents), "weight_residuals": slot(b.weight_residuals),
            "weight_cotangents": slot(b.weight_cotangents),
            "forward": [jnp.asarray(each.arrives) for each in b.forward],
            "backward": [jnp.asarray(each.arrives) for each in b.backward],
        }  # fmt: skip


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
    return lax.ppermute(x, AXIS, [(i, (i + shift) % stages) for i in range(stages)])
