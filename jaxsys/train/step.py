"""The train step, fused and split: the same arithmetic, cut at the places where others come in between.

Fused, one graph takes a batch of A microbatches and donates the whole state. Split, ``grads`` runs once a
microbatch, ``finish`` once, and ``update`` once for each group of parameters, each donating only its group: a
lazy snapshot, a streamed optimizer and a decode step need such places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from jaxsys.kernels.attention import Rows, SplitRows
from jaxsys.kernels.loss import cross_entropy
from jaxsys.models.state import Model
from jaxsys.optim import Optimizer
from jaxsys.train.update import update
from parallelism import sequence, streaming
from parallelism.errors import UserError, unknown_name
from parallelism.placement import Offload
from parallelism.sharding import constrain

Arrays = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]  # tokens, targets, segments, positions: [B, T] int32; a batch of A is [A, B, T]

REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What of a layer's forward pass is kept for its backward pass: everything, nothing, all matmuls, or those
without a batch dimension (all but attention's)."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Traceable pieces of a train step for one model, optimizer and precision.

    compute_dtype: kernels are cast to it for forward and backward; gradients are summed in at least
    float32; updates are in the parameters' dtype.
    shardings: of the parameters, in device memory; gradients are kept in them.
    context_method: how attention works where rows are split over the mesh axis ``context``.
    offload: what of the activations waits in host memory. Parameters and state are wherever the arrays are that come
    in, and go out to the same memory.
    """

    model: Model
    optimizer: Optimizer
    compute_dtype: Any
    remat: str
    shardings: Mapping[str, NamedSharding]
    context_method: sequence.Method = "ring"
    offload: Offload = Offload()

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise unknown_name("remat policy", self.remat, REMAT)
        if self.offload.parameters and self.remat == "none":
            raise UserError(
                "offload parameters with remat=none: every layer's parameters would stay on the device for its "
                f"backward pass: expected remat={', '.join(name for name in REMAT if name != 'none')}"
            )

    def losses(self, params: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of -log p over the targets of one microbatch [B, T], and their number."""
        dtypes = self.model.compute_dtypes(self.compute_dtype)
        # What lies in host memory is fetched, and cast, by the layer that it belongs to.
        decoder = self.model.bind(
            {k: array if streaming.is_streamed(array) else array.astype(dtypes[k]) for k, array in params.items()}
        )
        batch, context = self._rows(batch)
        hidden, _ = decoder(batch["tokens"], context, remat=self._layer)
        config = self.model.config
        return cross_entropy(hidden, decoder.head_kernel, batch["targets"], config.vocab_size, config.logit_softcap)

    def _layer(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """One layer's function on parameters in either memory, keeping for its backward pass what it should."""

        def fetched(state: Any, *rest: Any) -> Any:
            def fetch(x: Any) -> Any:
                return streaming.fetch(x).astype(self.compute_dtype) if streaming.is_streamed(x) else x

            return layer(jax.tree.map(fetch, state, is_leaf=lambda x: isinstance(x, streaming.Streamed)), *rest)

        policy, names = REMAT[self.remat], self.offload.activations
        if names:
            policy = streaming.offloading(policy or jax.checkpoint_policies.everything_saveable, names)
        return fetched if policy is None else jax.checkpoint(fetched, policy=policy)

    def _rows(self, batch: Batch) -> tuple[Batch, Rows]:
        """The batch in the order in which attention wants it on this mesh, and what attention sees of it."""
        n = sequence.pieces()
        if n == 1:
            return batch, Rows(batch["segments"], batch["positions"])
        # Here and not on the host: four integers a token are nothing, and a loss does not ask for the order.
        order = sequence.balanced_order(batch["tokens"].shape[1], n)
        batch = {name: constrain(array[:, order], ("batch", "seq")) for name, array in batch.items()}
        return batch, SplitRows(batch["segments"], batch["positions"], self.context_method)

    def grads(self, params: Arrays, batch: Batch) -> tuple[Arrays, Arrays]:
        """Sums over one microbatch: gradients, in at least float32 so that more add up, and {"loss", "targets"}."""

        def loss(taps):
            total, count = self.losses(streaming.tapped(params, taps), batch)
            return total, count

        (total, count), grads = jax.value_and_grad(loss, has_aux=True)(streaming.taps(params))
        grads = {key: g.astype(jnp.promote_types(g.dtype, jnp.float32)) for key, g in grads.items()}
        return self._keep(grads), {"loss": total, "targets": count}

    def accumulate(self, sums: tuple[Arrays, Arrays], params: Arrays, batch: Batch) -> tuple[Arrays, Arrays]:
        """``sums`` (donated) plus those of one more microbatch."""
        return jax.tree.map(jnp.add, sums, self.grads(params, batch))

    def finish(self, sums: tuple[Arrays, Arrays], step: jax.Array) -> tuple[jax.Array, Arrays]:
        """The factor that turns summed gradients into clipped means, and the step's metrics."""
        grads, totals = sums
        mean = 1.0 / jnp.maximum(totals["targets"], 1.0)
        squares = [jnp.sum(jnp.square(g)) for g in grads.values()]
        norm = jnp.sqrt(sum(squares)) * mean
        metrics = {
            "loss": totals["loss"] * mean,
            "targets": totals["targets"],
            "grad_norm": norm,
            "learning_rate": self.optimizer.learning_rate(step),
        }
        return mean * self.optimizer.clip_scale(norm), metrics

    def update(
        self, params: Arrays, state: Any, grads: Arrays, scale: jax.Array, step: jax.Array
    ) -> tuple[Arrays, Any]:
        """One group's new parameters and optimizer state, in the dtypes and memories that they have."""
        grads = {key: g.astype(params[key].dtype) for key, g in grads.items()}
        params, state = update(self.optimizer, params, state, grads, scale, step)
        return self._keep(params), state

    def fused(self, params: Arrays, state: Any, step: jax.Array, batches: Batch) -> tuple[Arrays, Any, Arrays]:
        """A whole step over A microbatches [A, B, T]: new parameters, optimizer state, metrics."""
        count = batches["tokens"].shape[0]
        sums = self.grads(params, {name: value[0] for name, value in batches.items()})
        if count > 1:

            def more(sums, batch):
                return self.accumulate(sums, params, batch), None

            sums, _ = lax.scan(more, sums, {name: value[1:] for name, value in batches.items()})
        scale, metrics = self.finish(sums, step)
        params, state = self.update(params, state, sums[0], scale, step)
        return params, state, metrics

    def finite(self, state: Arrays) -> jax.Array:
        """Whether every value of the state is a finite number: a bool scalar."""

        def finite(array: jax.Array) -> jax.Array:
            return jnp.isfinite(array).all()

        stored = {**self.model.layout, **self.optimizer.layout_of_state()[0]}
        found = [finite(array) for array in state.values() if not streaming.in_host(array)]
        away = {name: array for name, array in state.items() if streaming.in_host(array)}
        stacks = [array for name, array in away.items() if stored[name].stacked]
        found += [lax.map(lambda row: finite(streaming.to_device(row)), stack).all() for stack in stacks]
        single = [array for name, array in away.items() if not stored[name].stacked]
        found += streaming.in_turn(lambda array: finite(streaming.to_device(array)), single)
        return jnp.stack(found).all()

    def _keep(self, arrays: Arrays) -> Arrays:
        """Each array in its parameter's sharding, those in host memory as they are."""
        return {
            key: lax.with_sharding_constraint(array, self.shardings[key])
            if self.shardings[key].mesh.size > 1 and not streaming.in_host(array)
            else array
            for key, array in arrays.items()
        }


def groups(keys: Sequence[str], sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """``keys`` in order, cut into at most ``count`` groups of about equal bytes."""
    total, filled = sum(sizes[k] for k in keys), 0
    out: list[list[str]] = [[]]
    for key in keys:
        if out[-1] and filled >= total * len(out) / count:
            out.append([])
        out[-1].append(key)
        filled += sizes[key]
    return out
