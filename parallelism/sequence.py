"""Context parallelism: attention over rows whose tokens are split over the mesh axis ``context``.

Four ways to bring queries and keys together, behind one function (``attention``). n is the size of the axis, a piece
the tokens of one device:

all_gather   keys and values of all pieces on every device; their gradients are reduce-scattered
ring         keys and values travel round a ring, queries stay (Liu et al. 2023, Ring Attention)
token_ring   queries travel with their partial outputs, one half each way round, keys and values stay
             (Wang et al. 2024, TokenRing: both directions of a link are busy)
all_to_all   tokens are exchanged for heads, so that each device has all tokens of some heads (Jacobs et al. 2023,
             DeepSpeed-Ulysses)

Rows are laid out in ``balanced_order``: a device holds an early and a late chunk of a row, so that each has an equal
share of the causal triangle (Brandon et al. 2023, Striped Attention, has the argument); or as
``parallelism.balance`` arranges them, a device's own documents first. A pair of chunks in which no query sees a key is
skipped. The gradient is written here and not derived, so that what is kept for it is a piece of queries, keys, values
and outputs: memory a device falls as 1/n.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from parallelism.errors import UserError, unknown_name
from parallelism.manual import on_devices, scattered_sum
from parallelism.rules import Rules
from parallelism.sharding import current, spec_of

AXIS = "context"
Method = Literal["all_gather", "ring", "token_ring", "all_to_all"]
METHODS: tuple[Method, ...] = get_args(Method)

BLOCK = 1024
"""Tokens of a chunk at most: what bounds the scores that are alive at once."""

Tokens = Any
"""What tells tokens apart: a tree of [B, T] arrays, such as their documents and positions."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Attention between a block of queries and a block of keys. B rows, K key/value heads, G queries each, h head size.

    seen: (tokens of queries, tokens of keys) to [B, Q, S] bool, which keys a query sees; it may not depend on where
      in a block a token lies.
    forward: (q [B, Q, K, G, h], k and v [B, S, K, h], seen) to the output [B, Q, K, G, h], normalised over the keys of
      the block, and the logarithm of the normaliser [B, Q, K, G], both in at least float32. A query that sees
      nothing: zeros, and about -1e30.
    backward: (q, k, v, seen, normaliser, delta, g) to the gradients of q, k and v in the dtype of ``g``, for the
      normaliser over all keys and ``delta`` [B, Q, K, G], the sum of output times gradient.
    """

    seen: Callable[[Tokens, Tokens], jax.Array]
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def balanced_order(length: int, n: int) -> np.ndarray:
    """Which token of a row of ``length`` lies at each place, for ``n`` equal pieces: int64 [length].

    Cut into 2n chunks, piece i is chunk i and chunk 2n - 1 - i. Raises UserError unless 4n divides the length (a
    chunk must halve for ``token_ring``).
    """
    if length % (4 * n):
        raise UserError(
            f"rows of {length} tokens on {AXIS}={n}: the length must be a multiple of {4 * n}: change it or the mesh"
        )
    chunks = np.arange(length).reshape(2 * n, -1)
    return np.concatenate([chunks[[i, 2 * n - 1 - i]].ravel() for i in range(n)])


def check_rule(mesh: Mesh, rules: Rules) -> None:
    """Raises UserError where the mesh splits rows and the rule of ``seq`` does not, or over another axis."""
    over = [axis for axis in rules["seq"].mesh_axes if mesh.shape[axis] > 1]
    if mesh.shape[AXIS] > 1 and over != [AXIS]:
        raise UserError(
            f"{rules.name} rule seq={rules['seq']} on a mesh with {AXIS}={mesh.shape[AXIS]}: attention splits rows "
            f"over {AXIS} and nothing else: expected seq={AXIS}, or leave {AXIS} out of the mesh"
        )


def pieces() -> int:
    """How many pieces the active context's mesh splits a row into; 1 without a context."""
    context = current()
    return 1 if context is None else context.mesh.shape[AXIS]


