"""DCP directories that torch writes, by one process and by two."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.formats.dcp import DCPDir
from checkpoint.manifest import CorruptError
from parallelism.errors import UserError

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAMES = "bool uint8 int8 int16 int32 int64 float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2 complex64".split()  # noqa: SIM905


def tensor(name):
    return (torch.arange(12).reshape(3, 4) % 5).to(getattr(torch, name))


def array(name):
    """What ``tensor`` is."""
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    return (np.arange(12).reshape(3, 4) % 5).astype(dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By one process: every dtype, and all that a state dictionary may hold."""
    path = tmp_path_factory.mktemp("saved")
    state = {
        "dtypes": {name: tensor(name) for name in NAMES},
        "layers": [{"weight": torch.arange(6.0).reshape(2, 3).T}, {"weight": torch.arange(10.0)[2:5]}],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "step": 3,
        "text": {"name": "not an array"},
    }
    dcp.save(state, checkpoint_id=path)
    return path


EXPECTED = {f"dtypes.{name}": array(name) for name in NAMES} | {
    "layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "layers.1.weight": np.arange(2, 5, dtype=np.float32),
    "scalar": np.asarray(7),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.ones(2, np.float32),
}


def test_tensors_of_every_dtype_are_read(saved):
    found = DCPDir(saved)
    assert set(found) == set(EXPECTED)
    for name, value in EXPECTED.items():
        got = found.read(name)
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (value.shape, value.dtype, value.nbytes)
        assert (got.shape, got.dtype, got.tobytes()) == (value.shape, value.dtype, value.tobytes()), name


WORKER = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(path + ".store", 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35.0).reshape(5, 7)
state = {
    "rows": distribute_tensor(whole, mesh, [Shard(0)]),
    "columns": distribute_tensor(whole.bfloat16(), mesh, [Shard(1)]),
    "both": distribute_tensor(whole, mesh, [Replicate()]),
}
dcp.save({"model": state}, checkpoint_id=path)
dist.barrier()
os._exit(0)  # torch's own threads sometimes abort an ordinary exit
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """By two processes: uneven shards of rows and of columns."""
    path = tmp_path_factory.mktemp("sharded") / "saved"
    run = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in run] == [0, 0]
    return path


WHOLE = np.arange(35, dtype=np.float32).reshape(5, 7)


def test_shards_of_several_processes_are_one_array(sharded):
    assert len(list(sharded.glob("*.distcp"))) == 2
    found = DCPDir(sharded)
    assert {name: info.shape for name, info in found.items()} == {
        "model.rows": (5, 7), "model.columns": (5, 7), "model.both": (5, 7)
    }  # fmt: skip
    np.testing.assert_array_equal(found.read("model.rows"), WHOLE)
    np.testing.assert_array_equal(found.read("model.columns"), WHOLE.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found.read("model.both"), WHOLE)


@settings(deadline=None)
@given(st.sampled_from(["rows", "columns", "both"]), *[st.tuples(*[st.integers(0, n)] * 2).map(sorted) for n in (5, 7)])
def test_a_box_is_that_box_of_the_whole(sharded, name, rows, columns):
    box = slice(*rows), slice(*columns)
    np.testing.assert_array_equal(DCPDir(sharded).read(f"model.{name}", box), WHOLE[box])


def test_only_the_chunks_of_a_box_are_read(sharded, tmp_path):
    for file in (".metadata", "__0_0.distcp"):  # rows 0 to 2
        os.link(sharded / file, tmp_path / file)
    found = DCPDir(tmp_path)
    np.testing.assert_array_equal(found.read("model.rows", (slice(0, 3), slice(0, 7))), WHOLE[:3])
    with pytest.raises(CorruptError, match=r"__1_0\.distcp: cannot be read") as error:
        found.read("model.rows", (slice(2, 4), slice(0, 7)))
    assert "\n" not in str(error.value)


