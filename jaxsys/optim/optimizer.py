"""Optimizers by name: optax transformations over a flat dictionary of parameters, in groups or whole.

The state keeps the shape of the parameters' dictionary wherever optax mirrors it, so the state of any
group of parameters is the same tree with fewer keys: a fused step updates all keys, a split one some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.optim.schedules import WSD, Constant, Cosine
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored

Params = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def transformations(self, decayed) -> list[optax.GradientTransformation]:
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return [adam, optax.add_decayed_weights(self.weight_decay, mask=decayed)]


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum and decoupled weight decay."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def transformations(self, decayed) -> list[optax.GradientTransformation]:
        trace = [optax.trace(self.momentum, self.nesterov)] if self.momentum else []
        return [*trace, optax.add_decayed_weights(self.weight_decay, mask=decayed)]


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adam with a factored second moment and no first (Shazeer and Stern 2018, algorithm 4)."""

    decay_rate: float = 0.8
    eps: float = 1e-30
    clipping_threshold: float = 1.0
    min_factored: int = 128
    weight_decay: float = 0.0

    def transformations(self, decayed) -> list[optax.GradientTransformation]:
        return [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, epsilon=self.eps, min_dim_size_to_factor=self.min_factored
            ),
            optax.clip_by_block_rms(self.clipping_threshold),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        ]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """What changes the parameters.

    clip_norm: gradients are scaled down to this global norm; None leaves them.
    Weight decay spares norms (arrays with a ``norm`` axis).
    """

    optimizer: AdamW | SGD | Adafactor = AdamW()
    schedule: Cosine | WSD | Constant = Cosine()
    learning_rate: float = 3e-4
    clip_norm: float | None = 1.0


class Optimizer:
    """An optimizer for the parameters of one layout. Traceable: it compiles nothing.

    steps: length of the run, for the schedule. Raises UserError where a layout would change the result.
    """

    def __init__(self, config: OptimConfig, layout: Layout, steps: int):
        self.config, self.layout, self.steps = config, layout, steps
        if isinstance(config.optimizer, Adafactor):
            for stored in layout.values():
                if stored.padded or stored.stacked:
                    how = "padded" if stored.padded else "stacked"
                    raise UserError(
                        f"optimizer adafactor: {stored.key} is stored {how}, and its factored means would take that "
                        "in: use parameter rules with :replicate and storage=listed, or another optimizer"
                    )
        decayed = {key: "norm" not in stored.axes for key, stored in layout.items()}
        self._transform = optax.chain(*config.optimizer.transformations(lambda p: {k: decayed[k] for k in p}))

    def init(self, params: Params) -> Any:
        return self._transform.init(dict(params))

    def learning_rate(self, step: jax.Array) -> jax.Array:
        return self.config.learning_rate * self.config.schedule.factor(step, self.steps)

    def clip_scale(self, norm: jax.Array) -> jax.Array:
        """What gradients of this global norm are multiplied by."""
        clip = self.config.clip_norm
        return jnp.ones_like(norm) if clip is None else jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))

    def update(self, params: Params, state: Any, grads: Params, scale: jax.Array, step: jax.Array) -> tuple[Params, Any]:
        """New parameters and state of one group; all three dictionaries have the group's keys.

        scale: factor on the gradients (mean over tokens, clipping). step: number of updates before this one.
        """
        grads = {key: (g * scale.astype(g.dtype)) for key, g in grads.items()}
        updates, state = self._transform.update(grads, state, dict(params))
        rate = self.learning_rate(step)
        return {key: (p - rate.astype(p.dtype) * updates[key]).astype(p.dtype) for key, p in params.items()}, state

    def select(self, state: Any, keys: Collection[str]) -> Any:
        """The state of a group of parameters: dictionaries of all parameters keep only ``keys``."""
        return jax.tree.map(
            lambda node: {k: node[k] for k in keys} if self._mirrors(node) else node, state, is_leaf=self._mirrors
        )

    def merge(self, whole: Any, part: Any) -> Any:
        """``whole`` with what ``part``, the new state of a group, holds."""

        def put(node, new):
            return {**node, **new} if self._mirrors(node) else new

        return jax.tree.map(put, whole, part, is_leaf=self._mirrors)

    def _mirrors(self, node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == self.layout.keys()

    def state_layout(self, state: Any) -> tuple[Layout, dict[str, str | None]]:
        """The layout of the state, and for each of its keys the parameter it is sharded like (None: replicated).

        state: arrays or their abstract values. Names are ``optimizer.mu.layers.17.mlp.up.kernel``.
        """
        stored, like = [], {}
        for key, path, leaf in _named(state):
            param = self.layout.get(path[-1]) if isinstance(path[-1], str) else None
            dtype = np.dtype(leaf.dtype)
            if param is not None and param.shape == leaf.shape:
                prefix = key.removesuffix(param.key)
                parts = tuple(dataclasses.replace(p, name=prefix + p.name, dtype=dtype) for p in param.parts)
                stored.append(dataclasses.replace(param, key=key, dtype=dtype, parts=parts))
                like[key] = param.key
            else:
                axes = (None,) * len(leaf.shape)
                stored.append(Stored(key, leaf.shape, dtype, axes, (Logical(key, leaf.shape, dtype, axes),)))
                like[key] = None
        return Layout(stored), like

    def flatten(self, state: Any) -> dict[str, jax.Array]:
        return {key: leaf for key, _, leaf in _named(state)}

    def unflatten(self, template: Any, arrays: Mapping[str, jax.Array]) -> Any:
        """The inverse of ``flatten``; template: a state of the same structure."""
        return jax.tree.unflatten(jax.tree.structure(template), [arrays[key] for key, _, _ in _named(template)])


def _named(state: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
    """(key, path, leaf) of every leaf: field names and dictionary keys, positions in chains left out."""
    out = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        words: list[Any] = []
        for entry in path:
            if isinstance(entry, jax.tree_util.GetAttrKey):
                words.append(entry.name)
            elif isinstance(entry, jax.tree_util.DictKey):
                words.append(entry.key)
        out.append((".".join(["optimizer", *map(str, words)]), tuple(words), leaf))
    return out
