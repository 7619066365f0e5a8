"""Orbax checkpoints, with Orbax itself as the oracle both ways."""

from __future__ import annotations

import collections
import itertools
import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoint.formats import orbax
from checkpoint.formats.orbax import OrbaxDir, find_item, write_orbax
from checkpoint.manifest import CorruptError
from parallelism.errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)

RNG = np.random.default_rng(0)
BF16, F8, INT4 = (np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "int4"))
Pair = collections.namedtuple("Pair", "x y")

LAYERS = [RNG.standard_normal((8, 6)).astype(np.float32) for _ in range(2)]
VALUES = {
    "params.layers.0.w": LAYERS[0],
    "params.layers.1.w": LAYERS[1],
    "params.odd": RNG.standard_normal((8, 3)).astype(BF16),
    "params.tuple.0": np.ones(3, np.float32),
    "params.tuple.1": np.asarray(2, np.int32),
    "params.named.x": np.arange(2, dtype=np.float32),
    "params.flat.name": np.arange(3, dtype=np.int16),
    "int4": np.arange(-8, 8).reshape(4, 4).astype(INT4),
    "float8": np.arange(4, dtype=np.float32).astype(F8),
    "zeros": np.zeros((4, 4), np.float32),
    "bool": np.array([True, False]),
    "host": np.arange(4, dtype=np.uint8),
    "step": np.asarray(3),
    "rate": np.asarray(1.5),
}
"""What the arrays of ``tree`` are by name."""


def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))


def tree():
    """With everything that a tree may be made of."""

    def put(name, *spec):
        return jax.device_put(VALUES[name], NamedSharding(mesh(), PartitionSpec(*spec)))

    return {
        "params": {
            "layers": [{"w": put("params.layers.0.w", "a", "b")}, {"w": put("params.layers.1.w", None, "b")}],
            "odd": put("params.odd", "a"),
            "tuple": (put("params.tuple.0"), put("params.tuple.1")),
            "named": Pair(put("params.named.x"), None),
            "flat.name": put("params.flat.name"),
        },
        **{name: put(name) for name in ("int4", "float8", "zeros", "bool")},
        "host": VALUES["host"],
        "step": 3,
        "rate": 1.5,
        "nothing": {},
    }


def save(path, **options):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(path, args=ocp.args.PyTreeSave(tree()))


def save_standard(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree())


def save_strings(path):
    named = {**tree(), "text": "not an array"}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(path, args=ocp.args.PyTreeSave(named))


def save_steps(path):
    with ocp.CheckpointManager(path) as manager:
        manager.save(9, args=ocp.args.StandardSave({"old": np.ones(1)}))
        manager.save(10, args=ocp.args.StandardSave(tree()))


def save_items(path):
    options = ocp.CheckpointManagerOptions(step_prefix="at", step_format_fixed_length=8)
    items = {"state": ocp.args.StandardSave(tree()), "config": ocp.args.JsonSave({"a": 1})}
    with ocp.CheckpointManager(path, options=options) as manager:
        manager.save(10, args=ocp.args.Composite(**items))


