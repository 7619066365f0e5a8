"""Optimizers by name: optax transformations over a flat dictionary of parameters, in groups or whole.

The state is a flat dictionary too, of logical names, so that the part which belongs to a group of parameters
is a matter of keys: a fused step updates all of them, a split one some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.configuration import BadValue, expect, expect_at_least, expect_positive
from jaxsys.optim.schedules import WSD, Constant, Cosine
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored

Params = Mapping[str, jax.Array]
# Which of the parameters, by key, get weight decay.
Mask = Callable[[Params], dict[str, bool]]


def _expect_decay(optimizer: object, *names: str) -> None:
    expect(optimizer, "at least 0 and below 1", lambda value: 0 <= value < 1, *names)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _expect_decay(self, "b1", "b2")
        expect_positive(self, "eps")
        expect_at_least(self, 0, "weight_decay")

    def transformations(self, decayed: Mask) -> list[optax.GradientTransformation]:
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return [adam, optax.add_decayed_weights(self.weight_decay, mask=decayed)]


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum and decoupled weight decay."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _expect_decay(self, "momentum")
        expect_at_least(self, 0, "weight_decay")
        if self.nesterov and not self.momentum:
            raise BadValue("nesterov", True, "false where momentum is 0")

    def transformations(self, decayed: Mask) -> list[optax.GradientTransformation]:
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

    def __post_init__(self) -> None:
        expect_positive(self, "decay_rate", "eps", "clipping_threshold")
        expect_at_least(self, 1, "min_factored")
        expect_at_least(self, 0, "weight_decay")

    def transformations(self, decayed: Mask) -> list[optax.GradientTransformation]:
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
    schedule: Cosine | WSD | Constant = dataclasses.field(default_factory=Cosine)
    learning_rate: float = 3e-4
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        expect_at_least(self, 0, "learning_rate")
        expect_positive(self, "clip_norm")


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
        abstract = {key: jax.ShapeDtypeStruct(s.shape, s.dtype) for key, s in layout.items()}
        self._template = jax.eval_shape(self._transform.init, abstract)
        self._owner = {name: path[-1] if path[-1] in layout else None for name, path, _ in _named(self._template)}

    def init(self, params: Params) -> dict[str, jax.Array]:
        """The state as a flat dictionary: ``optimizer.mu.layers.17.mlp.up.kernel`` and the like."""
        return self._flatten(self._transform.init(dict(params)))

    def learning_rate(self, step: jax.Array) -> jax.Array:
        return self.config.learning_rate * self.config.schedule.factor(step, self.steps)

    def clip_scale(self, norm: jax.Array) -> jax.Array:
        """What gradients of this global norm are multiplied by."""
        clip = self.config.clip_norm
        return jnp.ones_like(norm) if clip is None else jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))

    def update(
        self, params: Params, state: Params, grads: Params, scale: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """New parameters and state of a group of parameters (or of all).

        params, grads: the group's. state: the names that ``owned`` gives for it, and all ``shared`` ones.
        scale: factor on the gradients (mean over tokens, clipping). step: number of updates before this one.
        """
        keys = params.keys()
        template = jax.tree.map(
            lambda node: {k: node[k] for k in keys} if self._mirrors(node) else node,
            self._template,
            is_leaf=self._mirrors,
        )
        tree = jax.tree.unflatten(jax.tree.structure(template), [state[name] for name, _, _ in _named(template)])
        grads = {key: (g * scale.astype(g.dtype)) for key, g in grads.items()}
        updates, tree = self._transform.update(grads, tree, dict(params))
        rate = self.learning_rate(step)
        new = {key: (p - rate.astype(p.dtype) * updates[key]).astype(p.dtype) for key, p in params.items()}
        return new, self._flatten(tree)

    def owned(self, keys: Collection[str]) -> list[str]:
        """The names of the state that belong to these parameters."""
        return [name for name, owner in self._owner.items() if owner in keys]

    @property
    def shared(self) -> list[str]:
        """The names of the state that belong to no parameter: a count of updates. Every group computes the same."""
        return [name for name, owner in self._owner.items() if owner is None]

    def layout_of_state(self) -> tuple[Layout, dict[str, str | None]]:
        """The layout of the state, and for each name the parameter whose sharding it has (None: replicated)."""
        stored, like = [], {}
        for name, _, leaf in _named(self._template):
            owner, dtype = self._owner[name], np.dtype(leaf.dtype)
            if owner is not None and self.layout[owner].shape == leaf.shape:
                param = self.layout[owner]
                prefix = name.removesuffix(owner)
                parts = tuple(dataclasses.replace(p, name=prefix + p.name, dtype=dtype) for p in param.parts)
                stored.append(dataclasses.replace(param, key=name, dtype=dtype, parts=parts))
                like[name] = owner
            else:
                axes = (None,) * len(leaf.shape)
                stored.append(Stored(name, leaf.shape, dtype, axes, (Logical(name, leaf.shape, dtype, axes),)))
                like[name] = None
        return Layout(stored), like

    def _mirrors(self, node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == self.layout.keys()

    @staticmethod
    def _flatten(state: Any) -> dict[str, jax.Array]:
        return {name: leaf for name, _, leaf in _named(state)}


def _named(state: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
    """(name, path, leaf) of every leaf: field names and dictionary keys, positions in chains left out."""
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
