"""The arrays of one packed batch, and how a plan becomes them. What runs here is numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxsys.kernels.attention import Paged
from jaxsys.serve.request import Request
from jaxsys.serve.sampler import Settings
from jaxsys.serve.sampling import BIASES, STOPS
from jaxsys.serve.scheduler import Plan, Size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One packed batch; integers are int32.

    tokens: [R, T]. context: which sequence and position they are of, and where its pages lie.
    targets: [R, T], the token whose log-probability is wanted of each row, -1 for none.
    last: [R, N], the row after which each sequence gets a new token, -1 for none.
    stop: [R, N, E], tokens that bring the batch back to the host, -1 for none. settings: [R, N] each.
    steps: scalar, how many tokens to make of each sequence at most. Scalar bools, whether somebody wants: score,
    log-probabilities of targets; alternatives, the most likely tokens; processed, log-probabilities as drawn from.
    """

    tokens: jax.Array
    context: Paged
    targets: jax.Array
    last: jax.Array
    stop: jax.Array
    settings: Settings
    steps: jax.Array
    score: jax.Array
    alternatives: jax.Array
    processed: jax.Array


def pack(plan: Plan, pages_per_sequence: int, page_size: int, vocabulary: int, apart: bool) -> Batch:
    """The arrays of a plan. Sequence n of a replica is chunk n of it.

    apart: rows that are alone in their chunk have items of one row, where attention takes several together.

    A sequence has the first ``STOPS`` of its stop tokens; the host finds the others a few tokens later.
    """
    R, T, N, I, Q = len(plan.chunks), plan.size.rows, plan.size.sequences, plan.size.items, plan.size.queries
    tokens, sequences, places = (_full((R, T), 0) for _ in range(3))
    positions, targets = _full((R, T), -1), _full((R, T), -1)
    items, singles = _full((R, I, Q), T), _full((R, N, 1), T)
    apart, table = apart and Q > 1, _full((R, N, pages_per_sequence), 0)
    last, stop = _full((R, N), -1), _full((R, N, STOPS), -1)
    floats = np.float32
    settings: Any = Settings(
        temperature=_full((R, N), 0, floats), top_k=_full((R, N), 0), top_p=_full((R, N), 1, floats),
        min_p=_full((R, N), 0, floats), seed=_full((R, N), 0, np.uint32), repetition=_full((R, N), 1, floats),
        presence=_full((R, N), 0, floats), frequency=_full((R, N), 0, floats), prompt=_full((R, N), 0),
        ends=_full((R, N), 0), biased=_full((R, N, BIASES), -1), bias=_full((R, N, BIASES), 0, floats),
        allowed=_full((R, N, -(-vocabulary // 32)), 0, np.uint32), limited=_full((R, N), False, np.bool_),
    )  # fmt: skip
    for r, chunks in enumerate(plan.chunks):
        row = item = single = 0
        for n, chunk in enumerate(chunks):
            request, here = chunk.request, slice(row, row + chunk.count)
            tokens[r, here] = request.tokens[chunk.start : chunk.start + chunk.count]
            positions[r, here] = np.arange(chunk.start, chunk.start + chunk.count)
            sequences[r, here] = n
            if request.sampling.prompt_logprobs:
                following = request.tokens[chunk.start + 1 : min(chunk.start + chunk.count + 1, request.prompt_tokens)]
                targets[r, row : row + len(following)] = following
            offset = np.arange(chunk.count)
            if apart and chunk.count == 1:
                singles[r, single], places[r, row] = row, I * Q + single
                single += 1
            else:
                places[r, here] = item * Q + offset
                items[r].reshape(-1)[places[r, here]] = row + offset
                item += -(-chunk.count // Q)
            # Only pages that the dispatch can reach: the rest of the table stays page 0.
            reach = (chunk.start + chunk.count + plan.steps - 2) // page_size + 1
            table[r, n, :reach] = request.pages[:reach]
            if chunk.samples:
                last[r, n] = row + chunk.count - 1
                known = request.sampling.stop[:STOPS]
                stop[r, n, : len(known)] = known
                _set(settings, (r, n), request)
            row += chunk.count
    context = Paged(positions, sequences, table, (items, singles) if apart else (items,), places)
    asked = [chunk.request.sampling for chunks in plan.chunks for chunk in chunks]
    wants = [
        (targets >= 0).any(),
        any(each.logprobs for each in asked),
        any(each.processed_logprobs for each in asked),
    ]
    return Batch(
        tokens, context, targets, last, stop, settings, _full((), plan.steps),
        *(_full((), want, np.bool_) for want in wants),
    )  # fmt: skip


def _set(settings: Any, at: tuple[int, int], request: Request) -> None:
    """The settings of a sequence, by its replica and number."""
    asked = request.sampling
    for name, value in (
        ("temperature", asked.temperature), ("top_k", asked.top_k), ("top_p", asked.top_p), ("min_p", asked.min_p),
        ("seed", request.seed), ("repetition", asked.repetition_penalty), ("presence", asked.presence_penalty),
        ("frequency", asked.frequency_penalty), ("prompt", request.prompt_tokens),
        ("ends", request.prompt_tokens + asked.min_tokens),
    ):  # fmt: skip
        getattr(settings, name)[at] = value
    if asked.logit_bias:
        settings.biased[at][: len(asked.logit_bias)] = list(asked.logit_bias)
        settings.bias[at][: len(asked.logit_bias)] = list(asked.logit_bias.values())
    if asked.allowed_tokens is not None:
        token = np.array(asked.allowed_tokens)
        np.bitwise_or.at(settings.allowed[at], token // 32, np.uint32(1) << (token % 32).astype(np.uint32))
        settings.limited[at] = True


def empty_batch(
    size: Size, replicas: int, pages_per_sequence: int, page_size: int, vocabulary: int, apart: bool
) -> Batch:
    """A batch of this size in which no row is used."""
    return pack(Plan(size, ((),) * replicas, 1), pages_per_sequence, page_size, vocabulary, apart)


def _full(shape: tuple[int, ...], value: float, dtype: Any = np.int32) -> Any:
    return np.full(shape, value, dtype)