KINDS = {
    "StandardCheckpointer": save_standard,
    "zarr": lambda path: save(path, use_ocdbt=False, use_zarr3=False),
    "zarr3": lambda path: save(path, use_ocdbt=False, use_zarr3=True),
    "ocdbt, zarr3": lambda path: save(path, use_ocdbt=True, use_zarr3=True),
    "a string": save_strings,
    "CheckpointManager": save_steps,
    "CheckpointManager, named": save_items,
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        got = found.read(name)
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (value.shape, value.dtype, value.nbytes)
        assert (got.shape, got.dtype, got.tobytes()) == (value.shape, value.dtype, value.tobytes()), name


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", KINDS)
def test_what_orbax_writes_is_read(tmp_path, kind):
    KINDS[kind](tmp_path / "saved")
    assert_same(OrbaxDir(tmp_path / "saved"), VALUES)


WORKER = """
import sys
import jax, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize("127.0.0.1:" + port, 2, index)
mesh, host = Mesh(np.array(jax.devices()), ("x",)), np.arange(48, dtype=np.float32).reshape(8, 6)
def put(spec):
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])
tree = {"rows": put(PartitionSpec("x")), "replicated": put(PartitionSpec())}
for name, ocdbt in (("ocdbt", True), ("zarr", False)):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    ocp.Checkpointer(handler).save(root + "/" + name, args=ocp.args.PyTreeSave(tree))
"""


def test_what_two_processes_write_is_read(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    commands = [[sys.executable, "-c", WORKER, str(index), port, tmp_path] for index in range(2)]
    run = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for command in commands]
    assert [process.wait(timeout=120) for process in run] == [0, 0]
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    for name in ("ocdbt", "zarr"):
        assert_same(OrbaxDir(tmp_path / name), {"rows": whole, "replicated": whole})


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A directory of zarr arrays, a file a chunk."""
    path = tmp_path_factory.mktemp("sharded") / "saved"
    save(path, use_ocdbt=False, use_zarr3=False)
    return path


def boxes_of(shape):
    return st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: slice(*sorted(p))) for n in shape))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_box_is_that_box_of_the_whole(sharded, data):
    name = data.draw(st.sampled_from(sorted(VALUES)))
    box = data.draw(boxes_of(VALUES[name].shape))
    got = OrbaxDir(sharded).read(name, box)
    np.testing.assert_array_equal(got, VALUES[name][box])


def test_only_the_chunks_of_a_box_are_read_and_a_missing_one_is_not_zeros(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "copy")
    (path / "params.layers.0.w" / "1.0").unlink()  # rows 2 and 3, columns 0 to 2
    found = OrbaxDir(path)
    np.testing.assert_array_equal(found.read("params.layers.0.w", (slice(4, 8), slice(0, 6))), LAYERS[0][4:])
    np.testing.assert_array_equal(found.read("params.layers.0.w", (slice(0, 8), slice(3, 6))), LAYERS[0][:, 3:])
    with pytest.raises(CorruptError, match=r"'params\.layers\.0\.w'.*missing") as error:
        found.read("params.layers.0.w", (slice(3, 4), slice(0, 1)))
    assert "\n" not in str(error.value)


def test_chunks_of_zeros_that_older_versions_did_not_write_are_zeros(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "copy")
    metadata = json.loads((path / "_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]
    (path / "_METADATA").write_text(json.dumps(metadata))
    for chunk in (path / "zeros").glob("[0-9]*"):
        chunk.unlink()
    np.testing.assert_array_equal(OrbaxDir(path).read("zeros"), VALUES["zeros"])


def test_an_unfinished_step_and_one_of_several_items_are_not_taken(tmp_path):
    save_steps(tmp_path / "root")
    (tmp_path / "root" / "10").rename(tmp_path / "root" / "11.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "root" / "9", tmp_path / "root" / ".tmp-12")
    assert find_item(tmp_path / "root") == tmp_path / "root" / "9" / "default"
    assert set(OrbaxDir(tmp_path / "root")) == {"old"}
    shutil.copytree(tmp_path / "root" / "9" / "default", tmp_path / "two" / "a")
    shutil.copytree(tmp_path / "root" / "9" / "default", tmp_path / "two" / "b")
    with pytest.raises(UserError, match=r"2 items \(a, b\); give one"):
        OrbaxDir(tmp_path / "two")
    assert set(OrbaxDir(tmp_path / "two" / "b")) == {"old"}


def test_custom_metadata_is_read(tmp_path):
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    args = ocp.args.PyTreeSave({"a": np.ones(1)}, custom_metadata={"model": {"layers": 2}})
    checkpointer.save(tmp_path / "saved", args=args)
    assert OrbaxDir(tmp_path / "saved").meta == {"model": {"layers": 2}}


def test_reading_needs_no_orbax(sharded):
    code = (
        "import sys; sys.modules['orbax'] = None; from checkpoint.formats.orbax import OrbaxDir;"
        "assert OrbaxDir(sys.argv[1]).read('step') == 3"
    )
    subprocess.run([sys.executable, "-c", code, sharded], check=True)


def test_without_tensorstore_the_error_says_what_to_install(sharded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    for use in (lambda: OrbaxDir(sharded), lambda: write_orbax(tmp_path / "out", [], {})):
        with pytest.raises(UserError, match=r"TensorStore.*pip install 'jaxsys\[orbax\]'"):
            use()


def damage(path, what):
    if what == "no metadata":
        (path / "_METADATA").unlink()
    elif what == "old":
        (path / "_METADATA").rename(path / "checkpoint")
    elif what == "cut metadata":
        (path / "_METADATA").write_bytes((path / "_METADATA").read_bytes()[:-7])
    elif what == "other JSON":
        (path / "_METADATA").write_text("[1]")
    elif what == "a type":
        (path / "_METADATA").write_text((path / "_METADATA").read_text().replace("np.ndarray", "a thing"))
    elif what == "no database":
        (path / "manifest.ocdbt").unlink()
    elif what == "cut database":
        os.truncate(path / "manifest.ocdbt", 20)
    elif what == "no data":
        shutil.rmtree(path / "d")
    elif what == "another name":
        (path / "_METADATA").write_text((path / "_METADATA").read_text().replace('"odd"', '"even"'))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no metadata", "not an Orbax checkpoint"),
        ("old", "restore and save it with a newer one"),
        ("cut metadata", "_METADATA: damaged"),
        ("other JSON", "_METADATA: damaged"),
        ("a type", "'host' is of type 'a thing'"),
        ("no database", r"manifest\.ocdbt is missing"),
        ("cut database", "array '"),
        ("no data", "array '"),
        ("another name", r"array 'params\.even'.*does not exist"),
    ],
)
def test_damage_is_one_line(tmp_path, what, message):
    save_standard(tmp_path / "saved")
    damage(tmp_path / "saved", what)
    with pytest.raises(UserError, match=message) as error:
        OrbaxDir(tmp_path / "saved").read("host")
    assert "\n" not in str(error.value)


def test_a_name_cannot_lead_out_of_the_directory(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "copy")
    (path / "_METADATA").write_text((path / "_METADATA").read_text().replace('"host"', '"../sharded/host"'))
    with pytest.raises(CorruptError, match="names no directory"):
        OrbaxDir(path)


def test_unknown_arrays_and_boxes_that_step_are_refused(sharded):
    with pytest.raises(UserError, match="no array 'other' among the 14"):
        OrbaxDir(sharded).read("other")
    with pytest.raises(ValueError, match="step other than 1"):
        OrbaxDir(sharded).read("host", (slice(0, 4, 2),))


# ------------------------------------------------------------------------------------------------------------ writing

WRITTEN = {
    "layers.0.w": LAYERS[0],
    "layers.1.w": LAYERS[1],
    "embed": RNG.standard_normal((10, 8)).astype(BF16),
    "float8": VALUES["float8"],
    "int4": VALUES["int4"],
    "mask": VALUES["bool"],
    "zeros": VALUES["zeros"],
    "optimizer.count": np.asarray(7, np.int32),
    "empty": np.zeros((0, 3), np.float32),
}
META = {"model": {"layers": 2, "names": ["a", "b"]}, "step": 5}


def rows(array, n=3):
    """Boxes of up to n rows."""
    if not array.ndim:
        return [((), array)]
    return [((i, *[0] * (array.ndim - 1)), array[i : i + n]) for i in range(0, len(array), n)]


def stream(values, n=3):
    return [(name, value.shape, value.dtype, rows(value, n)) for name, value in values.items()]


def nested(values):
    out = {}
    for name, value in values.items():
        *above, last = name.split(".")
        branch = out
        for key in above:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return out


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A root of steps, with step 5 and step 7."""
    root = tmp_path_factory.mktemp("ours") / "root"
    write_orbax(root, stream({"old": np.ones(2)}), {}, step=5)
    assert write_orbax(root, stream(WRITTEN), META, step=7) == root / "7" / "default"
    return root


def check_restored(restored, sharding=None):
    flat = {".".join(key.key for key in path): x for path, x in jax.tree_util.tree_flatten_with_path(restored)[0]}
    assert flat.keys() == WRITTEN.keys()
    for name, value in WRITTEN.items():
        got = np.asarray(flat[name])
        assert (got.shape, got.dtype, got.tobytes()) == (value.shape, value.dtype, value.tobytes()), name
        if sharding is not None:
            assert flat[name].sharding == sharding(value), name


def on_one_device(value):
    return SingleDeviceSharding(jax.devices()[3])


def on_a_mesh(value):
    axes = ["a", "b"][: value.ndim]
    spec = [axis if n and n % mesh().shape[axis] == 0 else None for axis, n in zip(axes, value.shape, strict=False)]
    return NamedSharding(mesh(), PartitionSpec(*spec))


def target(sharding):
    return jax.tree.map(
        lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(value)), nested(WRITTEN)
    )