def earlier(counts: jax.Array) -> jax.Array:
    """For each token of rows that are split over ``context`` in ``balanced_order``, the sum of ``counts`` [B, T / n,
    ...] over the row's earlier tokens, wherever they are: on each device, inside shard_map."""
    B, t = counts.shape[:2]
    chunks = counts.reshape(B, 2, t // 2, *counts.shape[2:])
    within = jnp.cumsum(chunks, 2, dtype=counts.dtype) - chunks
    totals = lax.all_gather(chunks.sum(2, dtype=counts.dtype), AXIS, axis=1)  # [B, n, 2, ...]
    in_order = jnp.concatenate([totals[:, :, 0], totals[:, ::-1, 1]], axis=1)
    before = jnp.cumsum(in_order, 1, dtype=counts.dtype) - in_order
    place = lax.axis_index(AXIS)
    mine = jnp.stack([place, in_order.shape[1] - 1 - place])
    return (within + before[:, mine][:, :, None]).reshape(counts.shape)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens, block: Block, method: Method, own: int = 0
) -> jax.Array:
    """``block`` over all pairs of tokens: [B, T, K, G, h], in the dtype of q; traceable, differentiable in q, k, v.

    q: [B, T, K, G, h]; k, v: [B, T, K, h]; tokens: a tree of [B, T]; T split over
    ``context``, in ``balanced_order`` or as ``parallelism.balance`` arranges them; the rest as the active
    ``sharding_context`` says. Heads need not divide by ``context``.
    own: so many tokens of each device, its first, see only one another, and nothing of them is sent.
    Raises UserError for a method that there is not.
    """
    if method not in METHODS:
        raise unknown_name("context-parallel method", method, METHODS)
    context = current()
    assert context is not None, "context parallelism needs a sharding_context"
    mesh = context.mesh
    check_rule(mesh, context.rules)
    rows = spec_of(q.shape[:2], ("batch", "seq"))
    heads = spec_of(k.shape, ("batch", "seq", "act_kv_heads", None))
    grouped = PartitionSpec(*heads[:3], None, None)
    if rows[1] != AXIS:
        raise UserError(
            f"rows of {q.shape[1]} tokens do not divide over {AXIS}={mesh.shape[AXIS]}: change their length or the mesh"
        )
    local = partial(_local, block=block, method=method, n=mesh.shape[AXIS], own=own)
    return on_devices(local, (grouped, heads, heads, jax.tree.map(lambda _: rows, tokens)), grouped)(q, k, v, tokens)


def _local(q, k, v, tokens, *, block: Block, method: Method, n: int, own: int):
    """One device's share, inside shard_map."""
    ways = {
        "all_gather": (_gather_forward, _gather_backward),
        "ring": (_ring_forward, _ring_backward),
        "token_ring": (_token_ring_forward, _token_ring_backward),
        "all_to_all": (_exchange_forward, _exchange_backward),
    }
    out = []
    for part, way in ((slice(own), (_own_forward, _own_backward)), (slice(own, None), ways[method])):
        arrays = jax.tree.map(lambda a, part=part: a[:, part], (q, k, v, tokens))
        if arrays[0].size:
            out.append(_paired(block, n, way, arrays))
    return jnp.concatenate(out, axis=1)


def _paired(block: Block, n: int, way: tuple[Callable, Callable], arrays: tuple):
    """Attention among the tokens of ``arrays`` (q, k, v, tokens), which ``way`` brings together."""
    forward, backward = way

    @jax.custom_vjp
    def attend(q, k, v, tokens):
        return attend_forward(q, k, v, tokens)[0]

    def attend_forward(q, k, v, tokens):
        # Without this bond JAX sees that masks are the same in every layer, and keeps those of all pairs of chunks.
        q, tokens = lax.optimization_barrier((q, tokens))
        out, normaliser = forward(block, n, q, k, v, tokens)
        return out.astype(q.dtype), (q, k, v, tokens, out, normaliser)

    def attend_backward(saved, g):
        q, k, v, tokens, out, normaliser = saved
        g, tokens = lax.optimization_barrier((g.astype(out.dtype), tokens))
        dq, dk, dv = backward(block, n, q, k, v, tokens, normaliser, (g * out).sum(-1), g)
        zero = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tokens)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), zero

    attend.defvjp(attend_forward, attend_backward)
    return attend(*arrays)


# -------------------------------------------------------------------------------------------------- pairs of chunks


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] to [T / size, B, size, ...]"""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _whole(chunks: jax.Array) -> jax.Array:
    """The inverse of ``_chunks``."""
    return jnp.moveaxis(chunks, 0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])


def _size(tokens: int) -> int:
    """The size of the chunks in which a run of ``tokens`` is gone through."""
    return next(n for n in range(min(tokens, BLOCK), 0, -1) if tokens % n == 0)


def _split(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda a: _chunks(a, size), tree)


def _join(tree: Any) -> Any:
    return jax.tree.map(_whole, tree)


def _nothing(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The result of attention to no key."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.zeros(q.shape, wide), jnp.full(q.shape[:-1], -1e30, wide)


def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The result over two disjoint sets of keys."""
    (a_out, a_log), (b_out, b_log) = a, b
    log = jnp.logaddexp(a_log, b_log)
    return a_out * jnp.exp(a_log - log)[..., None] + b_out * jnp.exp(b_log - log)[..., None], log


