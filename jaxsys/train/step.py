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

from jaxsys.graphs import Graph
from jaxsys.kernels.attention import Rows, SplitRows
from jaxsys.kernels.loss import cross_entropy
from jaxsys.models.experts import RouterSums, balance_loss, router_metrics, z_loss
from jaxsys.models.state import Model
from jaxsys.optim import Optimizer
from jaxsys.train.update import update
from parallelism import sequence, streaming
from parallelism.errors import UserError, unknown_name
from parallelism.placement import Offload
from parallelism.sharding import constrain
from parallelism.zero import Shardings, StateShardings

Arrays = dict[str, jax.Array]
Counts = dict[str, jax.Array]
Sums = dict[str, Any]  # scalars, and RouterSums
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

    optimizer: its layout says which of the model's parameters are trained. The others are read only: no gradient is
    taken by them, and the norm of gradients is without them.
    compute_dtype: kernels are cast to it for forward and backward; gradients are summed in at least
    float32; updates are in the parameters' dtype.
    shardings: where gradients are kept and which part of a parameter each device updates; in device memory.
    context_method: how attention works where rows are split over the mesh axis ``context``.
    split: size of the split region of batches that ``parallelism.balance`` arranged; None where rows are in order.
    offload: what of the activations waits in host memory. Parameters and state are wherever the arrays are that come
    in, and go out to the same memory.
    """

    model: Model
    optimizer: Optimizer
    compute_dtype: Any
    remat: str
    shardings: StateShardings
    context_method: sequence.Method = "ring"
    split: int | None = None
    offload: Offload = Offload()

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise unknown_name("remat policy", self.remat, REMAT)
        if self.offload.parameters and self.remat == "none":
            raise UserError(
                "offload parameters with remat=none: every layer's parameters would stay on the device for its "
                f"backward pass: expected remat={', '.join(name for name in REMAT if name != 'none')}"
            )

    @property
    def auxiliary(self) -> bool:
        """Whether the gradient is of more than the cross-entropy: of losses of the router, which are means over a whole
        batch, so that what ``counts`` counts of it must be known before its first microbatch."""
        c = self.model.config
        routed = (c.experts_of(layer) for layer in range(c.n_layers))
        return any(e is not None and bool(e.balance_loss or e.z_loss) for e in routed)

    def _forward(self, params: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array, RouterSums | None]:
        dtypes = self.model.compute_dtypes(self.compute_dtype)
        # What lies in host memory is fetched, and cast, by the layer that it belongs to.
        decoder = self.model.bind(
            {k: array if streaming.is_streamed(array) else array.astype(dtypes[k]) for k, array in params.items()}
        )
        batch = self.arranged(batch)
        hidden, _, router = decoder(batch["tokens"], self.seen(batch), remat=self._layer)
        c = self.model.config
        loss = cross_entropy(hidden, decoder.head_kernel, batch["targets"], c.vocab_size, c.logit_softcap)
        return *loss, router

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

    def arranged(self, batch: Batch) -> Batch:
        """A batch [..., T] in the order in which attention wants it on this mesh."""
        n = sequence.pieces()
        if n == 1 or self.split is not None:
            return batch
        # Here and not on the host: four integers a token are nothing, and a loss does not ask for the order.
        order = sequence.balanced_order(batch["tokens"].shape[-1], n)
        axes = (*[None] * (batch["tokens"].ndim - 2), "batch", "seq")
        return {name: constrain(array[..., order], axes) for name, array in batch.items()}

    def seen(self, batch: Batch) -> Rows:
        """What attention sees of an arranged batch [B, T]."""
        n = sequence.pieces()
        if n == 1:
            return Rows(batch["segments"], batch["positions"])
        own = 0 if self.split is None else batch["tokens"].shape[1] // n - self.split
        return SplitRows(batch["segments"], batch["positions"], self.context_method, own)

    def counts(self, params: Arrays, batch: Batch) -> Counts:
        """What the router's losses need to know of a whole batch, of one microbatch: counts of targets and tokens, and,
        for the load-balance loss, of each expert's tokens, for which it runs the model forward."""
        experts, found = self.model.config.experts, self.sizes(batch)
        assert experts is not None
        if experts.balance_loss:
            _, _, router = self._forward(params, batch)
            assert router is not None
            found["load"] = router.load
        return found

    def sizes(self, batch: Batch) -> Counts:
        """How many targets and tokens there are in a batch [..., T]."""
        dtype = jnp.promote_types(self.compute_dtype, jnp.float32)
        return {
            "targets": (batch["targets"] >= 0).sum().astype(dtype),
            "tokens": (batch["segments"] > 0).sum().astype(dtype),
        }

    def count_more(self, counts: Counts, params: Arrays, batch: Batch) -> Counts:
        """``counts`` (donated) plus those of one more microbatch."""
        return jax.tree.map(jnp.add, counts, self.counts(params, batch))

    def grads(self, params: Arrays, batch: Batch, whole: Counts | None = None) -> tuple[Arrays, Sums]:
        """Sums over one microbatch: gradients, in at least float32 so that more add up, and {"loss", "targets"} with,
        of a model with experts, {"tokens", "router"}.

        whole: the counts of the whole batch where it is more than this microbatch.
        """

        trained = {key: params[key] for key in self.optimizer.layout}

        def objective(taps):
            loss, targets, router = self._forward({**params, **streaming.tapped(trained, taps)}, batch)
            if router is None:
                return loss, {"loss": loss, "targets": targets}
            tokens = (batch["segments"] > 0).sum().astype(loss.dtype)
            here = {"targets": targets, "tokens": tokens, "load": router.load}
            return loss + self.auxiliary_loss(router, whole or here), {
                "loss": loss, "targets": targets, "tokens": tokens, "router": router,
            }  # fmt: skip

        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(streaming.taps(trained))
        grads = {key: g.astype(jnp.promote_types(g.dtype, jnp.float32)) for key, g in grads.items()}
        return lay(grads, self.shardings.gradients), sums

    def auxiliary_loss(self, router: RouterSums, whole: Counts) -> jax.Array:
        """A microbatch's part of the router's losses, times the whole batch's targets, by which ``finish`` divides. Of
        sums of one layer: times the number of layers."""
        experts, total = self.model.config.experts, jnp.zeros_like(whole["targets"])
        assert experts is not None
        if experts.balance_loss:
            total += experts.balance_loss * balance_loss(router, whole["load"], whole["tokens"])
        if experts.z_loss:
            total += experts.z_loss * z_loss(router, whole["tokens"])
        return whole["targets"] * total

    def accumulate(
        self, sums: tuple[Arrays, Sums], params: Arrays, batch: Batch, whole: Counts | None = None
    ) -> tuple[Arrays, Sums]:
        """``sums`` (donated) plus those of one more microbatch."""
        grads, totals = jax.tree.map(jnp.add, sums, self.grads(params, batch, whole))
        return lay(grads, self.shardings.gradients), totals

    def finish(self, sums: tuple[Arrays, Sums], step: jax.Array) -> tuple[jax.Array, Arrays]:
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
        if "router" in totals:
            metrics |= router_metrics(totals["router"], totals["tokens"])
        return mean * self.optimizer.clip_scale(norm), metrics

    def update(
        self, params: Arrays, state: Any, grads: Arrays, scale: jax.Array, step: jax.Array
    ) -> tuple[Arrays, Any]:
        """One group's new parameters and optimizer state, in the dtypes and memories that they have."""
        # Each device updates what it has the state of.
        grads = lay({key: g.astype(params[key].dtype) for key, g in grads.items()}, self.shardings.optimizer)
        params = lay(params, self.shardings.optimizer)
        params, state = update(self.optimizer, params, state, grads, scale, step)
        return lay(params, self.shardings.parameters), state

    def sums(self, params: Arrays, batches: Batch) -> tuple[Arrays, Sums]:
        """What ``grads`` gives, of all A microbatches [A, B, T] together."""
        first, others = ({name: value[part] for name, value in batches.items()} for part in (0, slice(1, None)))
        if batches["tokens"].shape[0] == 1:
            return self.grads(params, first)
        whole = None
        if self.auxiliary:
            counts = self.counts(params, first)
            whole, _ = lax.scan(lambda sums, batch: (self.count_more(sums, params, batch), None), counts, others)

        def more(sums, batch):
            return self.accumulate(sums, params, batch, whole), None

        return lax.scan(more, self.grads(params, first, whole), others)[0]

    def fused(
        self, params: Arrays, state: Any, step: jax.Array, batches: Batch, frozen: Arrays | None = None
    ) -> tuple[Arrays, Any, Arrays]:
        """A whole step over A microbatches [A, B, T]: new parameters, optimizer state, metrics.

        params: those that are trained; frozen: the others, which nothing here donates or returns.
        """
        grads, totals = self.sums({**params, **(frozen or {})}, batches)
        scale, metrics = self.finish((grads, totals), step)
        params, state = self.update(params, state, grads, scale, step)
        return params, state, metrics

    @property
    def summary(self) -> str:
        """What a person should know of it before it is compiled, in a line; empty where there is nothing."""
        return ""

    def check(self, graph: Graph) -> None:
        """Raises UserError for a compiled fused step that must not run."""

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


def lay(arrays: Arrays, shardings: Shardings) -> Arrays:
    """Each array in the sharding of its key, those in host memory as they are."""
    return {
        key: lax.with_sharding_constraint(array, shardings[key])
        if shardings[key].mesh.size > 1 and not streaming.in_host(array)
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
