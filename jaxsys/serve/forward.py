"""The packed forward: the one traced function of chunked prefill, decode, scoring and evaluation.

R replicas, T token rows of up to N sequences, C pages a sequence, E stop tokens. The first step computes the rows it
is given; each later one computes a row a sequence, the token it just sampled. How many steps run is data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsys.kernels.attention import Paged, Pool
from jaxsys.kernels.matmul import activation_dtype
from jaxsys.models.state import Model
from jaxsys.serve.sampler import Settings, log_probability, sample
from jaxsys.serve.scheduler import Plan, Size
from parallelism.sharding import constrain

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a batch came to.

    tokens, logprobs: [max_steps, R, N] int32 and float32, filled up to ``steps`` (scalar, how many ran).
    target_logprobs: [R, T] float32, 0 where there was no target.
    """

    tokens: jax.Array
    logprobs: jax.Array
    target_logprobs: jax.Array
    steps: jax.Array


def make_forward(model: Model, size: Size, max_steps: int) -> Callable[..., tuple[Output, Pool]]:
    """``forward(params, pool, batch) -> (Output, pool)`` for one size; the pool is to be donated."""

    def forward(params: Mapping[str, jax.Array], pool: Pool, batch: Batch) -> tuple[Output, Pool]:
        decoder = model.bind(params)
        R = batch.tokens.shape[0]
        replica = jnp.arange(R)[:, None]
        empty = Output(
            jnp.zeros((max_steps, R, size.sequences), jnp.int32),
            jnp.zeros((max_steps, R, size.sequences), jnp.float32),
            jnp.zeros((R, size.rows), jnp.float32),
            jnp.int32(0),
        )

        def goes_on(state):
            _, _, _, _, out, stopped = state
            return (out.steps < batch.steps) & ~stopped

        def step(state):
            tokens, context, last, pool, out, _ = state
            hidden, pool = decoder(tokens, context, pool)

            def score():
                logits = constrain(decoder.logits(hidden), ("batch", "seq", "act_vocab"))
                return jnp.where(batch.targets >= 0, log_probability(logits, batch.targets), 0.0)

            scores = lax.cond(batch.score & (out.steps == 0), score, lambda: out.target_logprobs)
            row = jnp.maximum(last, 0)
            position = context.positions[replica, row] + 1
            logits = constrain(decoder.logits(hidden[replica, row]), ("batch", None, "act_vocab"))
            made, logprobs = sample(logits, batch.settings, position)
            out = Output(
                out.tokens.at[out.steps].set(made), out.logprobs.at[out.steps].set(logprobs), scores, out.steps + 1
            )
            stopped = ((last >= 0) & (made[..., None] == batch.stop).any(-1)).any()
            position = jnp.where(last >= 0, position, -1)
            tokens, context = _one_row_each(made, position, context, size)
            return tokens, context, jnp.where(last >= 0, jnp.arange(size.sequences), -1), pool, out, stopped

        state = (batch.tokens, batch.context, batch.last, pool, empty, jnp.bool_(False))
        *_, pool, out, _ = lax.while_loop(goes_on, step, state)
        return out, pool

    return forward


def _one_row_each(made: jax.Array, position: jax.Array, context: Paged, size: Size) -> tuple[jax.Array, Paged]:
    """The rows of a later step: row n is sequence n's new token, in an item of its own."""
    R, N = made.shape
    T, I, Q = size.rows, size.items, size.queries

    def rows(x, fill):
        return jnp.full((R, T), fill, jnp.int32).at[:, :N].set(x)

    every = np.arange(N, dtype=np.int32)
    items = np.full((R, I, Q), T, np.int32)
    items[:, :N, 0] = every
    context = Paged(rows(position, -1), rows(every, 0), context.page_table, jnp.asarray(items), rows(every * Q, 0))
    return rows(made, 0), context


def pack(plan: Plan, pages_per_sequence: int, page_size: int) -> Batch:
    """The arrays of a plan, for one replica (R = 1). Sequence n of the batch is chunk n of the plan."""
    T, N, I, Q = plan.size.rows, plan.size.sequences, plan.size.items, plan.size.queries
    tokens, sequences, places = (np.zeros((1, T), np.int32) for _ in range(3))
    positions, targets = (np.full((1, T), -1, np.int32) for _ in range(2))
    items, table = np.full((1, I, Q), T, np.int32), np.zeros((1, N, pages_per_sequence), np.int32)
    last, stop = np.full((1, N), -1, np.int32), np.full((1, N, STOPS), -1, np.int32)
    temperature, top_p = np.zeros((1, N), np.float32), np.ones((1, N), np.float32)
    top_k, seed = np.zeros((1, N), np.int32), np.zeros((1, N), np.uint32)
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
            temperature[0, n], top_k[0, n] = sampling.temperature, sampling.top_k
            top_p[0, n], seed[0, n] = sampling.top_p, request.seed
        row += chunk.count
        item += -(-chunk.count // Q)
    context = Paged(positions, sequences, table, items, places)  # type: ignore[arg-type]
    settings = Settings(temperature, top_k, top_p, seed)  # type: ignore[arg-type]
    steps, score = np.int32(plan.steps), np.bool_((targets >= 0).any())
    # Arrays of the host: jax takes them as they are, at the launch.
    return Batch(tokens, context, targets, last, stop, settings, steps, score)  # type: ignore[arg-type]


def empty_batch(size: Size, pages_per_sequence: int, page_size: int) -> Batch:
    """A batch of this size in which no row is used."""
    return pack(Plan(size, (), 1), pages_per_sequence, page_size)


def make_pool(model: Model, pages: int, page_size: int) -> Callable[[], Pool]:
    """Traceable: an empty pool for one replica."""
    L, K, h = model.config.n_layers, kv_heads(model), model.config.head_dim

    def pool() -> Pool:
        zeros = jnp.zeros((L, 1, pages, K, page_size, h), pool_dtype(model))
        return Pool(
            *(constrain(zeros, ("layers", "replica", "pages", "act_kv_heads", None, "head_dim")) for _ in range(2))
        )

    return pool


def page_bytes(model: Model, page_size: int) -> int:
    """Bytes that one page of the pool holds, over all layers and devices."""
    c = model.config
    return 2 * c.n_layers * kv_heads(model) * page_size * c.head_dim * pool_dtype(model).itemsize


def pool_dtype(model: Model) -> np.dtype:
    """Keys and values are kept as activations are; bfloat16 kernels on CPU: float32, which is what it is fast in."""
    return np.dtype(activation_dtype(model.dtype))


def kv_heads(model: Model) -> int:
    """Key/value heads as stored: the layout may pad them."""
    key = next(key for key in model.layout if key.endswith("attention.k.kernel"))
    return model.layout[key].shape[model.layout[key].axes.index("kv_heads")]
