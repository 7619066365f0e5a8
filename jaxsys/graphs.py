"""The one place where anything is compiled: a registry of named graphs.

A graph is a traced function with fixed shapes, dtypes and shardings; weights are always its arguments. The
registry knows what each cost to compile, what memory it takes and what it computes, writes that list
beside a run, and, once frozen, refuses to compile: after warm-up a compile is a defect, not a pause.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.monitoring
import numpy as np
from jax.sharding import Mesh

from jaxsys.dispatch import dispatcher
from jaxsys.kept import By, Known, kept, name_of, name_of_text
from parallelism import placement
from parallelism.rules import ACTIVATIONS, Rules
from parallelism.sharding import sharding_context

MOST_AT_ONCE = 4  # programs compiled at the same time: each takes a core, and memory


class LateCompileError(RuntimeError):
    """Something was compiled after warm-up."""


@dataclasses.dataclass(frozen=True)
class GraphStats:
    """What one graph costs. Bytes are per device; flops and bytes accessed count a scan's body once.

    cached: the executable came out of the persistent cache. host_*: bytes in the host's memory that belong to one
    device, not in the others. None where the backend does not say, as one with a single memory.
    """

    name: str
    trace_seconds: float
    compile_seconds: float
    cached: bool
    argument_bytes: int | None
    output_bytes: int | None
    temporary_bytes: int | None
    aliased_bytes: int | None
    flops: float | None
    bytes_accessed: float | None
    host_argument_bytes: int | None
    host_temporary_bytes: int | None

    @property
    def host_bytes(self) -> int:
        """In the host's memory, of arguments and temporaries."""
        return (self.host_argument_bytes or 0) + (self.host_temporary_bytes or 0)


class Graph:
    """A compiled function. Calling it launches it on the dispatcher's thread and returns device arrays.

    moves: what it moves between the memories of host and device, as it was traced. kept: it was on disk. What was asked
    for inside ``Graphs.at_once`` may still be on its way: ``compiled`` and ``stats`` wait for it.
    """

    def __init__(self, name: str, built: Future[tuple[Any, GraphStats]], moves: placement.Moves, kept: bool):
        self.name, self.moves, self.kept, self._built = name, moves, kept, built

    @functools.cached_property
    def compiled(self) -> Any:
        return self._built.result()[0]

    @property
    def stats(self) -> GraphStats:
        return self._built.result()[1]

    @property
    def done(self) -> bool:
        """Whether it has been compiled."""
        return self._built.done() and not self._built.cancelled() and self._built.exception() is None

    @property
    def text(self) -> str:
        """The compiled program, as HLO text: see ``parallelism.hlo``."""
        return self.compiled.as_text()

    @property
    def outputs(self) -> Any:
        """The results' shapes, dtypes and shardings, as ShapeDtypeStructs."""
        return jax.tree.map(
            lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding),
            self.compiled.out_info,
            self.compiled.output_shardings,
        )

    def __call__(self, *args: Any) -> Any:
        return dispatcher().launch(self.name, self.compiled, *args)