def _visit(block: Block, size: int, state, q, q_tokens, k, v, k_tokens):
    """``state`` (output and normaliser of q) with the keys of k added, in pairs of chunks of ``size`` tokens."""
    queries = _split((q, q_tokens, state), size)

    def add(queries, keys):
        k, v, k_tokens = keys

        def one(state, q, q_tokens):
            seen = block.seen(q_tokens, k_tokens)
            return lax.cond(seen.any(), lambda: _merge(state, block.forward(q, k, v, seen)), lambda: state)

        q, q_tokens, state = queries
        state = lax.map(lambda each: one(each[2], each[0], each[1]), queries)
        return (q, q_tokens, state), None

    (_, _, state), _ = lax.scan(add, queries, _split((k, v, k_tokens), size))
    return _join(state)


def _visit_gradients(block: Block, size: int, queries, keys):
    """Gradients of q, k and v, in pairs of chunks, from these queries (q, tokens, normaliser, delta, g) and keys (k, v,
    tokens)."""
    queries, keys, g = _split(queries, size), _split(keys, size), queries[-1]

    def over_keys(dq, keys):
        k, v, k_tokens = keys
        zero = jnp.zeros(k.shape, g.dtype), jnp.zeros(v.shape, g.dtype)

        def over_queries(sums, each):
            (q, q_tokens, normaliser, delta, g), dq = each
            seen = block.seen(q_tokens, k_tokens)

            def run():
                one = block.backward(q, k, v, seen, normaliser, delta, g)
                return (sums[0] + one[1], sums[1] + one[2]), dq + one[0]

            return lax.cond(seen.any(), run, lambda: (sums, dq))

        sums, dq = lax.scan(over_queries, zero, (queries, dq))
        return dq, sums

    dq, (dk, dv) = lax.scan(over_keys, jnp.zeros(queries[0].shape, g.dtype), keys)
    return _whole(dq), _whole(dk), _whole(dv)


# ------------------------------------------------------------------------------------------------------ one device


