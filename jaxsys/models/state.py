"""Between the nnx model and the flat dictionary of arrays that everything else works on.

``nnx`` stays at the edge: inside, parameters are ``{key: array}`` with keys such as
``layers.17.attention.q.kernel`` (listed) or ``layers.0-29.attention.q.kernel`` (stacked). A flat
dictionary is cheap to dispatch, splits into update groups by key, and maps to logical names here only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsys.models.config import ModelConfig
from jaxsys.models.decoder import Block, Decoder
from jaxsys.models.layers import default_storage
from parallelism.layout import Layout, Logical, Stored
from parallelism.placement import is_matrix

KEPT = {"norm", "router"}  # axes of arrays that compute in the dtype they are stored in

_STACK = re.compile(r"\b(\d+)-(\d+)\b")


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its arrays: the graph definition and the layout of its parameters.

    cuts: layers at which a stack begins, even where they are like the one before.
    """

    config: ModelConfig
    graphdef: Any
    layout: Layout
    storage: str
    cuts: tuple[int, ...] = ()

    @property
    def units(self) -> dict[str, int]:
        """Query heads may only be split or padded in whole groups that share a key/value head."""
        return {"heads": self.config.query_group}

    @property
    def activation_axes(self) -> tuple[str, ...]:
        """Names of the dimensions of what it computes in training that the rules may split."""
        dense = ("batch", "seq", "residual", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab")
        return dense if self.config.experts is None else (*dense, "act_experts", "act_expert_embed")

    @property
    def made_of(self) -> tuple:
        """What its functions depend on beside their source, as text says it (``Graphs.compile``)."""
        return self.config, tuple(self.layout.values()), self.storage

    def bind(self, params: Mapping[str, jax.Array]) -> Decoder:
        """The nnx model on these arrays (call it inside traced code)."""
        return _merged(self.graphdef, params)

    def ends(self, params: Mapping[str, jax.Array]) -> Decoder:
        """The model without its layers, on the parameters that are no layer's (call it inside traced code)."""
        decoder = nnx.eval_shape(lambda: Decoder(self.config, rngs=_ONE_KEY, dtype=self.dtype, layers=False))
        return _merged(nnx.split(decoder)[0], params)

    def layer(self, params: Mapping[str, jax.Array]) -> Block:
        """A layer, where all are alike, on its parameters by what follows the layer in their keys (inside traced
        code)."""
        block = nnx.eval_shape(lambda: Block(self.config, 0, dtype=self.dtype, rngs=_ONE_KEY))
        return _merged(nnx.split(block)[0], params)

    def init(self, seed: jax.Array) -> dict[str, jax.Array]:
        """Fresh parameters, unpadded (call it inside traced code); the same for both storages and any sharding."""
        rngs = nnx.Rngs(jax.random.key(seed))
        decoder = Decoder(self.config, rngs=rngs, dtype=self.dtype, storage=self.storage, cuts=self.cuts)
        return {key: variable[...] for key, variable in _variables(decoder).items()}

    def compute_dtypes(self, dtype: Any) -> dict[str, np.dtype]:
        """What each parameter is cast to where the model computes in ``dtype``: norms and routers stay as they are."""
        return {k: s.dtype if KEPT & set(s.axes) else jnp.dtype(dtype) for k, s in self.layout.items()}

    @property
    def layer_kernels(self) -> list[str]:
        """Keys of the matrices of the layers that are cast to compute with: what a layer function gets as they are
        stored, and may fetch."""
        matrices = (key for key, stored in self.layout.items() if is_matrix(stored) and not KEPT & set(stored.axes))
        return [key for key in matrices if key.startswith("layers.")]

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.layout.values())).dtype

    def with_layout(self, layout: Layout) -> Model:
        """The same model stored otherwise (padded)."""
        return dataclasses.replace(self, layout=layout)


def build(
    config: ModelConfig, *, dtype: Any = jnp.float32, storage: str | None = None, cuts: tuple[int, ...] = ()
) -> Model:
    """The model and its layout, without making an array. cuts: layers at which a stack begins in any case."""
    storage = storage or default_storage()
    # Nothing is drawn: one key does, and counting them costs three times what the rest does.
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=_ONE_KEY, dtype=dtype, storage=storage, cuts=cuts))
    variables = sorted(_variables(abstract).items(), key=lambda item: _natural(item[0]))
    layout = Layout(_stored(key, variable) for key, variable in variables)
    return Model(config, nnx.split(abstract)[0], layout, storage, cuts)


class _OneKey:
    """What layers take their keys from, where the arrays are only described."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


_ONE_KEY: Any = _OneKey()


def _merged(graphdef: Any, params: Mapping[str, jax.Array]) -> Any:
    paths: Any = {_path(key): array for key, array in params.items()}
    return nnx.merge(graphdef, nnx.State.from_flat_path(paths))


def _variables(decoder: Decoder) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): v for path, v in nnx.state(decoder, nnx.Param).flat_state()}


def _natural(key: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"[.-]", key)]


def _path(key: str) -> tuple[str, ...]:
    return tuple(key.split("."))


def _stored(key: str, variable: nnx.Variable) -> Stored:
    shape, dtype = variable.shape, np.dtype(variable.dtype)
    axes = tuple(variable.get_metadata()["axes"])
    match = _STACK.search(key)
    if match is None:
        return Stored(key, shape, dtype, axes, (Logical(key, shape, dtype, axes),))
    first, last = int(match[1]), int(match[2])
    names = [_STACK.sub(str(i), key, count=1) for i in range(first, last + 1)]
    parts = tuple(Logical(name, shape[1:], dtype, axes) for name in names)
    return Stored(key, shape, dtype, ("layers", *axes), parts, stacked=True)