class Graphs:
    """The graphs of one mesh.

    mesh, rules: the context that ``parallelism.sharding.constrain`` sees while tracing. say: called once, with a line,
    before many programs are compiled.
    """

    def __init__(
        self, mesh: Mesh | None = None, rules: Rules = ACTIVATIONS, *, say: Callable[[str], object] | None = None
    ):
        self.mesh, self.rules, self._say = mesh, rules, say
        self._graphs: dict[tuple, Graph] = {}
        self._frozen = False
        self._workers: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is asked for inside is compiled by threads while the next is traced. The end waits for all of it, but
        not for what is kept on disk: that is loaded meanwhile, one after the other.

        Raises what ``compile`` would have raised, of the first that failed.
        """
        before = set(self._graphs)
        self._workers = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE), "compile")
        try:
            yield
            for key in self._graphs.keys() - before:
                if not self._graphs[key].kept:
                    self._graphs[key].stats  # noqa: B018
        except BaseException:
            self._workers.shutdown(cancel_futures=True)
            for key in self._graphs.keys() - before:
                if not self._graphs[key].done:
                    del self._graphs[key]
            raise
        finally:
            self._workers.shutdown(wait=False)
            self._workers = None

    def compile(
        self,
        name: str,
        fn: Callable,
        *args: Any,
        donate: Sequence[int] = (),
        out_shardings: Any = None,
        compiler_options: dict[str, Any] | None = None,
        made_of: tuple | None = None,
    ) -> Graph:
        """The graph ``name`` for arguments like ``args`` (arrays or ShapeDtypeStructs with shardings).

        made_of: all that ``fn`` depends on beside its source, in values whose text says what they are: where the
        persistent cache is on, a program of one device is kept by it, and a later process loads it without tracing.

        Asked again with the same name, function, arguments, donation, output shardings and options it returns the
        graph it has. Two functions are the same if they are equal: closures are not, however alike, as what they close
        over is part of the program; methods of one object are. Raises LateCompileError when frozen.
        """
        outputs, tree = jax.tree.flatten(out_shardings)
        asked = (tuple(donate), str(tree), tuple(outputs), tuple(sorted((compiler_options or {}).items())))
        key = (name, fn, _signature(args), asked)
        if key in self._graphs:
            return self._graphs[key]
        if self._frozen:
            raise LateCompileError(f"graph {name!r} would be compiled after warm-up, for {_signature(args)}")
        options = {} if out_shardings is None else {"out_shardings": out_shardings}

        def traced_fn(*args: Any) -> Any:
            # Inside, because JAX's trace cache knows nothing of the context.
            with sharding_context(self.mesh, self.rules) if self.mesh is not None else contextlib.nullcontext():
                return fn(*args)

        jitted = jax.jit(traced_fn, donate_argnums=tuple(donate), **options)
        by = self._kept_by(name, fn, args, made_of, key[2:]) if made_of is not None else None
        building = _Building(name, jitted, args, compiler_options, self._one_memory, by)
        if not building.kept:
            if self._say is not None and self._workers is not None:
                self._say("compiling programs, which are kept for the next start")
                self._say = None
            building.trace()
        built: Future[tuple[Any, GraphStats]] = Future()
        if self._workers is None:
            built.set_result(building.build())
        else:
            built = self._workers.submit(building.build)
        self._graphs[key] = Graph(name, built, building.moves, building.kept)
        return self._graphs[key]

    def _kept_by(self, name: str, fn: Callable, args: tuple, made_of: tuple, asked: tuple) -> By | None:
        """Where a program is kept; what several devices share cannot always be written down."""
        if self.mesh is not None:
            devices = set(self.mesh.devices.flat)
        else:
            shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
            devices = {d for sharding in shardings if sharding for d in sharding.device_set} or {jax.devices()[0]}
        store = kept()
        if store is None or len(devices) > 1:
            return None
        (device,) = devices
        context = None if self.mesh is None else (self.mesh.axis_names, dict(self.rules))
        source = getattr(fn, "__qualname__", type(fn).__qualname__)
        return By(store, device, name_of(name, source, made_of, asked, context, device))

    def discard(self, graphs: Iterable[Graph]) -> None:
        """Forgets graphs that nobody will launch."""
        gone = set(map(id, graphs))
        self._graphs = {key: graph for key, graph in self._graphs.items() if id(graph) not in gone}

    def freeze(self) -> None:
        """Warm-up is over: from now on ``compile`` only returns what it has."""
        self._frozen = True

    @property
    def _one_memory(self) -> bool:
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.platform == "cpu"

    def __iter__(self) -> Iterator[Graph]:
        return iter(self._graphs.values())

    def __len__(self) -> int:
        return len(self._graphs)

    def save(self, path: Path) -> None:
        """Writes the list of graphs as JSON, for ``jaxsys graphs``."""
        rows = [dataclasses.asdict(graph.stats) for graph in self]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=1))
        temporary.replace(path)


def traced_once(fn: Callable, static: Sequence[int] = ()) -> Callable:
    """``fn`` inside a traced function that calls it often: calls that are alike are traced once. static: arguments that
    are no arrays."""
    return jax.jit(fn, static_argnums=tuple(static))


@contextlib.contextmanager
def no_compiles(what: str) -> Iterator[None]:
    """Raises LateCompileError if anything at all, an eager operation included, was compiled inside."""
    with _Events() as events:
        yield
    if events.compiles:
        raise LateCompileError(f"{events.compiles} programs were compiled during {what}")


def enable_persistent_cache(directory: str | os.PathLike | None = None) -> Path:
    """Keeps compiled programs on disk, so that the second start of the same job compiles nothing.

    Default: ``$JAXSYS_CACHE/xla``, else ``~/.cache/jaxsys/xla``. A directory that is already set
    (JAX_COMPILATION_CACHE_DIR) stays.
    """
    already = jax.config.values["jax_compilation_cache_dir"]
    path = Path(directory or already or cache_root() / "xla")
    path.mkdir(parents=True, exist_ok=True)
    if already != str(path):
        jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A key must not hold the address of a function (kernels/matmul.py lays arrays out by one).
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    return path


def cache_root() -> Path:
    """Where jaxsys keeps what can be made again: ``$JAXSYS_CACHE``, else ``~/.cache/jaxsys``."""
    return Path(os.environ.get("JAXSYS_CACHE") or Path.home() / ".cache" / "jaxsys")


def _signature(args: Any) -> tuple:
    leaves, tree = jax.tree.flatten(args)
    return (str(tree), tuple(_abstract(leaf) for leaf in leaves))


def _abstract(leaf: Any) -> tuple:
    # Never ``np.asarray`` of a jax array: it would copy it to the host, and a host view spoils donation.
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return (np.shape(leaf), str(dtype), getattr(leaf, "sharding", None))


def _costs(compiled: Any, one_memory: bool) -> dict[str, Any]:
    """The fields of ``GraphStats`` that the program itself says."""
    memory = compiled.memory_analysis()
    cost: dict[str, float] = {}
    with contextlib.suppress(NotImplementedError, jax.errors.JaxRuntimeError):
        cost = compiled.cost_analysis() or {}
    sizes = ("argument", "output", "temporary", "aliased", "host_argument", "host_temporary")
    names = ("argument", "output", "temp", "alias", "host_argument", "host_temp")
    found = {
        f"{size}_bytes": getattr(memory, f"{name}_size_in_bytes", None)
        for size, name in zip(sizes, names, strict=True)
        if not (one_memory and name.startswith("host"))
    }
    absent = {"host_argument_bytes": None, "host_temporary_bytes": None}
    return absent | found | {"flops": cost.get("flops"), "bytes_accessed": cost.get("bytes accessed")}


class _Building:
    """A program on its way: traced, unless one is kept; then built, by any thread."""

    def __init__(
        self,
        name: str,
        jitted: Any,
        args: tuple,
        compiler_options: dict[str, Any] | None,
        one_memory: bool,
        by: By | None,
    ):
        self._name, self._jitted, self._args, self._options = name, jitted, args, compiler_options
        self._one_memory, self._by = one_memory, by
        self._wide = jax.config.values["jax_enable_x64"]
        self._refused = ""  # the text of a program that was there and could not be used
        self._known = None if by is None else by.known()
        if self._known is not None:
            self.moves = self._known.moves

    @property
    def kept(self) -> bool:
        """Whether it was on disk when this was made."""
        return self._known is not None

    def trace(self) -> None:
        start = time.perf_counter()
        program = self._jitted.trace(*self._args)
        self._lowered = program.lower()
        self.moves = placement.moves(program.jaxpr)
        self._trace_seconds = time.perf_counter() - start

    def build(self) -> tuple[Any, GraphStats]:
        with jax.enable_x64(self._wide):
            return self._load() or self._compile()

    def _load(self) -> tuple[Any, GraphStats] | None:
        if self._by is None or self._known is None:
            return None
        start = time.perf_counter()
        compiled = self._by.load(self._known.text, self._args, self._known.outputs)
        if compiled is None:
            self._refused = self._known.text
            self.trace()
            return None
        seconds = time.perf_counter() - start
        return compiled, GraphStats(self._name, 0.0, seconds, True, **self._known.costs)

    def _compile(self) -> tuple[Any, GraphStats]:
        start = time.perf_counter()
        outputs = jax.tree.map(lambda _: 0, self._lowered.out_info)
        text = name_of_text(self._lowered.as_text(), self._options, self._by.device) if self._by else ""
        found = self._by.load(text, self._args, outputs) if self._by and text != self._refused else None
        with _Events(of_this_thread=True) as events:
            compiled = found or self._lowered.compile(self._options)
        seconds, costs = time.perf_counter() - start, _costs(compiled, self._one_memory)
        again = found is not None or (events.hits > 0 and events.misses == 0)
        # XLA:CPU does not write down again what it has read.
        if self._by is not None and (found is not None or (not again and self._by.keep(text, compiled))):
            self._by.know(Known(text, outputs, self.moves, costs))
        return compiled, GraphStats(self._name, self._trace_seconds, seconds, again, **costs)


class _Events:
    """Counts compiles and persistent-cache hits while open, from JAX's own monitoring events, of any thread or one."""

    _open: ClassVar[list[_Events]] = []
    _registered: ClassVar[bool] = False

    def __init__(self, of_this_thread: bool = False) -> None:
        self.compiles = self.hits = self.misses = 0
        self._thread = threading.get_ident() if of_this_thread else None

    def __enter__(self) -> _Events:
        if not _Events._registered:
            jax.monitoring.register_event_listener(_Events._event)
            jax.monitoring.register_event_duration_secs_listener(_Events._duration)
            _Events._registered = True
        _Events._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _Events._open.remove(self)

    @staticmethod
    def _listening() -> list[_Events]:
        return [each for each in tuple(_Events._open) if each._thread in (None, threading.get_ident())]

    @staticmethod
    def _event(event: str, **_: str | int) -> None:
        for events in _Events._listening():
            events.hits += event == "/jax/compilation_cache/cache_hits"
            events.misses += event == "/jax/compilation_cache/cache_misses"

    @staticmethod
    def _duration(event: str, duration_secs: float, **_: str | int) -> None:
        for events in _Events._listening():
            events.compiles += event == "/jax/core/compile/backend_compile_duration"
