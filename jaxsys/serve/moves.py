"""Pages of the pool copied within it, taken out to host memory, and brought back in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.graphs import Graph, Graphs
from jaxsys.kernels.attention import Pool
from jaxsys.serve.pages import Move

# Pages that one launch moves; what is not needed of it moves page 0 onto itself.
AT_ONCE = 8


class Mover:
    """Carries out moves. Compiles its graphs in the constructor; those of host memory only if there are ``slots``."""

    def __init__(self, graphs: Graphs, pool: Pool, slots: int):
        everywhere = None if graphs.mesh is None else NamedSharding(graphs.mesh, PartitionSpec())
        numbers = jax.ShapeDtypeStruct((AT_ONCE,), np.dtype("int32"), sharding=everywhere)
        laid = None if everywhere is None else jax.tree.map(lambda a: a.sharding, pool)
        self._copy = graphs.compile("kv_copy", _copy, pool, numbers, numbers, donate=(0,), out_shardings=laid)
        self._out: Graph | None = None
        if slots:
            self._out = graphs.compile("kv_out", _out, pool, numbers)
            some = self._out.outputs
            self._in = graphs.compile("kv_in", _in, pool, numbers, some, donate=(0,), out_shardings=laid)
            # Pages first, so that one is one piece of memory. Touched when it is used, not before.
            self._host = jax.tree.map(lambda a: np.empty((slots, *np.delete(a.shape, 2)), a.dtype), some)
        self._leaving: list[tuple[list[int], Any]] = []

    @property
    def host_bytes(self) -> int:
        """What host memory may come to hold."""
        return sum(a.nbytes for a in jax.tree.leaves(self._host)) if self._out else 0

    def launch(self, pool: Pool, moves: Sequence[Move]) -> Pool:
        """Launches moves, in order; on the dispatcher's thread. The pool is donated."""
        for kind, group in groupby(moves, key=lambda move: move.kind):
            some = list(group)
            while some:
                n = _independent(some)
                now, some = some[:n], some[n:]
                sources, targets = [move.source for move in now], [move.target for move in now]
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

            def keep(host: np.ndarray, array: jax.Array, slots: list[int] = slots) -> None:
                host[slots] = np.moveaxis(np.asarray(array), 2, 0)[: len(slots)]

            jax.tree.map(keep, self._host, taken)
        self._leaving = []

    def _from_host(self, slots: list[int]) -> Pool:
        def some(host: np.ndarray) -> np.ndarray:
            out = np.zeros((AT_ONCE, *host.shape[1:]), host.dtype)
            out[: len(slots)] = host[slots]
            return np.moveaxis(out, 0, 2)

        return jax.tree.map(some, self._host)


def _independent(moves: Sequence[Move]) -> int:
    """How many of these, from the first, do not read or write what one of them writes."""
    written: set[int] = set()
    for i, move in enumerate(moves[:AT_ONCE]):
        if move.target in written or (move.kind == "copy" and move.source in written):
            return i
        written.add(move.target)
    return min(len(moves), AT_ONCE)


def _numbers(values: Sequence[int]) -> np.ndarray:
    return np.array([*values, *[0] * (AT_ONCE - len(values))], np.int32)


def _copy(pool: Pool, sources: jax.Array, targets: jax.Array) -> Pool:
    return jax.tree.map(lambda a: a.at[:, :, targets].set(a[:, :, sources]), pool)


def _out(pool: Pool, pages: jax.Array) -> Pool:
    return jax.tree.map(lambda a: jnp.take(a, pages, axis=2), pool)


def _in(pool: Pool, pages: jax.Array, some: Pool) -> Pool:
    return jax.tree.map(lambda a, b: a.at[:, :, pages].set(b), pool, some)
