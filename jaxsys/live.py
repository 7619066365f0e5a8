"""The one place where weights live: a versioned reference to the parameters.

The trainer publishes, the server leases. A lease covers dispatch only: it is taken and used in one piece of
work of the dispatcher, so the trainer may donate the arrays in the next; a program in flight keeps its
buffers. Who still needs a version after a newer one is there holds it: then it is kept, and as long as the newest
is held the trainer must not donate it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graph, Graphs
from parallelism.layout import Layout
from parallelism.sharding import restored
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
        self._held: dict[tuple[object, str | None], frozenset[int]] = {}
        self._kept: dict[tuple[str | None, int], Lease] = {}
        self.kept_peak = 0
        self._donated = False  # some of the newest parameters are gone, and newer ones not there yet

    @property
    def version(self) -> int:
        return self._lease.version

    def publish(self, params: Params) -> int:
        """The trainer's newest parameters; returns their version. Copies nothing."""

        def swap() -> int:
            self._keep(None, self._lease)
            self._lease, self._donated = Lease(self._lease.version + 1, params), False
            return self._lease.version

        return dispatcher().call(swap)

    def like(self, view: str | None = None) -> Mapping[str, Any]:
        """Parameters such as a lease has them, or their shapes, dtypes and shardings: for ``Graphs.compile``."""
        return self._lease.params if view is None else self.views[view].graph.outputs

    def hold(self, holder: object, view: str | None, versions: Collection[int]) -> None:
        """The versions that a holder will lease again, in place of those it said before: older ones are kept for it.

        On the dispatcher's thread, in the piece of work that leases the newest of them.
        """
        self._held[holder, view] = frozenset(versions)
        wanted = {(view, version) for (_, view), versions in self._held.items() for version in versions}
        self._kept = {key: lease for key, lease in self._kept.items() if key in wanted}

    @property
    def held(self) -> bool:
        """Whether somebody will lease the newest parameters themselves again, so that they must not be donated."""
        return any(self._lease.version in versions for (_, view), versions in self._held.items() if view is None)

    @property
    def kept_bytes(self) -> int:
        """What older versions hold over all devices. ``kept_peak``: the most so far."""
        return sum(array.nbytes for lease in self._kept.values() for array in lease.params.values())

    def _keep(self, view: str | None, lease: Lease | None) -> None:
        """Keeps what is about to be replaced, if somebody holds it."""
        if lease is not None and any(lease.version in v for (_, of), v in self._held.items() if of == view):
            self._kept[view, lease.version] = lease
            self.kept_peak = max(self.kept_peak, self.kept_bytes)

    def view(
        self,
        name: str,
        dtypes: Mapping[str, Any] | None = None,
        shardings: Mapping[str, Any] | None = None,
        layouts: tuple[Layout, Layout] | None = None,
    ) -> str | None:
        """Declares a view and compiles it. Returns its name, or None when the parameters agree already.

        dtypes, shardings: by key, of every parameter; None keeps those of the parameters. Declared again alike it is
        the one there is. layouts: of the parameters and of the view, where they are stored otherwise in it; dtypes and
        shardings are given then, by the view's keys. Raises ValueError when the name is another view's.
        """
        params = self._lease.params
        want = {
            key: (
                jnp.dtype(dtypes[key] if dtypes else params[key].dtype),
                shardings[key] if shardings else params[key].sharding,
            )
            for key in (params if layouts is None else layouts[1])
        }
        if layouts is None and all(
            array.dtype == want[key][0] and array.sharding.is_equivalent_to(want[key][1], array.ndim)
            for key, array in params.items()
        ):
            return None
        if name in self.views:
            have = self.views[name].graph.outputs
            if have.keys() == want.keys() and all(
                have[k].dtype == d and have[k].sharding.is_equivalent_to(s, len(have[k].shape))
                for k, (d, s) in want.items()
            ):
                return name
            raise ValueError(f"view {name!r} exists with another dtype or sharding: give this one another name")

        def cast(params: Params) -> dict[str, jax.Array]:
            here: Params = to_device(params)
            here = here if layouts is None else restored(here, *layouts)
            return {key: array.astype(want[key][0]) for key, array in here.items()}

        out = {key: sharding for key, (_, sharding) in want.items()}
        graph = self._graphs.compile(f"view[{name}]", cast, dict(params), out_shardings=out)
        self.views[name] = View(name, graph, sum(a.size * a.dtype.itemsize for a in graph.outputs.values()))
        return name

    def lease(self, view: str | None = None, version: int | None = None) -> Lease:
        """The newest parameters, or a view of them refreshed if they moved. On the dispatcher's thread only.

        version: an older one, that is held.
        """
        if not dispatcher().current():
            raise RuntimeError("a lease is taken inside a piece of the dispatcher's work: dispatcher().call(...)")
        if version not in (None, self.version):
            assert version is not None
            stale = self.views[view].lease if view is not None else None
            return stale if stale is not None and stale.version == version else self._kept[view, version]
        if view is None:
            if self._donated:
                raise RuntimeError(
                    "parameters that an update donates are leased by nobody: declare a view, or hold them"
                )
            return self._lease
        here = self.views[view]
        if here.lease is None or here.lease.version != self.version:
            self._keep(view, here.lease)
            here.lease = None  # unless it is kept the old copy is freed before the new one is made
            start = time.perf_counter()
            params = jax.block_until_ready(here.graph(dict(self._lease.params)))
            here.seconds, here.refreshes = time.perf_counter() - start, here.refreshes + 1
            here.lease = Lease(self.version, params)
        return here.lease

    def begin_update(self) -> tuple[bool, bool]:
        """Before the newest parameters are donated one group after the other, until ``publish``: whether they are held,
        and so must be kept instead, and whether leases can be taken meanwhile: of those that are kept, or of views that
        were refreshed before. On the dispatcher's thread, in the piece of work that updates the first group."""
        fresh = [view.lease is not None and view.lease.version == self.version for view in self.views.values()]
        whole = self.held or (bool(fresh) and all(fresh))
        self._donated = not self.held
        return self.held, whole

    def release(self, view: str | None) -> None:
        """Frees a view's copy until it is leased again."""
        if view is not None:
            self.views[view].lease = None
