"""A training run without arrays and without data: what its state is, where it lies, which programs step it.

The trainer fills it with arrays; ``--explain`` and ahead-of-time compilation for other hardware only read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.graphs import Graphs
from jaxsys.hub import resolve
from jaxsys.kernels.attention import ATTENTION
from jaxsys.models.config import ModelConfig
from jaxsys.models.layers import STACKED
from jaxsys.models.pretrained import Pretrained
from jaxsys.models.state import Model, build
from jaxsys.optim import Adafactor, Optimizer
from jaxsys.train.config import PipelineConfig, TrainConfig
from jaxsys.train.freeze import cuts, frozen, trained
from jaxsys.train.launch import Launcher, batch_grid
from jaxsys.train.pipelined import PipelinedStep, dealt, staged, table_of
from jaxsys.train.step import Step
from parallelism import (
    ACTIVATIONS,
    PARAMETERS,
    MeshSpec,
    Plan,
    Rule,
    Rules,
    placement,
    plan,
    refuse_idle_axes,
    sequence,
    sharding_context,
)
from parallelism.errors import UserError
from parallelism.mesh import STAGE
from parallelism.sharding_report import report
from parallelism.zero import state_plans
from pipelines.schedule import Table


def starting_model(config: TrainConfig) -> tuple[ModelConfig, Pretrained | None]:
    """The model that a run trains, and the files that it begins with."""
    if (config.init_from is None) == (config.model is None):
        raise UserError("configuration: give either init_from (a pretrained model) or model (to make from scratch)")
    if config.model is not None:
        return config.experts.applied(config.model), None
    pretrained = Pretrained.open(resolve(str(config.init_from)).path)
    return config.experts.applied(pretrained.config), pretrained


class AbstractRun:
    """The plan, the step and the graphs of a configuration on a mesh.

    plan: of the parameters as they are computed with, in device memory; stored: where they lie between steps. frozen:
    the logical names of those that are not trained; trained: the layout of the others.

    devices: to lay the mesh over, which need not be of this machine (``jax.experimental.topologies``); default: all
    there are. Nothing is made on them and nothing is compiled before ``prepare``.
    Raises UserError for a mesh, rules, rows or a batch that do not go together.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, devices: Sequence[Any] | None = None):
        self.config = config
        if "float64" in (config.parameter_dtype, config.compute_dtype):
            jax.config.update("jax_enable_x64", True)
        self.mesh = MeshSpec.parse(config.mesh).build(devices)
        parameter_rules = PARAMETERS.override(config.parameter_rules)
        self.activation_rules = ACTIVATIONS.override(config.activation_rules)
        # Before the plan, which would name the first array that does not divide for the same reason.
        self._check_experts(model, parameter_rules["experts"])
        self._check_rows(model)
        self._check_offload()
        stages = self.mesh.shape[STAGE]
        table = table_of(config.pipeline, stages, config.accumulate) if stages > 1 else None
        self._check_stages(table)
        self.graphs = Graphs(self.mesh, self.activation_rules)
        with sharding_context(self.mesh, self.activation_rules):  # how layers are stored depends on the platform
            storage = config.storage if table is None else STACKED
            self.unpadded = build(model, dtype=config.parameter_dtype, storage=storage)
            names = self.unpadded.layout.logical
            self.frozen = frozen(config.freeze, names)
            if table is None and (at := cuts(self.frozen, names)):
                self.unpadded = build(model, dtype=config.parameter_dtype, storage=storage, cuts=at)
        pieces = None
        if table is not None:
            pieces = dealt(self.unpadded, table.placement, config.pipeline.head)
            self.unpadded = staged(self.unpadded, pieces)
            parameter_rules = parameter_rules.replace(layers=STAGE)
        self.plan = plan(self.unpadded.layout, self.mesh, parameter_rules, self.unpadded.units)
        refuse_idle_axes(self.plan, self.activation_rules, self.unpadded.activation_axes)
        self.model = self.unpadded.with_layout(self.plan.layout)
        self.trained = trained(self.plan.layout, self.frozen)
        self.optimizer = Optimizer(config.optim, self.trained, config.steps)
        self.plans = state_plans(
            self.plan,
            Rules("gradient", parameter_rules, parameter_rules.paddable).override(config.gradient_rules),
            Rules("optimizer", parameter_rules, parameter_rules.paddable).override(config.optimizer_rules),
            self.unpadded.units,
        )
        self.shardings = self.plans.shardings
        of_step = (
            self.model, self.optimizer, jnp.dtype(config.compute_dtype), config.remat, self.shardings,
            config.context_method, None, placement.Offload.parse(config.offload),
        )  # fmt: skip
        self.step = Step(*of_step)
        if table is not None and pieces is not None:
            c = config.pipeline
            self.step = PipelinedStep(*of_step, table=table, pieces=pieces, recompute=c.recompute, head=c.head)
        in_host = self.model.layer_kernels if self.step.offload.parameters else ()
        self.stored = dataclasses.replace(self.plan, shardings=placement.hosted(self.plan.shardings, in_host))
        self.optimizer_plan = self._optimizer_plan()
        self.layout = self.plan.layout | self.optimizer_plan.layout
        self.launcher = Launcher(config, self.step, self.plan, self.graphs, self.activation_rules)

    @property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        return _abstract(self.stored)

    @property
    def opt_state(self) -> dict[str, jax.ShapeDtypeStruct]:
        return _abstract(self.optimizer_plan)

    def prepare(self) -> None:
        """Compiles the graphs of the step."""
        self.launcher.prepare(self.params, self.opt_state)

    def indivisible(self) -> dict[str, list[str]]:
        """What was done with dimensions that do not divide: of parameters, and of gradients and optimizer state where
        it is not the same."""
        lines = {
            name: report(plan).indivisible
            for name, plan in (
                ("parameters", self.plans.parameters),
                ("gradients", self.plans.gradients),
                ("optimizer state", self.plans.optimizer),
            )
        }
        said = lines["parameters"]
        others = {name: [line for line in found if line not in said] for name, found in lines.items()}
        return {name: found for name, found in {**others, "parameters": said}.items() if found}

    def _check_experts(self, model: ModelConfig, rule: Rule) -> None:
        over = {axis: self.mesh.shape[axis] for axis in rule.mesh_axes}
        if model.experts is None or rule.indivisible != "error" or model.experts.number % math.prod(over.values()) == 0:
            return
        sizes = ",".join(f"{axis}={n}" for axis, n in over.items() if n > 1)
        raise UserError(
            f"mesh {sizes}: the model's {model.experts.number} experts do not divide over it: change the mesh, or keep "
            "all experts on every device with parameter_rules=experts=:replicate"
        )

    def _check_rows(self, model: ModelConfig) -> None:
        data = self.config.data
        if (pieces := self.mesh.shape[sequence.AXIS]) > 1:
            sequence.check_rule(self.mesh, self.activation_rules)
            sequence.balanced_order(data.seq_len, pieces)
        if data.seq_len > model.max_seq_len:
            raise UserError(
                f"data.seq_len {data.seq_len} is over the model's context of {model.max_seq_len}: make it less"
            )
        factor = None if model.experts is None else model.experts.capacity_factor
        if data.split_shares and factor is not None:
            raise UserError(
                f"data.split_shares {data.split_shares} and experts.capacity_factor {factor}: a capacity counts a "
                "row's tokens in order, which balanced batches give up: use one of them"
            )
        if data.batch_size % self.config.accumulate:
            raise UserError(
                f"data.batch_size {data.batch_size} does not divide by accumulate={self.config.accumulate}: change one"
            )
        batch_grid(self.config, self.mesh, self.activation_rules)

    def _check_offload(self) -> None:
        pieces, names = self.mesh.shape[sequence.AXIS], placement.Offload.parse(self.config.offload).activations
        if pieces > 1 and ATTENTION in names:
            raise UserError(
                f"offload activations={ATTENTION} on a mesh with {sequence.AXIS}={pieces}: attention over split rows "
                f"has no activation of that name: leave {ATTENTION} out, or the axis {sequence.AXIS}"
            )

    def _check_stages(self, table: Table | None) -> None:
        """Raises UserError for what does not go through stages."""
        c, stages = self.config, self.mesh.shape[STAGE]
        if stages == 1:
            if given := [name for name, value in vars(c.pipeline).items() if value != getattr(PipelineConfig(), name)]:
                raise UserError(
                    f"pipeline.{given[0]}={getattr(c.pipeline, given[0])} on mesh {c.mesh!r}: it has no axis {STAGE} "
                    "above 1, so nothing goes through stages: leave it out, or give the mesh one"
                )
            return
        offloaded = placement.Offload.parse(c.offload)
        refused = {
            "step_form=split": c.step_form == "split",
            "storage=listed": c.storage == "listed",
            f"offload={c.offload}": bool(offloaded.parameters or offloaded.activations),
            "optimizer adafactor": isinstance(c.optim.optimizer, Adafactor),
        }
        for what, asked in refused.items():
            if asked:
                raise UserError(f"mesh {STAGE}={stages} with {what}: stages cannot do that: leave one of them out")
        if c.pipeline.recompute and table is not None and table.split:
            raise UserError(
                f"pipeline.recompute=true with pipeline.schedule={c.pipeline.schedule}: B and W apart would both begin "
                "with a forward pass: take another schedule, or remat, which keeps less of each layer"
            )
        if (n := self.mesh.shape[sequence.AXIS]) > 1 and c.context_method not in ("all_gather", "all_to_all"):
            raise UserError(
                f"mesh {STAGE}={stages},{sequence.AXIS}={n} with context_method={c.context_method}: it sends by "
                "collective-permute, which hangs where stages do different things: take all_gather or all_to_all"
            )

    def serving(self) -> tuple[Model, Plan] | None:
        """The model as inference runs it, and where its parameters lie, where training stores them by stage."""
        if self.mesh.shape[STAGE] == 1:
            return None
        with sharding_context(self.mesh, self.activation_rules):
            model = build(self.model.config, dtype=self.config.parameter_dtype, storage=self.config.storage)
        rules = self.plan.rules.replace(layers="none")
        placed = plan(model.layout, self.mesh, rules, model.units)
        return model.with_layout(placed.layout), placed

    def _optimizer_plan(self) -> Plan:
        """Where the optimizer's state lies: with its parameters, and what belongs to none on every device."""
        layout, like = self.optimizer.layout_of_state()
        whole = NamedSharding(self.mesh, PartitionSpec())
        decisions = [
            dataclasses.replace(decision, array=name)
            for name, owner in like.items()
            for decision in self.plans.optimizer.decisions
            if decision.array == owner
        ]
        shardings = {name: self.shardings.optimizer[owner] if owner else whole for name, owner in like.items()}
        if share := self.step.offload.optimizer:
            shardings = placement.hosted(shardings, placement.offloaded_state(layout, like, share))
        return Plan(layout, self.mesh, self.plans.optimizer.rules, shardings, tuple(decisions))


def _abstract(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        key: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=plan.shardings[key])
        for key, stored in plan.layout.items()
    }