@pytest.mark.parametrize("sharding", [on_one_device, on_a_mesh])
def test_orbax_restores_onto_devices_what_is_written(ours, sharding):
    with ocp.StandardCheckpointer() as checkpointer:
        check_restored(checkpointer.restore(ours / "7" / "default", target(sharding)), sharding)
    with ocp.CheckpointManager(ours) as manager:
        assert manager.all_steps() == [5, 7]
        check_restored(manager.restore(7, args=ocp.args.StandardRestore(target(sharding))), sharding)


def test_orbax_restores_what_is_written_without_being_told_what(ours):
    with ocp.StandardCheckpointer() as checkpointer:
        check_restored(checkpointer.restore(ours / "7" / "default"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        check_restored(checkpointer.restore(ours / "7" / "default"))
    with ocp.CheckpointManager(ours) as manager:
        check_restored(manager.restore(manager.latest_step()))
    metadata = ocp.PyTreeCheckpointHandler().metadata(ours / "7" / "default")
    assert metadata.custom_metadata == META


def test_what_is_written_is_read_back(ours):
    for path in (ours, ours / "7", ours / "7" / "default"):
        found = OrbaxDir(path)
        assert_same(found, WRITTEN)
        assert found.meta == META


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax, when it fails
def test_a_flipped_bit_is_found_by_us_and_by_orbax(tmp_path):
    array = RNG.standard_normal((64, 64)).astype(np.float32)
    path = write_orbax(tmp_path / "out", stream({"x": array, "y": array[:2]}, 64), {})
    size, data = max((file.stat().st_size, file) for file in (path / "d").iterdir())
    for at in RNG.integers(0, size, 60):
        raw = bytearray(data.read_bytes())
        raw[at] ^= 1 << int(RNG.integers(8))
        changed = shutil.copytree(path, tmp_path / "changed")
        (changed / "d" / data.name).write_bytes(raw)
        with pytest.raises(CorruptError):
            found = OrbaxDir(changed)
            [found.read(name) for name in found]
        with pytest.raises(ValueError), ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.restore(changed)
        shutil.rmtree(changed)


def test_a_checkpoint_that_is_no_step(tmp_path):
    assert write_orbax(tmp_path / "out", stream(WRITTEN), META) == tmp_path / "out"
    assert os.listdir(tmp_path) == ["out"]
    with ocp.StandardCheckpointer() as checkpointer:
        check_restored(checkpointer.restore(tmp_path / "out"))


@st.composite
def cut(draw):
    """An array and its boxes, by cuts anywhere, in any order."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    dtype = draw(st.sampled_from([np.dtype(np.float32), BF16, INT4, np.dtype(np.bool_)]))
    array = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape).astype(dtype)
    edges = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    starts = [list(itertools.pairwise(e)) for e in edges]
    grid = [tuple(pairs[i] for pairs, i in zip(starts, at, strict=True)) for at in np.ndindex(*map(len, starts))]
    order = draw(st.permutations(grid))
    return array, [(tuple(a for a, _ in box), array[tuple(slice(a, b) for a, b in box)]) for box in order]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut(), st.sampled_from([1, 64, 1 << 20]))
def test_any_boxes_in_any_order_make_the_array(tmp_path_factory, monkeypatch, case, batch):
    array, boxes = case
    monkeypatch.setattr(orbax, "_BATCH_BYTES", batch)
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 16)
    path = tmp_path_factory.mktemp("case") / "out"
    write_orbax(path, [("x", array.shape, array.dtype, boxes)], {})
    assert_same(OrbaxDir(path), {"x": array})


def test_boxes_are_asked_for_one_by_one_and_written_as_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "_BATCH_BYTES", 512)
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 256)
    array = RNG.standard_normal((64, 16)).astype(np.float32)  # 4 KiB
    files = []

    def boxes():
        for box in rows(array, 8):  # 512 bytes each
            files.append(sum(1 for _ in tmp_path.glob(".tmp-out/d/*")))
            yield box

    write_orbax(tmp_path / "out", [("x", array.shape, array.dtype, boxes())], {})
    assert all(later > earlier for earlier, later in itertools.pairwise(files))  # the one before is there
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/out/"}, "path": "x/"}
    store = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    assert store.chunk_layout.read_chunk.shape == (4, 16)
    assert_same(OrbaxDir(tmp_path / "out"), {"x": array})


X = np.arange(12, dtype=np.float32).reshape(6, 2)


def fails():
    yield ((0, 0), X[:3])
    raise KeyError("the source failed")


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ([("x", X.shape, X.dtype, fails())], KeyError, "the source failed"),
        ([("x", X.shape, X.dtype, rows(X)[:1])], CorruptError, "hold 6 elements, expected 12"),
        ([("x", X.shape, X.dtype, [rows(X)[0], rows(X)[0]])], CorruptError, "overlap"),
        ([("x", X.shape, np.dtype(np.float64), rows(X))], ValueError, "a box of float32"),
        ([*stream({"x": X}), *stream({"x": X})], UserError, "'x' is given twice"),
        ([*stream({"x": X}), *stream({"x.y": X})], UserError, r"'x\.y' and 'x': one is inside the other"),
        ([*stream({"x.y": X}), *stream({"x": X})], UserError, r"'x' and 'x\.y': one is inside the other"),
        (stream({"x..y": X}), UserError, r"'x\.\.y': expected keys"),
        (stream({"x/y": X}), UserError, r"'x/y': expected keys"),
        (stream({"x": X.astype(ml_dtypes.uint4)}), UserError, r"at array 'x'.*uint4"),
        (stream({"x": X.astype(ml_dtypes.float8_e4m3)}), UserError, r"at array 'x'.*float8_e4m3"),
    ],
)
def test_after_an_error_nothing_is_left(tmp_path, arrays, error, message):
    with pytest.raises(error, match=message) as raised:
        write_orbax(tmp_path / "out", arrays, {})
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_exists_is_refused_and_kept(ours):
    before = sorted(os.listdir(ours))
    with pytest.raises(UserError, match="7 exists already"):
        write_orbax(ours, stream(WRITTEN), {}, step=7)
    assert sorted(os.listdir(ours)) == before
    assert_same(OrbaxDir(ours), WRITTEN)


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_orbax(tmp_path / "out", stream(WRITTEN), {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(tmp_path):
    noise = RNG.integers(0, 256, 1 << 20).astype(np.uint8)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*out: at array 'x'") as error:
            write_orbax(tmp_path / "out", stream({"x": noise}, 1 << 18), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_what_the_disk_changes_is_found_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    read = OrbaxDir.read
    monkeypatch.setattr(OrbaxDir, "read", lambda self, name, box=None: read(self, name, box) + np.float32(1))
    with pytest.raises(UserError, match="did not verify after writing: array 'x'"):
        write_orbax(tmp_path / "out", stream({"x": X}), {})
    assert os.listdir(tmp_path) == []
