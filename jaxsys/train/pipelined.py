"""The train step over the mesh axis ``stage``: the model as the pipeline's executor takes it, and how it is stored.

The microbatches of a step are those of ``accumulate``. Parameters of layers are stacks, cut over the stages in the
order of the schedule's placement; logical names are the same as ever, so a checkpoint fits any number of stages.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxsys.graphs import Graph
from jaxsys.kernels.loss import cross_entropy
from jaxsys.kernels.matmul import activation_dtype
from jaxsys.models.decoder import of_layers
from jaxsys.models.rope import rotations
from jaxsys.models.state import Model
from jaxsys.train.config import PipelineConfig
from jaxsys.train.step import REMAT, Arrays, Batch, Step, Sums, lay
from parallelism.errors import UserError, unknown_name
from parallelism.layout import Layout, Stored
from parallelism.mesh import STAGE
from parallelism.sharding import axes_of, constrain, current, gathered, without
from pipelines.execute import Layered, refuse_permutations, refuse_unmoved, tell, value_and_grad
from pipelines.generators import GENERATORS, generate
from pipelines.offload import offload
from pipelines.pieces import Pieces
from pipelines.schedule import Placement, Table
from pipelines.simulate import Costs, simulate

WHOLE = "whole"  # beside a microbatch's arrays, what the router's losses know of all microbatches


def table_of(config: PipelineConfig, stages: int, microbatches: int) -> Table:
    """The table that a configuration names. Raises UserError for one that there is not, or that does not fit."""
    name = config.schedule
    if config.chunks is not None and name != "interleaved":
        raise UserError(
            f"pipeline.chunks {config.chunks} with pipeline.schedule {name}: it is interleaved's, leave it out"
        )
    if name.endswith(".json"):
        try:
            table = Table.load(Path(name).expanduser())
        except UserError as error:
            raise UserError(f"pipeline.schedule {name}: {error}") from error
        found = table.placement.stages, table.microbatches
        if found != (stages, microbatches):
            raise UserError(
                f"pipeline.schedule {name}: a table of {found[0]} stages and {found[1]} microbatches, expected stage="
                f"{stages} of the mesh and accumulate={microbatches}"
            )
    elif name not in GENERATORS:
        raise unknown_name("pipeline.schedule", name, GENERATORS)
    else:
        table = generate(name, stages, microbatches, config.chunks)
    if config.device_slots is None:
        return table
    if table.offloads:
        raise UserError(f"pipeline.device_slots {config.device_slots}: {name} says already what waits in host memory")
    # Nothing is known of the link: they are as few as was asked, whoever waits.
    away = offload(table, Costs(), config.device_slots)
    if not away.moved:
        raise UserError(
            f"pipeline.device_slots {config.device_slots}: under {name} a stage holds at most {away.before} anyway; "
            "expected fewer, or leave it out"
        )
    return away.table


def dealt(model: Model, placement: Placement, head: float) -> Pieces:
    """The layers of each stage. Raises UserError where there are too few."""
    try:
        return Pieces.even(model.config.n_layers, placement, head)
    except UserError as error:
        raise UserError(f"mesh {STAGE}={placement.stages}: {error}") from error


def staged(model: Model, pieces: Pieces) -> Model:
    """The model with its layers in the order of their stages, a row each; rows that a chunk does not need are zeros.

    Raises UserError where they are not alike.
    """
    placement, most = pieces.placement, pieces.most
    stacks = {stored.key.split(".")[1] for stored in model.layout.values() if stored.stacked}
    if len(stacks) != 1:
        raise UserError(
            f"mesh {STAGE}={placement.stages}: the layers of this model have {len(stacks)} shapes, expected one: a "
            "pipeline runs layers that are alike"
        )
    rows = tuple((stage * placement.chunks + chunk) * most + place for stage, chunk, place in pieces.places)

    def moved(stored: Stored) -> Stored:
        if not stored.stacked:
            return stored
        return dataclasses.replace(stored, shape=(placement.count * most, *stored.shape[1:]), rows=rows)

    return model.with_layout(Layout(moved(stored) for stored in model.layout.values()))


@dataclasses.dataclass(frozen=True)
class _Layered:
    """The model of a step, in the pieces that ``pipelines.execute`` takes."""

    step: Step
    prefix: str

    def _cast(self, params: Arrays, prefix: str = "") -> Arrays:
        dtypes = self.step.model.compute_dtypes(self.step.compute_dtype)
        return {key: array.astype(dtypes[prefix + key]) for key, array in params.items()}

    def _gathered(self, params: Arrays) -> Arrays:
        """A layer's parameters as its products use them: whole over mesh axes that split tokens. Experts' are brought
        to their tokens' devices where they are used."""
        context, shardings = current(), self.step.shardings
        assert context is not None
        rules, sizes = context.rules, context.mesh.shape
        over = {*rules["batch"].mesh_axes, *rules["seq"].mesh_axes}
        within = {axis for name in ("seq", "residual") for axis in rules[name].mesh_axes if sizes[axis] > 1}

        def one(key: str, array: jax.Array) -> jax.Array:
            if "experts" in self.step.model.layout[self.prefix + key].axes:
                return array
            stored, summed = (of[self.prefix + key].spec[1:] for of in (shardings.parameters, shardings.gradients))
            used = without(PartitionSpec(*stored), over)
            return gathered(array, used, PartitionSpec(*summed), not within <= {*axes_of(used)})

        return {key: one(key, array) for key, array in params.items()}

    def place(self, x: jax.Array) -> jax.Array:
        return constrain(x, ("batch", "residual", "act_embed"))

    def embed(self, shared: Arrays, batch: Batch) -> jax.Array:
        return self.step.model.ends(self._cast(shared)).embedded(batch["tokens"])

    def context(self, batch: Batch) -> Any:
        c = self.step.model.config
        kernels = self.step.model.compute_dtypes(self.step.compute_dtype)
        angles = rotations(jnp.maximum(batch["positions"], 0), c, activation_dtype(kernels["embed.kernel"]))
        windows = {name: jnp.asarray(values) for name, values in of_layers(c).items()}
        return angles, self.step.seen(batch), windows, batch.get(WHOLE), self.step.sizes(batch)

    def layer(self, params: Arrays, x: jax.Array, context: Any, index: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        angles, rows, windows, whole, here = context
        block = self.step.model.layer(self._gathered(self._cast(params, self.prefix)))
        row = {name: values[index] for name, values in windows.items()}
        y, _, router = block(x, angles, rows, None, layer=index, window=row.get("window"))
        if router is None:
            return y, jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32)), None
        if whole is None:
            whole = {**here, "load": router.load}
        elif "load" in whole:
            whole = {**whole, "load": whole["load"][index]}
        return y, self.step.auxiliary_loss(router, whole) / self.step.model.config.n_layers, router

    def head(self, shared: Arrays, x: jax.Array, batch: Batch) -> jax.Array:
        c, ends = self.step.model.config, self.step.model.ends(self._cast(shared))
        return cross_entropy(ends.norm(x), ends.head_kernel, batch["targets"], c.vocab_size, c.logit_softcap)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelinedStep(Step):
    """A step whose microbatches go through stages, which have these pieces of the model.

    recompute: only what comes into a stage is kept. head: how many layers' work the head is.
    """

    table: Table
    pieces: Pieces
    recompute: bool
    head: float

    @property
    def summary(self) -> str:
        """What goes where, and how long stages wait, in a line."""
        placement, mean = self.table.placement, self.pieces.layers / self.table.placement.count
        each = [count / mean for count in self.pieces.counts]
        each[-1] += self.head / mean
        costs = Costs(each, each, each)
        timeline = simulate(self.table, costs, how="executed")
        layers = [sum(self.pieces.counts[n] for n in placement.numbers(stage)) for stage in range(placement.stages)]
        held = f"{timeline.live.max()} of {self.table.microbatches * placement.chunks}"
        return (
            f"pipeline {self.table.name}: {' + '.join(map(str, layers))} layers, a stage holds {held} activations at "
            f"most, and they wait {timeline.bubble:.0%} of the time if a layer's F, B and W take equally long"
        )

    def check(self, graph: Graph) -> None:
        """Raises UserError for a compiled step that would hang, or does not offload what it should."""
        refuse_permutations(graph.text)
        refuse_unmoved(self.table, graph.stats.host_temporary_bytes)

    def layered(self) -> tuple[Layered, str]:
        """The model as the executor takes it, and what the keys of its layers' parameters begin with."""
        stack = next(key for key, stored in self.model.layout.items() if stored.stacked)
        prefix = ".".join(stack.split(".")[:2]) + "."
        return _Layered(self, prefix), prefix

    def sums(self, params: Arrays, batches: Batch) -> tuple[Arrays, Sums]:
        model, prefix = self.layered()
        shared = {key: array for key, array in params.items() if not key.startswith(prefix)}
        grid = self.table.placement.stages, self.table.placement.chunks, -1
        stacked = {
            key.removeprefix(prefix): array.reshape(*grid, *array.shape[1:])
            for key, array in params.items()
            if key.startswith(prefix)
        }
        policy, mesh = REMAT[self.remat], next(iter(self.shardings.gradients.values())).mesh
        assert isinstance(mesh, Mesh)
        batches, whole = dict(self.arranged(batches)), self.sizes(batches)
        experts, microbatches = self.model.config.experts, batches["tokens"].shape[0]
        if self.auxiliary and microbatches > 1:
            if experts is not None and experts.balance_loss:
                router = tell(model, self.table, self.pieces, mesh)(shared, stacked, batches)
                whole["load"] = self._of_layers(router.load)
            batches[WHOLE] = jax.tree.map(lambda a: jnp.broadcast_to(a, (microbatches, *a.shape)), whole)
        run = value_and_grad(
            model, self.table, self.pieces, mesh,
            remat=None if policy is None else lambda layer: jax.checkpoint(layer, policy=policy),
            recompute=self.recompute,
        )  # fmt: skip
        (loss, router), (of_shared, of_layers) = run(shared, stacked, batches)
        grads = of_shared | {prefix + key: g.reshape(params[prefix + key].shape) for key, g in of_layers.items()}
        sums: Sums = {"loss": loss, "targets": whole["targets"]}
        if router is not None:
            router = jax.tree.map(self._of_layers, router)
            # What is reported is the cross-entropy.
            loss -= self.auxiliary_loss(router, {"load": router.load, **whole})
            sums |= {"loss": loss, "tokens": whole["tokens"], "router": router}
        return lay({key: grads[key] for key in self.optimizer.layout}, self.shardings.gradients), sums

    def _of_layers(self, stacked: jax.Array) -> jax.Array:
        """[stages, chunks, layers of a chunk, ...] to [layers, ...]."""
        return stacked[tuple(np.array(self.pieces.places).T)]
