"""The one thread that launches, the one place that compiles, the one place where weights live."""

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_models import x64

from jaxsys.dispatch import Dispatcher, dispatcher
from jaxsys.graphs import Graphs, LateCompileError, no_compiles
from jaxsys.live import Live
from parallelism import current

ROOT = Path(__file__).parents[2]


# -------------------------------------------------------------------------------------------------------- dispatch


@pytest.fixture
def own():
    made = Dispatcher()
    yield made
    made.close()


def test_all_work_runs_on_one_thread_that_is_not_the_callers(own):
    threads = {own.call(threading.get_ident) for _ in range(3)}
    from_others: list[int] = []
    callers = [threading.Thread(target=lambda: from_others.append(own.call(threading.get_ident))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert threads | set(from_others) == threads and threads != {threading.get_ident()} and len(threads) == 1


def test_work_runs_in_the_order_of_submission(own):
    ran: list[int] = []
    for future in [own.submit(ran.append, i) for i in range(100)]:
        future.result()
    assert ran == list(range(100))


def test_work_may_call_more_work_which_runs_at_once(own):
    ran: list[str] = []

    def outer():
        own.call(ran.append, "inner")
        ran.append("outer")

    own.call(outer)
    assert ran == ["inner", "outer"]


def test_exceptions_come_back_to_the_caller_and_the_thread_goes_on(own):
    with pytest.raises(ZeroDivisionError):
        own.call(lambda: 1 / 0)
    assert own.call(lambda: 3) == 3


def test_arguments_and_results_are_not_kept(own):
    class Thing:
        pass

    thing, gone = Thing(), []
    gone.append(weakref.ref(thing))
    made = own.call(lambda it: Thing(), thing)
    gone.append(weakref.ref(made))
    cancelled = Thing()
    gate = threading.Event()
    own.submit(gate.wait)
    future = own.submit(lambda it: None, cancelled)
    assert future.cancel()
    gone.append(weakref.ref(cancelled))
    gate.set()
    own.call(lambda: None)
    del thing, made, cancelled, future
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_close_finishes_the_queue_and_refuses_more():
    made, ran = Dispatcher(), []
    for i in range(20):
        made.submit(ran.append, i)
    made.close()
    assert ran == list(range(20))
    with pytest.raises(RuntimeError, match="closed"):
        made.call(lambda: None)
    made.close()


def test_a_process_has_one_dispatcher():
    assert dispatcher() is dispatcher()
    assert not dispatcher().current()


# ---------------------------------------------------------------------------------------------------------- graphs


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("fsdp",))


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def twice(x):
    return 2 * x


def test_the_same_name_function_and_shapes_give_the_same_graph():
    graphs = Graphs()
    first = graphs.compile("twice", twice, spec(4))
    assert graphs.compile("twice", twice, np.zeros(4, np.float32)) is first
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "changed",
    [
        lambda g: g.compile("twice", twice, spec(5)),
        lambda g: g.compile("twice", twice, spec(4, dtype=jnp.int32)),
        lambda g: g.compile("thrice", twice, spec(4)),
        lambda g: g.compile("twice", lambda x: 3 * x, spec(4)),
        lambda g: g.compile("twice", twice, spec(4), donate=(0,)),
        lambda g: g.compile("twice", twice, spec(4), compiler_options={"xla_cpu_enable_fast_math": False}),
    ],
    ids=["shape", "dtype", "name", "function", "donation", "options"],
)
def test_anything_else_asked_gives_another_graph(changed):
    graphs = Graphs()
    first = graphs.compile("twice", twice, spec(4))
    assert changed(graphs) is not first and len(graphs) == 2


def test_other_output_shardings_give_another_graph(mesh):
    graphs = Graphs(mesh)
    made = [
        graphs.compile("same", lambda x: x + 1, spec(8), out_shardings=NamedSharding(mesh, PartitionSpec(axis)))
        for axis in (None, "fsdp")
    ]
    assert [g.outputs.sharding.is_fully_replicated for g in made] == [True, False]


def test_calling_a_graph_launches_it_on_the_dispatchers_thread():
    seen = []
    graph = Graphs().compile("launch", lambda x: x + 1, spec(2))
    compiled = graph.compiled
    graph.compiled = lambda *args: (seen.append(dispatcher().current()), compiled(*args))[1]
    np.testing.assert_array_equal(graph(np.zeros(2, np.float32)), [1, 1])
    assert seen == [True]


