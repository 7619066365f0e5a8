"""How layers are stored, behind one ``Layers.apply``: a list of per-layer arrays, or stacks of them.

On CPU a scan over a stack costs decode two to six times, so CPU lists; on TPU and GPU a stack keeps
compile time from growing with depth. Layers whose shapes differ form separate spans; differences that
keep shapes (a window) are data along the layer axis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxsys.graphs import traced_once
from parallelism.sharding import platform

LISTED, STACKED = "listed", "stacked"


def default_storage() -> str:
    return LISTED if platform() == "cpu" else STACKED


def _stack(blocks: Sequence[nnx.Module]) -> nnx.Module:
    graphdef, first = nnx.split(blocks[0])
    states = [first, *(nnx.state(block) for block in blocks[1:])]
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


class Layers(nnx.Module):
    """Blocks in order. Attribute ``"17"`` is layer 17 alone; ``"0-29"`` is a stack of layers 0 to 29.

    cuts: layers at which a stack begins, even where they are like the one before.
    """

    def __init__(self, blocks: Sequence[nnx.Module], storage: str, cuts: Collection[int] = ()):
        shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(b))) for b in blocks]
        spans: list[tuple[int, int]] = []
        for i, shape in enumerate(shapes):
            if storage == STACKED and spans and shapes[i - 1] == shape and i not in cuts:
                spans[-1] = (spans[-1][0], i + 1)
            else:
                spans.append((i, i + 1))
        self.spans = tuple(spans)
        self.storage = storage
        for start, stop in spans:
            setattr(
                self, self.span_name(start, stop), _stack(blocks[start:stop]) if storage == STACKED else blocks[start]
            )

    def span_name(self, start: int, stop: int) -> str:
        return f"{start}-{stop - 1}" if self.storage == STACKED else str(start)

    def apply(
        self,
        body: Callable[..., tuple[jax.Array, Any, Any]],
        x: jax.Array,
        carry: Any,
        data: dict[str, np.ndarray],
        remat: Callable[[Callable], Callable] | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Runs ``body(block, x, carry, index, row) -> (x, carry, out)`` for every layer, in order.

        carry: passed from layer to layer and never stacked (a KV pool stays one buffer, updated in place).
        data: arrays [L, ...]; ``row`` is a layer's slice of each. remat: wraps one layer's function.
        Returns x, the carry, and what the layers gave out that did not give None, stacked (None if all did).
        """
        given: list[Any] = []

        def layer(graphdef, state, x, carry, index, row):
            return body(nnx.merge(graphdef, state), x, carry, index, row)

        # Where there is a carry there is no gradient, and layers that are alike need not be traced one by one.
        run = layer if carry is None else traced_once(layer, static=(0,))
        for start, stop in self.spans:
            graphdef, state = nnx.split(getattr(self, self.span_name(start, stop)))
            one: Callable[..., Any] = partial(run, graphdef)
            one = remat(one) if remat else one
            if self.storage == LISTED:
                x, carry, out = one(state, x, carry, start, {name: values[start] for name, values in data.items()})
                given.append(jax.tree.map(lambda a: a[None], out))
            else:
                rows = {name: jnp.asarray(values[start:stop]) for name, values in data.items()}

                def step(xc, layer, one=one):
                    state, index, row = layer
                    x, carry, out = one(state, *xc, index, row)
                    return (x, carry), out

                (x, carry), out = lax.scan(step, (x, carry), (state, jnp.arange(start, stop), rows))
                given.append(out)
        given = [out for out in given if out is not None]
        return x, carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *given) if given else None
