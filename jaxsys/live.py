"""The one place where weights live: a versioned reference to the parameters.

The trainer publishes, the server leases. A lease covers dispatch only: it is taken and used in one piece of
work of the dispatcher, so the trainer may donate the arrays in the next; a program in flight keeps its
buffers. Policy: ``switch`` - whoever leases next gets the newest version.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graph, Graphs
from parallelism.streaming import to_device

Params = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Lease:
    """Parameters of one version, valid until the piece of work that took it returns."""

    version: int
    params: Params


@dataclasses.dataclass
class View:
    """The newest parameters in another dtype or sharding: one compiled copy, its cost on record.

    bytes: what the copy holds over all devices. seconds: what the last refresh took.
    """

    name: str
    graph: Graph
    bytes: int
    seconds: float = 0.0
    refreshes: int = 0
    lease: Lease | None = None


class Live:
    """A versioned reference to one set of parameters, and the named views made from it."""

    def __init__(self, params: Params, graphs: Graphs):
        self._lease = Lease(0, params)
        self._graphs = graphs
        self.views: dict[str, View] = {}

    @property
    def version(self) -> int:
        return self._lease.version

    def publish(self, params: Params) -> int:
        """The trainer's newest parameters; returns their version. Copies nothing."""

        def swap() -> int:
            self._lease = Lease(self._lease.version + 1, params)
            return self._lease.version

        return dispatcher().call(swap)

    def view(
        self, name: str, dtypes: Mapping[str, Any] | None = None, shardings: Mapping[str, Any] | None = None
    ) -> str | None:
        """Declares a view and compiles it. Returns its name, or None when the parameters agree already.

        dtypes, shardings: by key, of every parameter; None keeps those of the parameters. Declared again alike it is
        the one there is. Raises ValueError when the name is another view's.
        """
        params = self._lease.params
        want = {
            key: (
                jnp.dtype(dtypes[key] if dtypes else array.dtype),
                shardings[key] if shardings else array.sharding,
            )
            for key, array in params.items()
        }
        if all(
            array.dtype == want[key][0] and array.sharding.is_equivalent_to(want[key][1], array.ndim)
            for key, array in params.items()
        ):
            return None
        if name in self.views:
            have = self.views[name].graph.outputs
            if all(
                have[k].dtype == d and have[k].sharding.is_equivalent_to(s, len(have[k].shape))
                for k, (d, s) in want.items()
            ):
                return name
            raise ValueError(f"view {name!r} exists with another dtype or sharding: give this one another name")

        def cast(params: Params) -> dict[str, jax.Array]:
            return {key: array.astype(want[key][0]) for key, array in to_device(params).items()}

        out = {key: sharding for key, (_, sharding) in want.items()}
        graph = self._graphs.compile(f"view[{name}]", cast, dict(params), out_shardings=out)
        size = sum(array.size * want[key][0].itemsize for key, array in params.items())
        self.views[name] = View(name, graph, size)
        return name

    def lease(self, view: str | None = None) -> Lease:
        """The newest parameters, or a view of them refreshed if they moved. On the dispatcher's thread only."""
        if not dispatcher().current():
            raise RuntimeError("a lease is taken inside a piece of the dispatcher's work: dispatcher().call(...)")
        if view is None:
            return self._lease
        held = self.views[view]
        if held.lease is None or held.lease.version != self._lease.version:
            held.lease = None  # the old copy is freed before the new one is made
            start = time.perf_counter()
            params = jax.block_until_ready(held.graph(dict(self._lease.params)))
            held.seconds, held.refreshes = time.perf_counter() - start, held.refreshes + 1
            held.lease = Lease(self._lease.version, params)
        return held.lease