def _own_forward(block, n, q, k, v, tokens):
    return _visit(block, _size(q.shape[1] // 2), _nothing(q), q, tokens, k, v, tokens)


def _own_backward(block, n, q, k, v, tokens, normaliser, delta, g):
    return _visit_gradients(block, _size(q.shape[1] // 2), (q, tokens, normaliser, delta, g), (k, v, tokens))


# ------------------------------------------------------------------------------------------------------- all-gather


def _gathered(tree: Any) -> Any:
    return jax.tree.map(lambda a: lax.all_gather(a, AXIS, axis=1, tiled=True), tree)


def _gather_forward(block, n, q, k, v, tokens):
    return _visit(block, _size(q.shape[1] // 2), _nothing(q), q, tokens, *_gathered((k, v, tokens)))


def _gather_backward(block, n, q, k, v, tokens, normaliser, delta, g):
    everything = _gathered((k, v, tokens))
    dq, dk, dv = _visit_gradients(block, _size(q.shape[1] // 2), (q, tokens, normaliser, delta, g), everything)
    dk, dv = (scattered_sum(d, AXIS, 1) for d in (dk, dv))
    return dq, dk, dv


# ------------------------------------------------------------------------------------------------------------ rings


def _send(tree: Any, n: int, step: int = 1) -> Any:
    """To the neighbour ``step`` further on."""
    pairs = [(i, (i + step) % n) for i in range(n)]
    return jax.tree.map(lambda a: lax.ppermute(a, AXIS, pairs), tree)


def _ring_forward(block, n, q, k, v, tokens):
    size = _size(q.shape[1] // 2)

    def step(carry, _):
        keys, state = carry
        # The next keys are under way while these are used.
        return (_send(keys, n), _visit(block, size, state, q, tokens, *keys)), None

    (keys, state), _ = lax.scan(step, ((k, v, tokens), _nothing(q)), length=n - 1)
    return _visit(block, size, state, q, tokens, *keys)


def _ring_backward(block, n, q, k, v, tokens, normaliser, delta, g):
    size = _size(q.shape[1] // 2)

    def step(carry, _):
        keys, sums, dq = carry
        more, *own = _visit_gradients(block, size, (q, tokens, normaliser, delta, g), keys)
        sums = jax.tree.map(jnp.add, sums, tuple(own))
        # Sums travel with their keys and are home after n steps.
        return (_send(keys, n), _send(sums, n), dq + more), None

    zero = jnp.zeros(k.shape, g.dtype), jnp.zeros(v.shape, g.dtype)
    (_, sums, dq), _ = lax.scan(step, ((k, v, tokens), zero, jnp.zeros(q.shape, g.dtype)), length=n)
    return dq, *sums


def _halves(tree: Any) -> tuple[Any, Any]:
    """Every second token, and the others: each half has as much of both chunks."""
    return jax.tree.map(lambda a: a[:, ::2], tree), jax.tree.map(lambda a: a[:, 1::2], tree)


def _zip(a: Any, b: Any) -> Any:
    """The inverse of ``_halves``."""
    return jax.tree.map(lambda x, y: jnp.stack([x, y], 2).reshape(x.shape[0], -1, *x.shape[2:]), a, b)


def _token_ring_forward(block, n, q, k, v, tokens):
    def step(carry, _):
        def visited(half):
            q, q_tokens, state = half
            return q, q_tokens, _visit(block, _size(q.shape[1] // 2), state, q, q_tokens, k, v, tokens)

        there, back = (visited(half) for half in carry)
        return (_send(there, n), _send(back, n, -1)), None

    (there, back), _ = lax.scan(step, _halves((q, tokens, _nothing(q))), length=n)
    return _zip(there[2], back[2])


def _token_ring_backward(block, n, q, k, v, tokens, normaliser, delta, g):
    def step(carry, _):
        halves, sums = carry

        def visited(half):
            queries, dq = half
            more, *own = _visit_gradients(block, _size(queries[0].shape[1] // 2), queries, (k, v, tokens))
            return (queries, dq + more), tuple(own)

        (there, first), (back, second) = (visited(half) for half in halves)
        sums = jax.tree.map(lambda *parts: sum(parts), sums, first, second)
        return ((_send(there, n), _send(back, n, -1)), sums), None

    queries = (q, tokens, normaliser, delta, g)
    zero = jnp.zeros(k.shape, g.dtype), jnp.zeros(v.shape, g.dtype)
    (halves, sums), _ = lax.scan(step, (_halves((queries, jnp.zeros(q.shape, g.dtype))), zero), length=n)
    return _zip(halves[0][1], halves[1][1]), *sums


# ------------------------------------------------------------------------------------------------------- all-to-all


def _regrouped(n: int, K: int, G: int) -> tuple[int, int]:
    """(copies of each key/value head, zero heads to add) so that the key/value heads divide by n."""
    copies = n // math.gcd(K, n)
    return (copies, 0) if G % copies == 0 else (1, -K % n)


def _to_heads(x: jax.Array, n: int, G: int) -> jax.Array:
    """[B, T/n, K, ...] to [B, T, K'/n, ...]: all tokens of some heads, G queries each."""
    copies, zeros = _regrouped(n, x.shape[2], G)
    x = jnp.repeat(x, copies, axis=2)
    x = jnp.pad(x, [(0, zeros if i == 2 else 0) for i in range(x.ndim)])
    return lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)


def _queries_to_heads(x: jax.Array, n: int) -> jax.Array:
    """[B, T/n, K, G, ...] to [B, T, K'/n, G', ...], a group of queries cut where its key/value head is copied."""
    B, T, K, G = x.shape[:4]
    copies, _ = _regrouped(n, K, G)
    x = x.reshape(B, T, K * copies, G // copies, *x.shape[4:])
    zeros = -x.shape[2] % n
    x = jnp.pad(x, [(0, zeros if i == 2 else 0) for i in range(x.ndim)])
    return lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)


def _queries_to_tokens(x: jax.Array, K: int, G: int) -> jax.Array:
    """The inverse of ``_queries_to_heads``."""
    x = lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, tiled=True)
    x = x[:, :, : K * G // x.shape[3]]
    return x.reshape(*x.shape[:2], K, G, *x.shape[4:])


def _keys_to_tokens(x: jax.Array, K: int, copies: int) -> jax.Array:
    """Gradients of ``_to_heads``: copies are summed, zero heads dropped."""
    x = lax.all_to_all(x, AXIS, split_axis=1, concat_axis=2, tiled=True)[:, :, : K * copies]
    return x.reshape(*x.shape[:2], K, copies, *x.shape[3:]).sum(3)


def _exchange_forward(block, n, q, k, v, tokens):
    size, (K, G) = _size(q.shape[1] // 2), q.shape[2:4]
    everyone = _gathered(tokens)
    keys = (_to_heads(k, n, G), _to_heads(v, n, G), everyone)
    queries = _queries_to_heads(q, n)
    out, normaliser = _visit(block, size, _nothing(queries), queries, everyone, *keys)
    return _queries_to_tokens(out, K, G), _queries_to_tokens(normaliser, K, G)


def _exchange_backward(block, n, q, k, v, tokens, normaliser, delta, g):
    size, (K, G) = _size(q.shape[1] // 2), q.shape[2:4]
    copies, _ = _regrouped(n, K, G)
    everyone = _gathered(tokens)
    queries = (_queries_to_heads(q, n), everyone, *(_queries_to_heads(a, n) for a in (normaliser, delta, g)))
    keys = (_to_heads(k, n, G), _to_heads(v, n, G), everyone)
    dq, dk, dv = _visit_gradients(block, size, queries, keys)
    return _queries_to_tokens(dq, K, G), _keys_to_tokens(dk, K, copies), _keys_to_tokens(dv, K, copies)
