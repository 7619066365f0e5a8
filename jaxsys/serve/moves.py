"""Pages of the pool copied within it, taken out to host memory, and brought back in; each replica's by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.graphs import Graph, Graphs
from jaxsys.kernels.attention import Pool
from jaxsys.serve.pages import Move

# Pages of a replica that one launch moves; what is not needed of it moves page 0 onto itself.
AT_ONCE = 8


class Mover:
    """Carries out moves. Compiles its graphs in the constructor; those of host memory only if there are ``slots``.

    pool: shapes and shardings, arrays [R, ..., pages, ...]. slots: of each replica.
    """

    def __init__(self, graphs: Graphs, pool: Pool, slots: int):
        everywhere = None if graphs.mesh is None else NamedSharding(graphs.mesh, PartitionSpec())
        self._replicas = pool.tokens.shape[0]
        numbers = jax.ShapeDtypeStruct((self._replicas, AT_ONCE), np.dtype("int32"), sharding=everywhere)
        laid = None if everywhere is None else jax.tree.map(lambda a: a.sharding, pool)
        self._copy = graphs.compile(
            "kv_copy", _copy, pool, numbers, numbers, donate=(0,), out_shardings=laid, made_of=()
        )
        self._out: Graph | None = None
        if slots:
            self._out = graphs.compile("kv_out", _out, pool, numbers, made_of=())
            some = self._out.outputs
            self._in = graphs.compile("kv_in", _in, pool, numbers, some, donate=(0,), out_shardings=laid, made_of=())
            # A page is one piece of memory, [replica, slot, ...]; touched when it is used, not before.
            self._host = jax.tree.map(lambda a: np.empty((a.shape[0], slots, a.shape[1], *a.shape[3:]), a.dtype), some)
        self._leaving: list[tuple[list[list[int]], Any]] = []

    @property
    def host_bytes(self) -> int:
        """What host memory may come to hold."""
        return sum(a.nbytes for a in jax.tree.leaves(self._host)) if self._out else 0

    def launch(self, pool: Pool, moves: Sequence[Sequence[Move]]) -> Pool:
        """Launches the moves of each replica, in order; on the dispatcher's thread. The pool is donated."""
        left = [list(each) for each in moves]
        while any(left):
            kind = next(each[0].kind for each in left if each)
            now = [each[: _together(each, kind)] for each in left]
            left = [each[len(some) :] for each, some in zip(left, now, strict=True)]
            sources = [[move.source for move in some] for some in now]
            targets = [[move.target for move in some] for some in now]
            if kind == "copy":
                pool = self._copy(pool, _numbers(sources), _numbers(targets))
            elif kind == "out":
                assert self._out is not None
                taken = self._out(pool, _numbers(sources))
                jax.tree.map(lambda a: a.copy_to_host_async(), taken)
                self._leaving.append((targets, taken))
            else:
                self.settle()
                pool = self._in(pool, _numbers(targets), self._from_host(sources))
        return pool

    def settle(self) -> None:
        """Waits until what was taken out is in host memory."""
        for slots, taken in self._leaving:

            def keep(host: np.ndarray, array: jax.Array, slots: list[list[int]] = slots) -> None:
                pages = np.moveaxis(np.asarray(array), 2, 1)
                for replica, some in enumerate(slots):
                    host[replica, some] = pages[replica, : len(some)]

            jax.tree.map(keep, self._host, taken)
        self._leaving = []

    def _from_host(self, slots: list[list[int]]) -> Pool:
        def some(host: np.ndarray) -> np.ndarray:
            out = np.zeros((host.shape[0], AT_ONCE, *host.shape[2:]), host.dtype)
            for replica, wanted in enumerate(slots):
                out[replica, : len(wanted)] = host[replica, wanted]
            return np.moveaxis(out, 1, 2)

        return jax.tree.map(some, self._host)


def _together(moves: Sequence[Move], kind: str) -> int:
    """How many of these, from the first, are of a kind and do not read or write what one of them writes."""
    written: set[int] = set()
    for i, move in enumerate(moves[:AT_ONCE]):
        if move.kind != kind or move.target in written or (kind == "copy" and move.source in written):
            return i
        written.add(move.target)
    return min(len(moves), AT_ONCE)


def _numbers(values: list[list[int]]) -> np.ndarray:
    return np.array([[*some, *[0] * (AT_ONCE - len(some))] for some in values], np.int32)


def _copy(pool: Pool, sources: jax.Array, targets: jax.Array) -> Pool:
    copy = jax.vmap(lambda a, source, target: a.at[:, target].set(a[:, source]))
    return jax.tree.map(lambda a: copy(a, sources, targets), pool)


def _out(pool: Pool, pages: jax.Array) -> Pool:
    return jax.tree.map(lambda a: jax.vmap(lambda a, pages: jnp.take(a, pages, axis=1))(a, pages), pool)


def _in(pool: Pool, pages: jax.Array, some: Pool) -> Pool:
    put = jax.vmap(lambda a, pages, b: a.at[:, pages].set(b))
    return jax.tree.map(lambda a, b: put(a, pages, b), pool, some)