def test_tracing_sees_the_mesh_and_rules_of_its_graphs(mesh):
    seen = []
    Graphs(mesh).compile("context", lambda x: (seen.append(current().mesh), x)[1], spec(2))
    assert seen == [mesh]


def test_asking_for_a_graph_copies_nothing_to_the_host_so_donation_stays_in_place():
    x = jnp.zeros(1024)
    graph = Graphs().compile("donated", lambda x: x + 1, x, donate=(0,))
    assert x._npy_value is None
    pointer = x.unsafe_buffer_pointer()
    y = graph(x)
    assert x.is_deleted() and y.unsafe_buffer_pointer() == pointer


def test_frozen_graphs_give_what_they_have_and_refuse_the_rest():
    graphs = Graphs()
    first = graphs.compile("early", twice, spec(3))
    graphs.freeze()
    assert graphs.compile("early", twice, spec(3)) is first
    with pytest.raises(LateCompileError, match="'early'"):
        graphs.compile("early", twice, spec(4))


def test_no_compiles_notices_an_eager_operation():
    x = jnp.arange(3.0)
    with pytest.raises(LateCompileError, match="during the test"), no_compiles("the test"):
        jax.block_until_ready(x.at[1].multiply(1.2345))


def test_no_compiles_lets_graphs_run():
    graph = Graphs().compile("quiet", lambda x: x + 1, spec(3))
    x = np.zeros(3, np.float32)
    with no_compiles("a graph's run"):
        jax.block_until_ready(graph(x))


def test_statistics_say_what_a_graph_costs(tmp_path):
    graphs = Graphs()
    graph = graphs.compile("product", lambda a, b: a @ b, spec(64, 32), spec(32, 16))
    graphs.save(tmp_path / "run" / "graphs.json")
    assert graph.stats.argument_bytes == 4 * (64 * 32 + 32 * 16) and graph.stats.output_bytes == 4 * 64 * 16
    assert graph.stats.flops >= 2 * 64 * 32 * 16
    assert graph.stats.trace_seconds > 0 and graph.stats.compile_seconds > 0
    (row,) = json.loads((tmp_path / "run" / "graphs.json").read_text())
    assert row["name"] == "product" and row["flops"] == graph.stats.flops


