"""The step on its devices: the graphs of its two forms compiled, a batch placed, one step launched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graph, Graphs
from jaxsys.train.config import TrainConfig
from jaxsys.train.step import Arrays, Step, groups
from parallelism import Plan, Rules, placement
from parallelism.errors import UserError

BATCH_ARRAYS = ("tokens", "targets", "segments", "positions")


class Launcher:
    """Places batches by the activation rules; ``prepare`` first, then ``launch``.

    programs: the graphs of a step, once prepared, and how often each runs in it.

    Raises UserError for a microbatch that does not divide over the mesh.
    """

    def __init__(self, config: TrainConfig, functions: Step, plan: Plan, graphs: Graphs, rules: Rules):
        self._config, self._functions, self._plan, self._graphs = config, functions, plan, graphs
        self._rows = config.data.batch_size // config.accumulate
        axes = rules["batch"].mesh_axes
        shards = math.prod(plan.mesh.shape[axis] for axis in axes)
        if self._rows % shards:
            raise UserError(
                f"a microbatch of {self._rows} rows (data.batch_size / accumulate) does not divide over the {shards} "
                f"shards of mesh axes {'*'.join(axes)}: make data.batch_size a multiple of {shards * config.accumulate}"
            )
        self._whole = NamedSharding(plan.mesh, PartitionSpec(None, axes))
        self._micro = NamedSharding(plan.mesh, PartitionSpec(axes))
        self.programs: list[tuple[Graph, int]] = []

    @property
    def microbatch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What a graph of one microbatch [B, T] is compiled for."""
        return self._abstract(self._rows, self._config.data.seq_len, sharding=self._micro)

    @property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A whole batch [A, B, T], as the fused step takes it."""
        c = self._config
        return self._abstract(c.accumulate, self._rows, c.data.seq_len, sharding=self._whole)

    def place_microbatch(self, host: dict[str, np.ndarray]) -> Arrays:
        return {k: jax.device_put(host[k], self._micro) for k in BATCH_ARRAYS}

    def place(self, host: dict[str, np.ndarray]) -> Any:
        """The batch on its devices: one array [A, B, T] a name, or for the split step a list of A microbatches."""
        A = self._config.accumulate
        whole = {k: host[k].reshape(A, -1, host[k].shape[-1]) for k in BATCH_ARRAYS}
        if self._config.step_form == "fused":
            return {k: jax.device_put(v, self._whole) for k, v in whole.items()}
        return [self.place_microbatch({k: v[i] for k, v in whole.items()}) for i in range(A)]

    def prepare(self, params: Any, state: Any) -> None:
        """Compiles every graph of the step, for arrays like these.

        Raises UserError where the programs do not move what the configuration offloads.
        """
        c, step = self._config, np.int32(0)
        if c.step_form == "split":
            self._compile_split(params, state, step)
            return
        out = (*_shardings((params, state)), None)
        self._fused = self._graphs.compile(
            "train_step", self._functions.fused, params, state, step, self.batch, donate=(0, 1), out_shardings=out
        )
        self.programs = [(self._fused, 1)]
        self._check_offload([(self._fused, (params, state))])

    def _compile_split(self, params: Any, state: Any, step: Any) -> None:
        f, graphs = self._functions, self._graphs
        scalar = NamedSharding(self._plan.mesh, PartitionSpec())
        sums = (self._plan.shardings, {"loss": scalar, "targets": scalar})
        self._grads = graphs.compile("grads", f.grads, params, self.microbatch, out_shardings=sums)
        acc = self._grads.outputs
        if self._config.accumulate > 1:
            self._accumulate = graphs.compile(
                "accumulate", f.accumulate, acc, params, self.microbatch, donate=(0,), out_shardings=sums
            )
        self._finish = graphs.compile("finish", f.finish, acc, step, out_shardings=(scalar, None))
        sizes = {key: stored.nbytes for key, stored in self._plan.layout.items()}
        self._groups = groups(list(self._plan.layout), sizes, self._config.update_groups)
        scale, _ = self._finish.outputs

        # What all groups share is no group's to donate.
        def update(params: Any, own: Any, shared: Any, grads: Any, scale: Any, step: Any) -> Any:
            return f.update(params, {**own, **shared}, grads, scale, step)

        self._updates: list[Graph] = []
        programs: list[tuple[Graph, Any]] = [(self._grads, params)]
        for i, keys in enumerate(self._groups):
            group, own, shared = self._group(params, state, keys)
            grads = {k: acc[0][k] for k in keys}
            out = _shardings((group, {**own, **shared}))
            self._updates.append(
                graphs.compile(
                    f"update[{i}]", update, group, own, shared, grads, scale, step, donate=(0, 1), out_shardings=out
                )
            )
            programs.append((self._updates[i], (group, own)))
        more = self._config.accumulate - 1
        again = [(self._accumulate, more)] if more else []
        self.programs = [(self._grads, 1), *again, (self._finish, 1), *((graph, 1) for graph in self._updates)]
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
        copied: Callable[[Iterable[str] | None], float],
        publish: Callable[[Arrays], Any],
    ) -> tuple[Arrays, Arrays, Arrays, float]:
        """One step on the dispatcher's thread: new parameters, optimizer state, metrics, and seconds waited.

        copied: waits until a snapshot has copied these keys (None: all), before they are donated; returns seconds.
        publish: called with the new parameters in the piece of work that donates the old.
        """
        number = np.int32(step)
        if self._config.step_form == "fused":
            waited = copied(None)

            def work() -> tuple[Arrays, Arrays, Arrays]:
                new = self._fused(params, state, number, batches)
                publish(new[0])
                return new

            return *dispatcher().call(work), waited
        sums = self._grads(params, batches[0])
        for more in batches[1:]:
            sums = self._accumulate(sums, params, more)
        scale, metrics = self._finish(sums, number)

        def update() -> tuple[Arrays, Arrays, Arrays, float]:
            # One piece of work: a lease taken between two groups would hold donated arrays.
            waited, new_params, new_state = 0.0, dict(params), dict(state)
            for keys, graph in zip(self._groups, self._updates, strict=True):
                group, own, shared = self._group(params, state, keys)
                waited += copied([*group, *own])
                new, opt = graph(group, own, shared, {k: sums[0][k] for k in keys}, scale, number)
                new_params, new_state = {**new_params, **new}, {**new_state, **opt}
            publish(new_params)
            return new_params, new_state, metrics, waited

        return dispatcher().call(update)

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
    return jax.tree.map(lambda array: array.sharding, tree)
