"""The packed forward: the one traced function of chunked prefill, decode, scoring and evaluation.

R replicas, T token rows of up to N sequences. The first step computes the rows it is given; each later one computes
a row a sequence, the token it just sampled. How many steps run is data.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsys.kernels.alike import rows_alike
from jaxsys.kernels.attention import Paged, Pool
from jaxsys.models.state import Model
from jaxsys.serve.batch import Batch
from jaxsys.serve.sampler import alternatives, log_probability, processed, sample
from jaxsys.serve.sampling import ALTERNATIVES
from jaxsys.serve.scheduler import Size
from parallelism.sharding import constrain

Numerics = Literal["fast", "invariant"]
"""``invariant``: a token's log-probability is bitwise the same whether it is sampled or scored, whatever shares its
batch. ``fast``: it is as far as rounding goes."""

Form = Literal["fast", "alike", "one"]
"""``fast``: products take the fastest form, the output product runs over the rows that need it. ``alike``: the same, in
the forms whose rows do not depend on their number (``jaxsys.kernels.alike``). ``one``: the output product
runs over all rows of the graph and every log-probability comes out of it, so that within one graph they are alike."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a batch came to.

    Filled up to ``steps`` (scalar, how many ran), [max_steps, R, N] each: tokens, int32; logprobs, processed, float32;
    top_tokens, top_logprobs, with ALTERNATIVES behind, where they are wanted.
    target_logprobs: [R, T] float32, 0 where there was no target; target_top_tokens, target_top_logprobs: of these rows.
    """

    tokens: jax.Array
    logprobs: jax.Array
    processed: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    target_logprobs: jax.Array
    target_top_tokens: jax.Array
    target_top_logprobs: jax.Array
    steps: jax.Array


def make_forward(model: Model, size: Size, max_steps: int, form: Form) -> Callable[..., tuple[Output, Pool]]:
    """``forward(params, pool, batch) -> (Output, pool)`` for one size; the pool is to be donated."""

    def forward(params: Mapping[str, jax.Array], pool: Pool, batch: Batch) -> tuple[Output, Pool]:
        with rows_alike() if form == "alike" else contextlib.nullcontext():
            return steps(params, pool, batch)

    def steps(params: Mapping[str, jax.Array], pool: Pool, batch: Batch) -> tuple[Output, Pool]:
        decoder = model.bind(params)
        R = batch.tokens.shape[0]
        of_steps, of_rows = (max_steps, R, size.sequences), (R, size.rows)
        empty = Output(
            tokens=jnp.zeros(of_steps, jnp.int32),
            logprobs=jnp.zeros(of_steps, jnp.float32),
            processed=jnp.zeros(of_steps, jnp.float32),
            top_tokens=jnp.zeros((*of_steps, ALTERNATIVES), jnp.int32),
            top_logprobs=jnp.zeros((*of_steps, ALTERNATIVES), jnp.float32),
            target_logprobs=jnp.zeros(of_rows, jnp.float32),
            target_top_tokens=jnp.zeros((*of_rows, ALTERNATIVES), jnp.int32),
            target_top_logprobs=jnp.zeros((*of_rows, ALTERNATIVES), jnp.float32),
            steps=jnp.int32(0),
        )

        def goes_on(state):
            _, _, _, _, out, stopped = state
            return (out.steps < batch.steps) & ~stopped

        def step(state):
            tokens, context, last, pool, out, _ = state
            pages, place = context.slots(pool.tokens.shape[-1])
            write = jax.vmap(lambda pool, pages, place, tokens: pool.at[0, pages, place].set(tokens))
            pool = dataclasses.replace(pool, tokens=write(pool.tokens, pages, place, tokens))
            hidden, pool, _ = decoder(tokens, context, pool)

            scoring = batch.score & (out.steps == 0)
            row = jnp.maximum(last, 0)
            position = _at(context.positions, row) + 1

            def project(rows):
                return constrain(decoder.logits(rows), ("batch", None, "act_vocab"))

            def choose(logits):
                """From logits [R, N, V]."""

                def text():
                    tokens = _at(pool.tokens[:, 0], context.page_table).reshape(R * size.sequences, -1)
                    return tokens, jnp.arange(tokens.shape[-1]) < position.reshape(-1, 1)

                def flat(a):
                    return a.reshape(-1, *a.shape[2:])

                rows = flat(logits), jax.tree.map(flat, batch.settings), flat(position), flat(batch.stop)
                logits = constrain(processed(*rows, text).reshape(logits.shape), ("batch", None, "act_vocab"))
                return sample(logits, batch.settings, position, batch.processed)

            def best(logits, wanted, otherwise):
                return lax.cond(wanted & batch.alternatives, lambda: alternatives(logits), lambda: otherwise)

            old = out.target_logprobs, out.target_top_tokens, out.target_top_logprobs
            if form == "one":
                every = project(hidden)
                logits = _at(every, row)
                made, drawn = choose(logits)
                # A row that is sampled has no target; rows of unused sequences write nothing.
                here = jnp.where(last >= 0, last, size.rows)
                wanted = jax.vmap(lambda targets, here, made: targets.at[here].set(made, mode="drop"))(
                    jnp.where(scoring, batch.targets, -1), here, made
                )
                found = log_probability(every, wanted)
                logprobs = _at(found, row)
                scores = (
                    jnp.where(scoring, jnp.where(batch.targets >= 0, found, 0.0), old[0]),
                    *best(every, scoring, old[1:]),
                )
            else:

                def score():
                    every = project(hidden)
                    found = jnp.where(batch.targets >= 0, log_probability(every, batch.targets), 0.0)
                    return found, *best(every, jnp.bool_(True), old[1:])

                scores = lax.cond(scoring, score, lambda: old)
                logits = project(_at(hidden, row))
                made, drawn = choose(logits)
                logprobs = log_probability(logits, made)
            nobody = out.top_tokens[out.steps], out.top_logprobs[out.steps]
            top_tokens, top_logprobs = best(logits, jnp.bool_(True), nobody)
            out = Output(
                tokens=out.tokens.at[out.steps].set(made),
                logprobs=out.logprobs.at[out.steps].set(logprobs),
                processed=out.processed.at[out.steps].set(drawn),
                top_tokens=out.top_tokens.at[out.steps].set(top_tokens),
                top_logprobs=out.top_logprobs.at[out.steps].set(top_logprobs),
                target_logprobs=scores[0],
                target_top_tokens=scores[1],
                target_top_logprobs=scores[2],
                steps=out.steps + 1,
            )
            stopped = ((last >= 0) & (made[..., None] == batch.stop).any(-1)).any()
            position = jnp.where(last >= 0, position, -1)
            tokens, context = _one_row_each(made, position, context, size)
            last = jnp.where(last >= 0, jnp.arange(size.sequences, dtype=jnp.int32), -1)
            return tokens, context, last, pool, out, stopped

        state = (batch.tokens, batch.context, batch.last, pool, empty, jnp.bool_(False))
        *_, pool, out, _ = lax.while_loop(goes_on, step, state)
        return out, pool

    return forward


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [R, ...] at index [R, ...], replica by replica: the devices of one need nothing of another's."""
    return jax.vmap(lambda x, index: x[index])(x, index)


def _one_row_each(made: jax.Array, position: jax.Array, context: Paged, size: Size) -> tuple[jax.Array, Paged]:
    """The rows of a later step: row n is sequence n's new token, in an item of its own."""
    R, N = made.shape
    T = size.rows

    def rows(x, fill):
        return jnp.full((R, T), fill, jnp.int32).at[:, :N].set(x)

    every = np.arange(N, dtype=np.int32)
    *others, own = context.items
    before = sum(table.shape[1] * table.shape[2] for table in others)
    items = *(jnp.full_like(table, T) for table in others), jnp.full_like(own, T).at[:, :N, 0].set(every)
    places = rows(before + every * own.shape[2], 0)
    return rows(made, 0), Paged(rows(position, -1), rows(every, 0), context.page_table, items, places)
