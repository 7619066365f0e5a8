"""GPipe as other JAX trainers have it: at every tick all stages compute, what they made is shifted by one stage, and
autodiff runs backwards through the scan over ticks. A baseline of pipeline.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsys.train.pipelined import PipelinedStep
from jaxsys.train.step import Arrays, Batch, Sums, lay


@dataclasses.dataclass(frozen=True)
class ShiftBuffer(PipelinedStep):
    """A step like any other but for how the gradients come about. The table says only how many stages there are."""

    def sums(self, params: Arrays, batches: Batch) -> tuple[Arrays, Sums]:
        assert self.table is not None
        stages, count = self.table.placement.stages, self.table.microbatches
        mesh = next(iter(self.shardings.gradients.values())).mesh
        assert isinstance(mesh, Mesh)
        model, prefix = self.layered()

        def at(tree: Any, m: jax.Array) -> Any:
            return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, jnp.clip(m, 0, count - 1), keepdims=False), tree)

        def pipeline(layers: Arrays, inputs: jax.Array, batches: Batch) -> jax.Array:
            """On one stage: what it makes at each tick, [1, ticks, ...]."""
            number = lax.axis_index("stage")

            def tick(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
                x = lax.ppermute(x, "stage", [(i, (i + 1) % stages) for i in range(stages)])
                x = jnp.where(number == 0, at(inputs, t), x)
                context = model.context(at(batches, t - number))

                def one(x: jax.Array, layer: Arrays) -> tuple[jax.Array, None]:
                    return model.layer(layer, x, context, jnp.int32(0))[0], None

                x, _ = lax.scan(one, x, {key: a[0] for key, a in layers.items()})
                return x, x

            return lax.scan(tick, jnp.zeros_like(inputs[0]), jnp.arange(count + stages - 1))[1][None]

        split, whole = PartitionSpec("stage"), PartitionSpec()
        run = jax.shard_map(
            pipeline, mesh=mesh, in_specs=(split, whole, whole), out_specs=split, axis_names={"stage"}, check_vma=False
        )

        def objective(params: Arrays) -> jax.Array:
            shared = {key: a for key, a in params.items() if not key.startswith(prefix)}
            layers = {
                key.removeprefix(prefix): a.reshape(stages, -1, *a.shape[1:])
                for key, a in params.items()
                if key.startswith(prefix)
            }
            inputs = lax.map(lambda batch: model.place(model.embed(shared, batch)), dict(batches))
            made = run(layers, inputs, dict(batches))[-1, stages - 1 :]
            return lax.map(lambda each: model.head(shared, *each), (made, dict(batches))).sum()

        loss, grads = jax.value_and_grad(objective)(params)
        targets = (batches["targets"] >= 0).sum().astype(loss.dtype)
        return lay(grads, self.shardings.gradients), {"loss": loss, "targets": targets}
