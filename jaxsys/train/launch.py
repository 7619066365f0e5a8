"""The step on its devices: the graphs of its two forms compiled, a batch placed, one step launched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graph, Graphs
from jaxsys.live import Live
from jaxsys.train.config import TrainConfig
from jaxsys.train.step import Arrays, Step, groups
from parallelism import Plan, Rules, balance, placement, sequence
from parallelism.errors import UserError

BATCH_ARRAYS = ("tokens", "targets", "segments", "positions")


class Launcher:
    """Places batches by the activation rules; ``prepare`` first, then ``launch``.

    programs: the graphs of a step, once prepared, and how often each runs in it; of the step that sends
    most where there are several.

    Raises UserError for a microbatch that does not divide over the mesh, or cannot be arranged on it.
    """

    def __init__(self, config: TrainConfig, functions: Step, plan: Plan, graphs: Graphs, rules: Rules):
        self._config, self._functions, self._plan, self._graphs = config, functions, plan, graphs
        self._rows = config.data.batch_size // config.accumulate
        grid = batch_grid(config, plan.mesh, rules)
        self._room = grid.room
        # What is launched, by the size of the split region, and the rows and tokens of its microbatches.
        self._steps: dict[int | None, Step] = {None: functions}
        self._shape = (self._rows, config.data.seq_len)
        if config.data.split_shares:
            sizes = balance.split_sizes(config.data.split_shares, grid)
            self._steps = {size: dataclasses.replace(functions, split=size) for size in sizes}
            self._shape = (grid.groups // config.accumulate, grid.pieces * grid.room)
        self._largest = max(self._steps, key=lambda size: size or 0)
        axes = rules["batch"].mesh_axes
        self._whole = NamedSharding(plan.mesh, PartitionSpec(None, axes))
        self._micro = NamedSharding(plan.mesh, PartitionSpec(axes))
        self.programs: list[tuple[Graph, int]] = []
        self._groups: list[list[str]] = []  # of the split step

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A whole batch [A, B, T], as the fused step takes it."""
        return self._abstract(self._config.accumulate, *self._shape, sharding=self._whole)

    @property
    def split(self) -> tuple[int, int] | None:
        """The size of the split region in ``programs``, and the tokens of a device that it is of; None without."""
        return None if self._largest is None else (self._largest, self._room)

    @property
    def rows(self) -> list[slice]:
        """The rows of a batch that this process's devices hold, as runs in order."""
        each = self._shape[0]
        rows = [i * each + row for i in range(self._config.accumulate) for row in self._held(each)]
        ends = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
        return [slice(rows[a], rows[b - 1] + 1) for a, b in zip([0, *ends], [*ends, len(rows)], strict=True)]

    @property
    def share(self) -> float:
        """How much of a batch this process's devices hold."""
        return len(self._held(self._shape[0])) / self._shape[0]

    def _held(self, rows: int) -> list[int]:
        """The rows of a microbatch of so many that this process's devices hold."""
        boxes = self._micro.addressable_devices_indices_map((rows, 1)).values()
        return sorted({row for box in boxes if box for row in range(*box[0].indices(rows))})

    def place(self, host: dict[str, np.ndarray]) -> Any:
        """The batch on its devices, for ``launch``: the size of its split region, None where it has none, and one array
        [A, B, T] a name, or for the split step a list of A microbatches. host: the rows ``rows`` of it."""
        A, split, rows = self._config.accumulate, int(host["split"]) if "split" in host else None, self._shape[0]
        whole = {k: host[k].reshape(A, -1, host[k].shape[-1]) for k in BATCH_ARRAYS}
        if self._config.step_form == "fused":
            return split, {k: self._put(v, rows, self._whole) for k, v in whole.items()}
        return split, [{k: self._put(v[i], rows, self._micro) for k, v in whole.items()} for i in range(A)]

    def _put(self, held: np.ndarray, rows: int, sharding: NamedSharding) -> jax.Array:
        """[..., rows, T] on its devices, from the rows that this process holds."""
        mine = self._held(rows)

        def part(box: tuple[slice, ...] | None) -> np.ndarray:
            assert box is not None
            low, high, _ = box[-2].indices(rows)
            at = mine.index(low)
            return held[(*box[:-2], slice(at, at + high - low), box[-1])]

        return jax.make_array_from_callback((*held.shape[:-2], rows, held.shape[-1]), sharding, part)

    def prepare(self, params: Any, state: Any, keeping: bool = False) -> None:
        """Compiles every graph of the step, for arrays like these. keeping: also one that does not donate parameters.

        Raises UserError where the programs do not move what the configuration offloads.
        """
        c, step, self._keeping = self._config, np.int32(0), keeping
        if c.step_form == "split":
            self._compile_split(params, state, step)
            return
        trained, frozen = self._parted(params)
        out = (*_shardings((trained, state)), None)
        self._fused = {
            (split, kept): self._graphs.compile(
                _named("train_step", split, kept), f.fused, trained, state, step, self.batch, frozen,
                donate=(1,) if kept else (0, 1), out_shardings=out,
            )
            for split, f in self._steps.items()
            for kept in self._variants
        }  # fmt: skip
        self.programs = [(self._fused[self._largest, False], 1)]
        self._check_offload((graph, (params, state)) for graph in self._fused.values())
        for graph in self._fused.values():
            self._functions.check(graph)

    @property
    def _variants(self) -> tuple[bool, ...]:
        """Whether parameters are kept, of the programs that can donate them."""
        return (False, True) if self._keeping else (False,)

    def _compile_split(self, params: Any, state: Any, step: Any) -> None:
        f, graphs = self._functions, self._graphs
        scalar = NamedSharding(self._plan.mesh, PartitionSpec())
        gradients = {key: f.shardings.gradients[key] for key in f.optimizer.layout}
        sums, batch = (gradients, scalar), self._abstract(*self._shape, sharding=self._micro)

        def compile(name: str, *before: Any, after: tuple = (), **options: Any) -> dict[int | None, Graph]:
            """A function of the step, one graph a size of the split region."""
            return {
                split: graphs.compile(
                    _named(name, split), getattr(each, name), *before, params, batch, *after, **options
                )
                for split, each in self._steps.items()
            }

        whole: tuple[Any, ...] = ()
        if self._counted:
            self._count = compile("counts", out_shardings=scalar)
            whole = (self._count[self._largest].outputs,)
            self._count_more = compile("count_more", *whole, donate=(0,), out_shardings=scalar)
        self._grads = compile("grads", after=whole, out_shardings=sums)
        acc = self._grads[self._largest].outputs
        if self._config.accumulate > 1:
            self._accumulate = compile("accumulate", acc, after=whole, donate=(0,), out_shardings=sums)
        self._finish = graphs.compile("finish", f.finish, acc, step, out_shardings=(scalar, None))
        sizes = {key: stored.nbytes for key, stored in f.optimizer.layout.items()}
        self._groups = groups(list(sizes), sizes, self._config.update_groups)
        scale, _ = self._finish.outputs

        # What all groups share is no group's to donate.
        def update(params: Any, own: Any, shared: Any, grads: Any, scale: Any, step: Any) -> Any:
            return f.update(params, {**own, **shared}, grads, scale, step)

        self._updates: dict[tuple[int, bool], Graph] = {}
        programs: list[tuple[Graph, Any]] = [(self._grads[self._largest], params)]
        for i, keys in enumerate(self._groups):
            group, own, shared = self._group(params, state, keys)
            grads = {k: acc[0][k] for k in keys}
            out = _shardings((group, {**own, **shared}))
            for kept in self._variants:
                donate = (1,) if kept else (0, 1)
                self._updates[i, kept] = graphs.compile(
                    _named(f"update[{i}]", None, kept), update, group, own, shared, grads, scale, step, donate=donate,
                    out_shardings=out,
                )  # fmt: skip
                programs.append((self._updates[i, kept], (group, own)))
        more, once = self._config.accumulate - 1, [self._grads, *([self._count] if whole else [])]
        again = [self._accumulate, *([self._count_more] if whole else [])] if more else []
        self.programs = [
            *((graphs[self._largest], 1) for graphs in once),
            *((graphs[self._largest], more) for graphs in again),
            (self._finish, 1),
            *((graph, 1) for (_, kept), graph in self._updates.items() if not kept),
        ]
        self._check_offload(programs)

    def _check_offload(self, programs: Iterable[tuple[Graph, Any]]) -> None:
        """Each program with its arguments."""
        placement.check(
            self._functions.offload,
            [
                placement.Program(
                    graph.name, graph.moves, placement.host_bytes(arguments),
                    graph.stats.host_argument_bytes, graph.stats.host_temporary_bytes,
                )
                for graph, arguments in programs
            ],
        )  # fmt: skip

    def launch(
        self,
        params: Arrays,
        state: Arrays,
        batches: Any,
        step: int,
        copied: Callable[[Iterable[str], Callable[[], bool]], float],
        live: Live,
        pause: Callable[[Any], None] = lambda arrays: None,
    ) -> tuple[Arrays, Arrays, Arrays, float]:
        """One step on the dispatcher's thread: new parameters, optimizer state, metrics, and seconds held up.

        copied: waits until a snapshot has copied these keys, before they are donated; returns the seconds of that in
        which devices were not busy, as its other argument says.
        live: where the new parameters are published, in the piece of work that donates the last of the old.
        pause: called after each piece of the step with what it made; other work may come in between.
        """
        number = np.int32(step)
        split, arrays = batches
        if self._config.step_form == "fused":
            trained, frozen = self._parted(params)
            waited = copied([*trained, *state], lambda: False)

            def work() -> tuple[Arrays, Arrays, Arrays]:
                new, opt, metrics = self._fused[split, live.held](trained, state, number, arrays, frozen)
                new = {**params, **new}
                live.publish(new)
                return new, opt, metrics

            new = dispatcher().call(work)
            pause(new[2])
            return *new, waited
        counts = self._counts(params, split, arrays)
        sums = self._grads[split](params, arrays[0], *counts)
        for more in arrays[1:]:
            pause(sums[1])
            sums = self._accumulate[split](sums, params, more, *counts)
        scale, metrics = self._finish(sums, number)
        pause(metrics)
        waited, new_params, new_state = 0.0, dict(params), dict(state)

        def update(i: int, held: bool) -> Arrays:
            nonlocal waited
            keys = self._groups[i]
            group, own, shared = self._group(params, state, keys)
            waited += copied([*group, *own], lambda: not scale.is_ready())
            new, opt = self._updates[i, held](group, own, shared, {k: sums[0][k] for k in keys}, scale, number)
            new_params.update(new)
            new_state.update(opt)
            return opt

        def begin() -> tuple[bool, bool]:
            held, whole = live.begin_update()
            if not whole:  # in one piece of work: a lease taken between two groups would hold donated arrays
                for i in range(len(self._groups)):
                    update(i, held)
                live.publish(new_params)
            return held, whole

        held, whole = dispatcher().call(begin)
        if whole:
            for i in range(len(self._groups)):
                pause(update(i, held))
            live.publish(new_params)
        else:
            pause(new_params)
        return new_params, new_state, metrics, waited

    def overwritten(self, params: Arrays, state: Arrays) -> Arrays:
        """All arrays in the order in which the updates of a step overwrite them: so a snapshot is to take them."""
        owned = self._functions.optimizer.owned
        first = [key for keys in self._groups for key in (*keys, *owned(keys))]
        whole = {**params, **state}
        return {key: whole[key] for key in dict.fromkeys([*first, *whole])}

    @property
    def _counted(self) -> bool:
        """Whether all microbatches are counted before the gradients of the first."""
        return self._config.accumulate > 1 and self._functions.auxiliary

    def _counts(self, params: Arrays, split: int | None, batches: list[Arrays]) -> tuple[Arrays, ...]:
        """The counts of the whole batch, where gradients need them."""
        if not self._counted:
            return ()
        counts = self._count[split](params, batches[0])
        for more in batches[1:]:
            counts = self._count_more[split](counts, params, more)
        return (counts,)

    def _parted(self, params: Arrays) -> tuple[Arrays, Arrays]:
        """The parameters that are trained, and the others."""
        trained = self._functions.optimizer.layout
        return {k: params[k] for k in trained}, {k: x for k, x in params.items() if k not in trained}

    def _group(self, params: Arrays, state: Arrays, keys: list[str]) -> tuple[Arrays, Arrays, Arrays]:
        """A group's parameters, its own optimizer state, and the state that it shares."""
        optimizer = self._functions.optimizer
        return (
            {k: params[k] for k in keys},
            {k: state[k] for k in optimizer.owned(keys)},
            {k: state[k] for k in optimizer.shared},
        )

    @staticmethod
    def _abstract(*shape: int, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in BATCH_ARRAYS}


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda array: placement.of_result(array.sharding), tree)


def _named(graph: str, split: int | None, kept: bool = False) -> str:
    return graph + ("" if split is None else f"[split={split}]") + ("[kept]" if kept else "")


def batch_grid(config: TrainConfig, mesh: Mesh, rules: Rules) -> balance.Grid:
    """The devices that a global batch's tokens lie on; a group counts anew for each microbatch.

    Raises UserError for rows that do not divide over them, and for ``data.split_shares`` that change nothing.
    """
    data, rows = config.data, config.data.batch_size // config.accumulate
    axes, pieces = rules["batch"].mesh_axes, mesh.shape[sequence.AXIS]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if rows % shards:
        raise UserError(
            f"a microbatch of {rows} rows (data.batch_size / accumulate) does not divide over the {shards} "
            f"shards of mesh axes {'*'.join(axes)}: make data.batch_size a multiple of {shards * config.accumulate}"
        )
    if data.split_shares and pieces == 1:
        raise UserError(
            f"data.split_shares {data.split_shares} on mesh {config.mesh!r}: {sequence.AXIS}=1 splits no document: "
            f"leave it empty, or give the mesh {sequence.AXIS} above 1"
        )
    return balance.Grid(shards * config.accumulate, pieces, rows // shards * data.seq_len // pieces)
