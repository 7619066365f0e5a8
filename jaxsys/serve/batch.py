"""The arrays of one packed batch, and how a plan becomes them. What runs here is numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxsys.kernels.attention import Paged
from jaxsys.serve.sampler import Settings
from jaxsys.serve.scheduler import Plan, Size

# Stop tokens of a sequence that the device looks for; the host finds the others a few tokens later.
STOPS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One packed batch; integers are int32.

    tokens: [R, T]. context: which sequence and position they are of, and where its pages lie.
    targets: [R, T], the token whose log-probability is wanted of each row, -1 for none.
    last: [R, N], the row after which each sequence gets a new token, -1 for none.
    stop: [R, N, E], tokens that bring the batch back to the host, -1 for none. settings: [R, N] each.
    steps: scalar, how many tokens to make of each sequence at most. score: scalar bool, whether there are targets.
    """

    tokens: jax.Array
    context: Paged
    targets: jax.Array
    last: jax.Array
    stop: jax.Array
    settings: Settings
    steps: jax.Array
    score: jax.Array


def pack(plan: Plan, pages_per_sequence: int, page_size: int) -> Batch:
    """The arrays of a plan, for one replica (R = 1). Sequence n of the batch is chunk n of the plan."""
    T, N, I, Q = plan.size.rows, plan.size.sequences, plan.size.items, plan.size.queries
    tokens, sequences, places = _full((1, T), 0), _full((1, T), 0), _full((1, T), 0)
    positions, targets = _full((1, T), -1), _full((1, T), -1)
    items, table = _full((1, I, Q), T), _full((1, N, pages_per_sequence), 0)
    last, stop = _full((1, N), -1), _full((1, N, STOPS), -1)
    settings: Any = Settings(
        temperature=_full((1, N), 0, np.float32),
        top_k=_full((1, N), 0),
        top_p=_full((1, N), 1, np.float32),
        seed=_full((1, N), 0, np.uint32),
    )
    row = item = 0
    for n, chunk in enumerate(plan.chunks):
        request, here = chunk.request, slice(row, row + chunk.count)
        tokens[0, here] = request.tokens[chunk.start : chunk.start + chunk.count]
        positions[0, here] = np.arange(chunk.start, chunk.start + chunk.count)
        sequences[0, here] = n
        if request.score:
            following = request.tokens[chunk.start + 1 : min(chunk.start + chunk.count + 1, request.prompt_tokens)]
            targets[0, row : row + len(following)] = following
        offset = np.arange(chunk.count)
        places[0, here] = (item + offset // Q) * Q + offset % Q
        items.reshape(-1)[places[0, here]] = row + offset
        # Only pages that the dispatch can reach: the rest of the table stays page 0.
        reach = (chunk.start + chunk.count + plan.steps - 2) // page_size + 1
        table[0, n, :reach] = request.pages[:reach]
        sampling = request.sampling
        if chunk.samples:
            last[0, n] = row + chunk.count - 1
            known = sampling.stop[:STOPS]
            stop[0, n, : len(known)] = known
            settings.temperature[0, n], settings.top_k[0, n] = sampling.temperature, sampling.top_k
            settings.top_p[0, n], settings.seed[0, n] = sampling.top_p, request.seed
        row += chunk.count
        item += -(-chunk.count // Q)
    context = Paged(positions, sequences, table, items, places)
    steps, score = _full((), plan.steps), _full((), (targets >= 0).any(), np.bool_)
    return Batch(tokens, context, targets, last, stop, settings, steps, score)


def empty_batch(size: Size, pages_per_sequence: int, page_size: int) -> Batch:
    """A batch of this size in which no row is used."""
    return pack(Plan(size, (), 1), pages_per_sequence, page_size)


def _full(shape: tuple[int, ...], value: float, dtype: Any = np.int32) -> Any:
    return np.full(shape, value, dtype)
