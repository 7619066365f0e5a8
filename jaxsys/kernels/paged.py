"""Attention over pages of a pool, and the writes into it: one function, and the form that each platform takes.

XLA's (``reference``) on CPU, Pallas kernels on TPU and GPU: docs/kernels.md says why. Every form is a running softmax
(Milakov and Gimelshein 2018) over blocks of keys that begin at fixed positions of a sequence: a block with no key of a
row changes nothing in it, so a row's result depends neither on what else is in the batch nor on where its pages lie.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxsys.kernels import paged_gpu, paged_tpu
from jaxsys.kernels.alike import LEAST_ROWS, alike
from jaxsys.kernels.masked import NEVER, cap
from jaxsys.kernels.paged_tpu import LANES
from parallelism.manual import on_devices
from parallelism.sharding import current, platform, spec_of

BLOCK_KEYS = 256  # of keys that ``reference`` takes at once
PAGES = ("replica", "layers", "pages", "act_kv_heads", None, "head_dim")  # the logical axes of a pool's keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """Token rows of many sequences, keys and values in pages. R replicas, each with pages of its own.

    positions: [R, T] int32 position of each row in its sequence, -1 for an unused row.
    sequences: [R, T] int32, the sequence (0..N-1) of each row.
    page_table: [R, N, C] int32, the page that holds positions c*page_size ... of a sequence.
    items: tables [R, I, Q] int32 of rows grouped by sequence: an item's rows all belong to one sequence; T means none.
    A used row is in one item of one table; used items of a table come before others.
    places: [R, T] int32, where each used row is in its replica's items, those of one table after those of another.
    """

    positions: jax.Array
    sequences: jax.Array
    page_table: jax.Array
    items: tuple[jax.Array, ...]
    places: jax.Array

    @property
    def used(self) -> jax.Array:
        """[R, T] bool, False for unused rows."""
        return self.positions >= 0

    def slots(self, page_size: int) -> tuple[jax.Array, jax.Array]:
        """Where each row's keys and values lie: page (0 for unused rows) and place in it, [R, T] each."""
        slot = jnp.where(self.used, self.positions, 0)
        pages = jax.vmap(lambda table, row, page: table[row, page])(self.page_table, self.sequences, slot // page_size)
        return jnp.where(self.used, pages, 0), slot % page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
    """Keys and values of all layers: [R, L, P, K, page_size, h] each. Page 0 takes the writes of unused rows.

    On TPU some heads may lie side by side, see ``heads_side_by_side``: [R, L, P, K / n, page_size, width].
    tokens: [R, 1, P, page_size] int32, whose they are.
    Heads come before positions, so that a page is what a batched matmul over heads reads, without a transpose.
    """

    k: jax.Array
    v: jax.Array
    tokens: jax.Array


def heads_side_by_side(heads: int, head_dim: int) -> tuple[int, int]:
    """How many heads of a device share a row of the pool, and the row's width.

    One, as wide as it is, but on TPU: there a row takes a multiple of ``LANES`` elements in memory whatever it holds,
    and arrays whose rows do not fill them are laid out by XLA in another order, which every launch would have to undo.
    """
    if platform() != "tpu":
        return 1, head_dim
    together = max(n for n in range(1, max(LANES // head_dim, 1) + 1) if heads % n == 0)
    return together, -(-together * head_dim // LANES) * LANES


def attend_pages(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Paged,
    pool: Pool,
    *,
    layer: jax.Array | int,
    window: jax.Array | int | None,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, Pool]:
    """Writes k and v [R, T, K, h] to the pool, then attends with q [R, T, H, h]: [R, T, H, h], and the pool."""

    def run(q, k, v, context, keys, values, layer, window):
        options = {"layer": layer, "window": window, "scale": scale, "softcap": softcap}
        return _on_one_device(q, k, v, context, keys, values, **options)

    if platform() != "cpu" and current() is not None:  # a kernel is not split by the compiler
        pages = spec_of(pool.k.shape, PAGES)
        rows = PartitionSpec(pages[0], None, pages[3], None)
        specs = (rows, rows, rows, PartitionSpec(pages[0]), pages, pages, PartitionSpec(), PartitionSpec())
        layer = jnp.asarray(layer, jnp.int32)
        run = on_devices(run, specs, (rows, pages, pages))
    out, keys, values = run(q, k, v, context, pool.k, pool.v, layer, window)
    return out, dataclasses.replace(pool, k=keys, v=values)


def _on_one_device(q, k, v, context, keys, values, *, layer, window, scale, softcap):
    """What ``attend_pages`` does, over the replicas and heads of a device: the output, keys and values."""
    pages, place = context.slots(keys.shape[4])
    (R, T, K, h), (rows_of_heads, width) = k.shape, (keys.shape[3], keys.shape[5])
    together = K // rows_of_heads

    def write(pool, pages, place, new):
        """pool [L, P, K, page, h], new [T, K, h]."""
        if platform() != "tpu":
            return pool.at[layer, pages, :, place].set(new)
        # A row of one head at a time: for anything wider XLA would turn the whole pool about, and back.
        return pool.at[layer, pages[:, None], jnp.arange(rows_of_heads), place[:, None]].set(new)

    def written(pool, new):
        new = new.astype(pool.dtype).reshape(R, T, rows_of_heads, together * h)
        # One replica at a time, so that those of other devices are not asked for.
        return jax.vmap(write)(pool, pages, place, _widened(new, width))

    keys, values = written(keys, k), written(values, v)
    forms: dict[str, Callable] = {"cpu": reference, "gpu": paged_gpu.attend, "tpu": paged_tpu.attend}
    options = {"window": window, "scale": scale, "softcap": softcap}
    return attend_written(q, context, keys, values, layer, together, forms[platform()], **options), keys, values


def attend_written(q, context, keys, values, layer, together: int, form: Callable, **options: Any) -> jax.Array:
    """q [R, T, H, h] over what the pool holds, by a form: [R, T, H, h]. together: heads of the pool in a row of it."""
    if form is reference:
        return _by_blocks(q, context, keys, values, layer, together, options)
    R, _, H, h = q.shape
    each, found = jnp.arange(R, dtype=jnp.int32)[:, None], []
    items_of = partial(_items_of, like=keys, together=together)
    for items in context.items:
        # A kernel sees replicas as items, sequences and layers of their own: one launch, and the pool as it is.
        queries, at, sequences = jax.vmap(items_of)(q, context, items)
        sequences, layers = sequences + each * context.page_table.shape[1], layer + each * keys.shape[1]
        layers = jnp.broadcast_to(layers, sequences.shape)
        merged = map(_merged, (queries, at, sequences, layers, context.page_table, keys, values))
        out = form(*merged, **options)
        found.append(out.reshape(R, -1, 1, *out.shape[2:]))

    def rows_of(out, places):
        return _own(out, together, h).reshape(-1, H, h)[places].astype(q.dtype)

    return jax.vmap(rows_of)(jnp.concatenate(found, 1), context.places)


def _by_blocks(q, context, keys, values, layer, together: int, options: dict[str, Any]) -> jax.Array:
    """``attend_written`` by ``reference``, a few items at a time: those that are not used cost nothing."""
    _, T, H, h = q.shape
    items_of = partial(_items_of, like=keys, together=together)

    def block_of(items, reach, out, q, context, keys, values):
        """The rows of one replica's items [each, Q] go to out [T, H, h]."""
        queries, at, sequences = items_of(q, context, items)
        o = reference(queries, at, sequences, context.page_table, keys, values, layer, reach, **options)
        return out.at[items].set(_own(o, together, h).reshape(*items.shape, H, h).astype(out.dtype), mode="drop")

    def table(out, items):
        blocks = _blocks(items, _items_together(items.shape[2]), T)
        at = jax.vmap(lambda row, positions: jnp.where(row < T, positions[jnp.minimum(row, T - 1)], -1))
        reaches = at(blocks, context.positions).max((0, 2, 3))  # over all replicas: one loop, not one for each
        used = jnp.where(reaches >= 0, jnp.arange(1, len(reaches) + 1), 0).max()
        run = jax.vmap(block_of, in_axes=(0, None, 0, 0, 0, 0, 0))
        return lax.fori_loop(0, used, lambda n, out: run(blocks[:, n], reaches[n], out, q, context, keys, values), out)

    return functools.reduce(table, context.items, jnp.zeros_like(q))


def _items_of(q, context, items, *, like, together: int):
    """Of one replica, for a pool like this: queries [I, Q, K / together, together * G, width], their positions [I, Q]
    (-1: none) and sequences [I]."""
    (T, H, h), K = q.shape, like.shape[3] * together
    row = jnp.minimum(items, T - 1)
    queries = q[row].astype(like.dtype).reshape(*items.shape, K, H // K, h)
    at = jnp.where(items < T, context.positions[row], -1)
    return _aside(queries, together, like.shape[5]), at, context.sequences[row[:, 0]]


def _merged(a):
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def _widened(a, width: int):
    return a if a.shape[-1] == width else jnp.pad(a, ((0, 0),) * (a.ndim - 1) + ((0, width - a.shape[-1]),))


def _aside(queries, together: int, width: int):
    """queries [I, Q, K, G, h] against rows of ``together`` heads, [I, Q, K / together, together * G, width]: each has
    zeros where other heads lie."""
    I, Q, K, G, h = queries.shape
    if together > 1:
        queries = queries.reshape(I, Q, K // together, together, G, 1, h)
        mine = jnp.eye(together, dtype=bool)[:, None, :, None]
        queries = jnp.where(mine, queries, 0).reshape(I, Q, K // together, together * G, together * h)
    return _widened(queries, width)


def _own(out, together: int, h: int):
    """Of an output [I, Q, K / together, together * G, width] the part of each head, [I, Q, K, G, h] or alike."""
    if together == 1:
        return out[..., :h]
    I, Q, K, G, _ = out.shape
    out = out[..., : together * h].reshape(I, Q, K, together, G // together, together, h)
    return jnp.stack([out[:, :, :, n, :, n] for n in range(together)], 3).reshape(I, Q, K, G, h)


def _items_together(queries: int) -> int:
    """How many items of so many queries ``reference`` takes at once: two cores have something to do, caches hold their
    keys, and little of the last block is for nothing."""
    return min(max(64 // queries, 2), 16)


def _pages_together(queries: int, page: int) -> int:
    """How many pages an item of so many queries takes at once: what is rescaled after each block is worth 64 keys, but
    a single query reads keys for nothing where its sequence is shorter."""
    return 1 if queries == 1 or alike() else max(min(2 * max(queries, 64), BLOCK_KEYS) // page, 1)


def _blocks(items: jax.Array, each: int, none: int) -> jax.Array:
    """Items [R, I, Q] in blocks [R, blocks, each, Q] of ``each`` of them (fewer, if there is but one block)."""
    each = min(each, items.shape[1])
    more = ((0, 0), (0, -items.shape[1] % each), (0, 0))
    return jnp.pad(items, more, constant_values=none).reshape(items.shape[0], -1, each, items.shape[2])


def reference(queries, at, sequences, page_table, keys, values, layer, reach, *, window, scale, softcap):
    """queries [I, Q, K, G, h] at positions ``at`` [I, Q] (-1: none) of ``sequences`` [I], whose pages of keys and
    values [L, P, K, page, h] are in ``page_table`` [N, C]: [I, Q, K, G, h] in at least float32, zeros for no query.

    Goes through the pages of all items together, as far as ``reach``, the last position of any (-1: there is none).
    """
    I, Q, K, G, h = queries.shape
    page, dtype = keys.shape[3], keys.dtype
    together = _pages_together(Q, page)
    block = together * page
    table = page_table[sequences]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % together)))
    last = at.max(-1)[:, None]
    accumulate = jnp.promote_types(dtype, jnp.float32)
    queries = queries.transpose(0, 2, 3, 1, 4).reshape(I, K, G * Q, h)

    def read(pool, pages):
        """Pages of each item, one after the other: [I, K, block, h]."""
        return pool[layer, pages].transpose(0, 2, 1, 3, 4).reshape(I, K, block, h)

    def product(dimensions, a, b):
        more = LEAST_ROWS - G * Q if alike() else 0
        a = jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))) if more > 0 else a
        return jnp.einsum(dimensions, a, b, preferred_element_type=accumulate)[:, :, : G * Q]

    def some_pages(c, state):
        top, total, out = state
        pages = lax.dynamic_slice_in_dim(table, c * together, together, 1)
        k, v = read(keys, pages), read(values, pages)
        s = product("nkqh,nksh->nkqs", queries, k)
        s = cap(s * scale, softcap).reshape(I, K, G, Q, block)
        key_at = c * block + jnp.arange(block)
        # A page may hold anything where its sequence has not come: zero weight times NaN would be NaN.
        v = jnp.where((key_at[None, :] <= last)[:, None, :, None], v, 0)
        seen = key_at[None, None, :] <= at[:, :, None]
        if window is not None:
            seen &= at[:, :, None] - key_at[None, None, :] < window
        s = jnp.where(seen[:, None, None], s, NEVER)
        new = jnp.maximum(top, s.max(-1))
        p = jnp.exp(s - new[..., None])  # 0 where masked, as the largest so far is never NEVER
        shrink = jnp.exp(top - new)
        o = product("nkqs,nksh->nkqh", p.reshape(I, K, G * Q, block).astype(dtype), v)
        return new, total * shrink + p.sum(-1), out * shrink[..., None] + o.reshape(I, K, G, Q, h)

    start = (
        jnp.full((I, K, G, Q), NEVER / 2, accumulate),
        jnp.zeros((I, K, G, Q), accumulate),
        jnp.zeros((I, K, G, Q, h), accumulate),
    )
    _, total, out = lax.fori_loop(0, reach // block + 1, some_pages, start)  # -1 // block is -1
    return (out / jnp.maximum(total, 1e-30)[..., None]).transpose(0, 3, 1, 2, 4)
