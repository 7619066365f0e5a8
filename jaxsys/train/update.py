"""An optimizer's update of parameters and state, some of which are in host memory: a part at a time."""

from __future__ import annotations

from typing import Any

import jax

from jaxsys.optim import Optimizer
from parallelism import streaming

Arrays = dict[str, jax.Array]


def update(
    optimizer: Optimizer, params: Arrays, state: Arrays, grads: Arrays, scale: jax.Array, step: jax.Array
) -> tuple[Arrays, Arrays]:
    """``optimizer.update`` with the same results, each in the memory that it came from; traceable.

    Stacked layers of which anything is in host memory are updated a layer at a time, with what of the layer is on the
    device, which hides the transfers (Maurya et al. 2024); other arrays one after the other; all else at once.
    """
    shared = {name: state[name] for name in optimizer.shared}

    def part(keys: list[str]) -> tuple[tuple[Arrays, Arrays], Arrays]:
        own = {name: state[name] for name in optimizer.owned(keys)}
        return ({key: params[key] for key in keys}, own), {key: grads[key] for key in keys}

    def one(arrays: tuple[Arrays, Arrays], grads: Arrays) -> tuple[Arrays, Arrays]:
        params, own = arrays
        params, new = optimizer.update(params, {**own, **shared}, grads, scale, step)
        return params, {name: new[name] for name in own}

    def alone(group: tuple[tuple[Arrays, Arrays], Arrays]) -> tuple[Arrays, Arrays]:
        return streaming.like_before(one(*streaming.to_device(group)), group[0])

    spans: dict[str, list[str]] = {}
    single: list[str] = []
    here: list[str] = []
    away = {key for key in params if any(map(streaming.in_host, jax.tree.leaves(part([key])[0])))}
    leaving = {_span(key) for key in away if optimizer.layout[key].stacked}
    for key in params:
        if optimizer.layout[key].stacked and (span := _span(key)) in leaving:
            spans.setdefault(span, []).append(key)
        else:
            (single if key in away else here).append(key)
    results = [one(*part(here))]
    deep = [keys for keys in spans.values() if params[keys[0]].shape[0] > 1]
    flat = [keys for keys in spans.values() if params[keys[0]].shape[0] == 1]
    results += [streaming.over_rows(one, *part(keys)) for keys in deep]
    results += streaming.in_turn(alone, [part(keys) for keys in [*flat, *([key] for key in single)]])
    new_params: dict[str, Any] = {}
    new_state = optimizer.update({}, shared, {}, scale, step)[1]
    for some_params, some_state in results:
        new_params |= some_params
        new_state |= some_state
    return {key: new_params[key] for key in params}, {name: new_state[name] for name in state}


def _span(key: str) -> str:
    """The stack of layers that an array belongs to: ``layers.0-29`` of ``layers.0-29.mlp.up.kernel``."""
    return ".".join(key.split(".")[:2])