def test_views_that_are_conjugated_or_negated_when_read_have_their_values(tmp_path):
    z = torch.arange(4) + 1j * torch.arange(1, 5)
    state = {"conj": z.conj(), "neg": torch._neg_view(torch.arange(3.0)), "both": torch._neg_view(z).conj()}
    assert state["conj"].is_conj() and state["neg"].is_neg()
    state["imag"] = z.conj().imag
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = {name: torch.zeros_like(value.resolve_conj().resolve_neg()) for name, value in state.items()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    found = DCPDir(tmp_path)
    for name, value in state.items():
        np.testing.assert_array_equal(found.read(name), loaded[name].numpy(), strict=True, err_msg=name)
        assert torch.equal(loaded[name], value)


def test_a_flipped_bit_is_found(tmp_path):
    dcp.save({"x": torch.arange(1000.0)}, checkpoint_id=tmp_path)
    raw = (tmp_path / "__0_0.distcp").read_bytes()
    begin = raw.index(np.arange(1000, dtype=np.float32).tobytes())
    for at in np.random.default_rng(0).integers(begin, begin + 4000, 20):
        changed = bytearray(raw)
        changed[at] ^= 4
        (tmp_path / "__0_0.distcp").write_bytes(changed)
        with pytest.raises(CorruptError, match="Bad CRC-32"):
            DCPDir(tmp_path).read("x")


def test_chunks_saved_without_checksums_are_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always saves them")
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save({"x": torch.arange(9.0)}, checkpoint_id=tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(DCPDir(tmp_path).read("x"), np.arange(9, dtype=np.float32))


def test_torch_that_is_missing_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch.*pip install 'jaxsys\[dcp\]'"):
        DCPDir(saved)


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_something_is_refused_and_not_run(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": Runs(tmp_path / "made")}))
    with pytest.raises(CorruptError, match=r"it names (_io|io)\.open") as error:
        DCPDir(tmp_path)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [".metadata"]


def test_a_chunk_that_runs_something_is_refused_and_not_run(tmp_path):
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    torch.save(Runs(tmp_path / "made"), tmp_path / "__0_0.distcp")
    change(tmp_path, length=os.path.getsize(tmp_path / "__0_0.distcp"))
    with pytest.raises(CorruptError, match=r"the chunk of tensor 'x' at \(0,\) is damaged") as error:
        DCPDir(tmp_path).read("x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def change(path, size=None, dtype=None, **place):
    """Changes what the metadata says of the one tensor there, and of where it lies."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (entry,), (info,) = metadata.state_dict_metadata.values(), metadata.storage_data.values()
    entry.size = torch.Size(size or entry.size)
    entry.properties.dtype = dtype or entry.properties.dtype
    for name, value in place.items():
        setattr(info, name, value)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_path": "../other"}, r"'\.\./other', not the name of a file beside it"),
        ({"relative_path": "missing"}, "missing: cannot be read"),
        ({"offset": -1}, "lies at -1"),
        ({"offset": 8}, "cut short"),
        ({"length": 400}, "is damaged"),
        ({"transform_descriptors": ["zstd"]}, "stored by"),
        ({"size": (4,)}, "hold 2 elements, expected 4"),
        ({"dtype": torch.float64}, "expected float64"),
        ({"dtype": torch.qint8}, "has dtype qint8, which is not read here"),
        ({"dtype": torch.complex32}, "has dtype complex32, which is not read here"),
        ({"dtype": "float36"}, "damaged or of another kind .*has dtype 'float36'"),
        ({"dtype": "a\nline"}, r"damaged or of another kind .*has dtype 'a\\nline'"),
    ],
)
def test_metadata_that_makes_no_sense_is_one_line(tmp_path, changes, message):
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        DCPDir(tmp_path).read("x")
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_any_damage_to_the_metadata_is_an_error_of_one_line_or_harmless(saved, tmp_path_factory, where, flip, cut):
    raw = bytearray((saved / ".metadata").read_bytes())
    at = int(where * len(raw))
    raw[at] ^= flip
    path = tmp_path_factory.mktemp("damaged")
    (path / ".metadata").write_bytes(raw[:at] if cut else raw)
    try:
        DCPDir(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_directory_without_metadata_is_named(tmp_path):
    with pytest.raises(UserError, match=r"\.metadata: not a DCP directory"):
        DCPDir(tmp_path)


def test_an_unknown_tensor_is_named(saved):
    with pytest.raises(UserError, match=r"no tensor 'other' among the 18"):
        DCPDir(saved).read("other")