PROCESS = """
import jax, numpy as np
misses = []
def listen(event, **_):
    if event == "/jax/compilation_cache/cache_misses":
        misses.append(event)
jax.monitoring.register_event_listener(listen)
from jaxsys.graphs import Graphs, enable_persistent_cache
enable_persistent_cache()
graphs = Graphs()
for n in (3, 4):
    x = np.ones((n, n), np.float32)
    graphs.compile("g", lambda x: (x @ x.T).sum(), x)(x)
print(len(misses), *(graph.stats.cached for graph in graphs))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"JAXSYS_CACHE": str(tmp_path / "new"), "PYTHONPATH": str(ROOT)}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    )
    assert int(first[0]) >= 2 and first[1:] == ["False", "False"]
    assert second == ["0", "True", "True"]


# ------------------------------------------------------------------------------------------------------------ live


def params(mesh, scale=1.0):
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    return {
        "w": jax.device_put(scale * np.arange(8, dtype=np.float32), split),
        "norm": jax.device_put(np.full(8, scale, np.float32), whole),
    }


@pytest.fixture
def live(mesh):
    return Live(params(mesh), Graphs(mesh))


def every(value):
    """The same for each parameter."""
    return dict.fromkeys(("w", "norm"), value)


def leased(live, view=None):
    return dispatcher().call(live.lease, view)


def test_publish_makes_a_new_version_of_the_same_arrays(live, mesh):
    new = params(mesh, 2.0)
    assert live.version == 0 and live.publish(new) == 1 == live.version
    assert leased(live).version == 1 and leased(live).params is new


def test_a_lease_is_taken_on_the_dispatchers_thread_only(live):
    with pytest.raises(RuntimeError, match="dispatcher"):
        live.lease()


def test_parameters_that_agree_need_no_view_and_no_copy(live):
    first = leased(live).params
    whole = {key: array.sharding for key, array in first.items()}
    assert live.view("same", every(jnp.float32), whole) is None and not live.views
    assert leased(live).params is first


def test_a_view_is_the_parameters_in_its_dtype_and_sharding(live, mesh):
    whole = NamedSharding(mesh, PartitionSpec())
    name = live.view("serve", every(jnp.bfloat16), every(whole))
    got = leased(live, name).params
    assert {a.dtype for a in got.values()} == {jnp.dtype("bfloat16")}
    assert all(a.sharding.is_equivalent_to(whole, a.ndim) for a in got.values())
    np.testing.assert_array_equal(got["w"].astype(np.float32), np.arange(8))
    assert live.views[name].bytes == 2 * 16


def test_a_view_is_refreshed_once_a_version(live, mesh):
    name = live.view("serve", every(jnp.bfloat16))
    assert leased(live, name).params is leased(live, name).params
    live.publish(params(mesh, 3.0))
    lease = leased(live, name)
    assert lease.version == 1 and live.views[name].refreshes == 2
    np.testing.assert_array_equal(lease.params["w"].astype(np.float32), 3 * np.arange(8))


def test_a_refresh_compiles_nothing(live, mesh):
    name, new = live.view("serve", every(jnp.bfloat16)), params(mesh, 3.0)
    leased(live, name)
    with no_compiles("a refresh"):
        live.publish(new)
        leased(live, name)


def test_a_view_is_declared_once_and_its_name_means_one_thing(live):
    assert live.view("serve", every(jnp.bfloat16)) == live.view("serve", every(jnp.bfloat16)) == "serve"
    with pytest.raises(ValueError, match="'serve'"):
        live.view("serve", every(jnp.float16))


def test_the_trainer_may_donate_after_a_program_was_launched_with_the_lease(live, mesh):
    update = live._graphs.compile("update", lambda w: w + 1, leased(live).params["w"], donate=(0,))
    use = live._graphs.compile("use", lambda w: w * 2, leased(live).params["w"])
    pending = dispatcher().call(lambda: use(live.lease().params["w"]))
    old = leased(live).params
    live.publish({**old, "w": update(old["w"])})
    assert old["w"].is_deleted()
    np.testing.assert_array_equal(pending, 2 * np.arange(8))
    np.testing.assert_array_equal(leased(live).params["w"], np.arange(8) + 1)


def test_donating_the_parameters_leaves_a_view_of_them_alone(live, mesh):
    """Also the arrays that a view holds in the dtype and sharding they had already."""
    whole = NamedSharding(mesh, PartitionSpec())
    name = live.view("whole", every(jnp.float32), every(whole))
    held, old = leased(live, name).params, leased(live).params
    jax.block_until_ready(live._graphs.compile("drop", lambda p: p["norm"] * 0, old, donate=(0,))(old))
    np.testing.assert_array_equal(held["norm"], np.ones(8))
    np.testing.assert_array_equal(held["w"], np.arange(8))


def test_graphs_asked_for_at_once_are_those_asked_for_in_turn():
    graphs, x = Graphs(), jnp.arange(8.0)

    def double(x):
        return 2 * x

    def halve(x):
        return x / 2

    with graphs.at_once():
        found = [graphs.compile("double", double, x), graphs.compile("halve", halve, x)]
        assert graphs.compile("double", double, x) is found[0]
    assert [graph(x).tolist() for graph in found] == [(2 * x).tolist(), (x / 2).tolist()]
    assert [graph.stats.name for graph in graphs] == ["double", "halve"]
    assert all(graph.stats.compile_seconds > 0 and graph.stats.trace_seconds > 0 for graph in graphs)
    with x64():
        wide = jnp.arange(3.0)
        with graphs.at_once():
            assert graphs.compile("double", double, wide)(wide).dtype == jnp.float64


def test_what_does_not_compile_at_once_is_raised_at_the_end_and_not_kept():
    graphs, x = Graphs(), jnp.arange(8.0)

    def double(x):
        return 2 * x

    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"), graphs.at_once():
        graphs.compile("good", double, x)
        graphs.compile("bad", double, x, compiler_options={"no_such_option": True})
    assert [graph.name for graph in graphs] == ["good"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        graphs.compile("bad", double, x, compiler_options={"no_such_option": True})
    assert len(graphs) == 1
