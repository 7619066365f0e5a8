"""Programs kept by what they are made of: loaded without tracing, and made anew where anything about them differs."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsys import kept
from jaxsys.graphs import Graphs, no_compiles

_different = itertools.count()


@dataclasses.dataclass(frozen=True)
class Pair:
    total: jax.Array
    rows: list


jax.tree_util.register_dataclass(Pair, ["total", "rows"], [])


class Program:
    """A function that counts its traces and that no cache knows from another test: the constant in it is new."""

    def __init__(self):
        self.traced, self.constant = 0, os.getpid() % 10**6 * 1000 + next(_different)

    def __call__(self, x, scale):
        self.traced += 1
        return Pair(x.sum().astype(jnp.int32) + self.constant, [x * scale, scale])

    def graph(self, made_of=("sum",), shape=(8, 4), graphs=None, **options):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        graphs = Graphs() if graphs is None else graphs
        return graphs.compile("g", self, x, np.float32(1), made_of=made_of, **options)


@pytest.fixture
def program():
    return Program()


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "kept", lambda: tmp_path / "kept")
    monkeypatch.setattr("jaxsys.graphs.kept", kept.kept)
    return tmp_path / "kept"


def holds(program, graph):
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    found = graph(x, np.float32(2))
    assert int(found.total) == 496 + program.constant
    np.testing.assert_array_equal(found.rows[0], x * 2)
    return graph.stats


def test_what_is_kept_is_loaded_without_tracing_and_says_what_it_said(program):
    first = holds(program, program.graph())
    again = program.graph()
    with no_compiles("loading"):
        second = holds(program, again)
    assert program.traced == 1
    assert (first.cached, second.cached, second.trace_seconds) == (False, True, 0.0)
    times = {"trace_seconds": 0, "compile_seconds": 0, "cached": True}
    assert dataclasses.replace(first, **times) == dataclasses.replace(second, **times)


def test_without_made_of_nothing_is_kept(program, directory):
    holds(program, program.graph(made_of=None))
    assert not directory.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"made_of": ("mean",)},
        {"shape": (9, 4)},
        {"donate": (0,)},
        {"compiler_options": {"xla_cpu_enable_fast_math": True}},
    ],
    ids=str,
)
def test_anything_else_about_it_is_another_program(program, other):
    program.graph()
    program.graph(**other)
    assert program.traced == 2


def test_another_setting_of_jax_or_another_device_is_another_program(program):
    program.graph()
    with jax.default_matmul_precision("float32"):
        program.graph()
    device = jax.devices()[3]
    on_three = Mesh(np.array([device]), ("data",))
    graph = program.graph(graphs=Graphs(on_three), out_shardings=NamedSharding(on_three, PartitionSpec()))
    assert graph(np.ones((8, 4), np.float32), np.float32(1)).total.devices() == {device}
    assert program.traced == 3


def test_changed_source_traces_again_but_compiles_only_what_changed(program, monkeypatch):
    program.graph()
    monkeypatch.setattr(kept, "code", lambda: "another")
    with no_compiles("a change that changes no program"):
        changed = program.graph()
    assert (program.traced, holds(program, changed).cached) == (2, True)
    program.graph()
    assert program.traced == 2
    program.constant = Program().constant
    monkeypatch.setattr(kept, "code", lambda: "a third")
    assert not holds(program, program.graph()).cached


@pytest.mark.parametrize("ending", ["known", "program"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_what_is_damaged_is_made_anew(program, directory, ending, damage):
    program.graph()
    (path,) = directory.glob(f"*.{ending}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flipped": bytes(data), "cut": data[:-9], "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    holds(program, program.graph())
    assert program.traced == 2


def test_what_another_xla_wrote_is_made_anew(program, directory):
    program.graph()
    (path,) = directory.glob("*.program")
    kept._write(path, b"not a program")
    holds(program, program.graph())
    assert program.traced == 2


def test_what_xla_refused_is_not_tried_again_before_it_is_compiled(program, directory, monkeypatch):
    program.graph()
    (path,) = directory.glob("*.program")
    kept._write(path, b"not a program")
    tried, load = [], kept.By.load
    monkeypatch.setattr(kept.By, "load", lambda self, text, *args: tried.append(text) or load(self, text, *args))
    holds(program, program.graph())
    assert tried == [path.stem]


def test_of_too_many_bytes_what_was_not_used_for_longest_goes(directory, monkeypatch):
    first, second, third = programs = [Program() for _ in range(3)]

    def use(program):
        holds(program, program.graph(made_of=(programs.index(program),)))
        for path in directory.iterdir():  # as if a second passed between two uses: clocks of files may be coarse
            state = path.stat()
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 10**9))

    def stored():
        return sum(path.stat().st_size for path in directory.iterdir())

    for program in (first, second, first):
        use(program)
    monkeypatch.setattr(kept, "MOST_BYTES", stored())
    use(third)
    assert stored() <= kept.MOST_BYTES
    for program in (first, third, second):
        use(program)
    assert [program.traced for program in programs] == [1, 2, 1]


def test_a_bound_that_holds_no_program_costs_nothing_but_the_keeping(program, directory, monkeypatch):
    monkeypatch.setattr(kept, "MOST_BYTES", 0)
    for _ in range(2):
        holds(program, program.graph())
    assert program.traced == 2 and not list(directory.iterdir())


def test_only_what_is_compiled_among_many_is_said_and_once(program):
    said = []

    def many():
        graphs = Graphs(say=said.append)
        program.graph(shape=(2, 4), graphs=graphs)
        with graphs.at_once():
            for columns in (4, 5):
                program.graph(shape=(8, columns), graphs=graphs)

    many()
    assert said == ["compiling programs, which are kept for the next start"]
    many()
    assert len(said) == 1


def test_a_directory_that_cannot_be_written_costs_nothing_but_the_keeping(program, directory):
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("a file")
    for _ in range(2):
        holds(program, program.graph())
    assert program.traced == 2


def test_programs_of_several_devices_are_left_to_jax_and_its_cache(program, directory):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    program.graph(graphs=Graphs(mesh))
    split = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    Graphs().compile("g", program, split, np.float32(1), made_of=("sum",))
    assert not directory.exists()


def test_what_has_no_text_of_its_own_is_refused(program):
    with pytest.raises(ValueError, match="cannot be kept by an object without a text"):
        program.graph(made_of=(object(),))


def test_a_loaded_program_donates_and_says_its_outputs(program):
    first = program.graph(donate=(0,))
    again = program.graph(donate=(0,))
    assert program.traced == 1
    assert jax.tree.map(lambda a: (a.shape, a.dtype), again.outputs) == jax.tree.map(
        lambda a: (a.shape, a.dtype), first.outputs
    )
    x = jnp.zeros((8, 4)) + 1  # of XLA's own memory, not numpy's
    where = x.unsafe_buffer_pointer()
    assert again(x, np.float32(3)).rows[0].unsafe_buffer_pointer() == where
    assert x.is_deleted()


def test_kept_programs_compiled_at_once_are_loaded_at_once(program):
    def both():
        graphs = Graphs()
        with graphs.at_once():
            return [program.graph(shape=(8, 4), graphs=graphs), program.graph(shape=(8, 5), graphs=graphs)]

    both()
    for graph in both():
        assert graph.stats.cached
    assert program.traced == 2


def test_nobody_waits_for_what_is_kept_until_it_is_called(program, monkeypatch):
    program.graph()
    come, graphs, load = threading.Event(), Graphs(), kept.By.load
    monkeypatch.setattr(kept.By, "load", lambda *args: come.wait() and load(*args))
    with graphs.at_once():
        graph = program.graph(graphs=graphs)
    assert not graph.done
    come.set()
    holds(program, graph)
    assert program.traced == 1


SERVE = """
import json, sys
import jaxsys.serve.engine as engine
from serve_engines import make_engine
from jaxsys.graphs import enable_persistent_cache
from jaxsys.serve.sampling import Sampling

traced = []
made = engine.make_forward
def make_forward(*args):
    forward = made(*args)
    def counted(*a):
        traced.append(1)
        return forward(*a)
    counted.__qualname__ = forward.__qualname__
    return counted
engine.make_forward = make_forward
enable_persistent_cache(sys.argv[1])
server = make_engine()
request = server.add_request([1, 2, 3], Sampling(5, temperature=0.0))
server.run([request])
print(json.dumps([request.tokens, request.logprobs, len(traced), sum(not g.stats.cached for g in server.graphs)]))
"""


def test_a_second_process_traces_no_graph_of_an_engine(tmp_path):
    tests = os.path.join(os.path.dirname(__file__), "serve")
    path = os.pathsep.join([tests, *sys.path])
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"PYTHONPATH": path}

    def start():
        command = [sys.executable, "-c", SERVE, str(tmp_path / "cache")]
        return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    *first, traced, compiled = start()
    assert traced == 3 and compiled > 0
    *second, traced, compiled = start()
    assert (second, traced, compiled) == (first, 0, 0)
