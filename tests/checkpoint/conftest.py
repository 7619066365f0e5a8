"""A small state with every way of storing: stacked, padded, scalar, empty, narrow dtypes."""

import dataclasses
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoint import cells
from parallelism.layout import Layout, Logical, Stored

F32, BF16, I32 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.int32)


@dataclasses.dataclass
class State:
    """arrays on devices, their layout and shardings, and the logical values as numpy arrays (the oracle)."""

    arrays: dict
    layout: Layout
    shardings: dict
    logical: dict


def logical_values(seed=0):
    rng = np.random.default_rng(seed)
    values = {f"layers.{i}.w": rng.standard_normal((6, 8)).astype(np.float32) for i in range(4)}
    values["embed"] = rng.standard_normal((10, 8)).astype(BF16)
    values["count"] = np.asarray(rng.integers(1000), np.int32)
    values["nothing"] = np.zeros((0, 3), np.float32)
    return values


def make_layout(*, stacked, pad, dtypes=None):
    """pad: rows of the stored embedding (at least 10)."""
    dtypes = dtypes or {}

    def logical(name, shape, dtype, axes):
        return Logical(name, shape, np.dtype(dtypes.get(name.split(".")[0], dtype)), axes)

    layers = [logical(f"layers.{i}.w", (6, 8), F32, ("embed", "mlp")) for i in range(4)]
    embed = logical("embed", (10, 8), BF16, ("vocab", "embed"))
    count, nothing = logical("count", (), I32, ()), logical("nothing", (0, 3), F32, (None, None))
    if stacked:
        axes = ("layers", "embed", "mlp")
        stored = [Stored("layers.w", (4, 6, 8), layers[0].dtype, axes, tuple(layers), True)]
    else:
        stored = [Stored(x.name, x.shape, x.dtype, x.axes, (x,)) for x in layers]
    stored += [
        Stored("embed", (pad, 8), embed.dtype, embed.axes, (embed,)),
        Stored("count", (), count.dtype, (), (count,)),
        Stored("nothing", (0, 3), nothing.dtype, nothing.axes, (nothing,)),
    ]
    return Layout(stored)


def make_shardings(layout, mesh, spec):
    """spec: {axis name: mesh axis}."""
    return {
        key: NamedSharding(mesh, PartitionSpec(*(spec.get(axis) for axis in stored.axes)))
        for key, stored in layout.items()
    }


def to_stored(values, layout):
    """The stored arrays on the host, with 7 in the padding: it must never reach a checkpoint."""
    out = {}
    for key, stored in layout.items():
        whole = np.full(stored.shape, 7, stored.dtype)
        for row, part in enumerate(stored.parts):
            index = tuple(slice(0, n) for n in part.shape)
            whole[(row, *index) if stored.stacked else index] = values[part.name].astype(stored.dtype)
        out[key] = whole
    return out


def to_logical(arrays, layout):
    out = {}
    for key, stored in layout.items():
        whole = np.asarray(arrays[key])
        for row, part in enumerate(stored.parts):
            index = tuple(slice(0, n) for n in part.shape)
            out[part.name] = whole[(row, *index) if stored.stacked else index]
    return out


MESHES = {
    "fsdp=8": ((8,), ("fsdp",), {"mlp": "fsdp"}),
    "fsdp=2,tensor=4": ((2, 4), ("fsdp", "tensor"), {"embed": "fsdp", "mlp": "tensor", "vocab": "tensor"}),
    "stage=4,tensor=2": ((4, 2), ("stage", "tensor"), {"layers": "stage", "mlp": "tensor"}),
    "replicated": ((8,), ("data",), {}),
}


def make_state(mesh="fsdp=2,tensor=4", *, stacked=True, pad=12, seed=0, dtypes=None):
    shape, names, spec = MESHES[mesh]
    layout = make_layout(stacked=stacked, pad=pad, dtypes=dtypes)
    if mesh == "fsdp=2,tensor=4":
        spec = {**spec, "embed": "fsdp"}
    shardings = make_shardings(layout, Mesh(np.array(jax.devices()).reshape(shape), names), spec)
    values = logical_values(seed)
    arrays = {key: jax.device_put(x, shardings[key]) for key, x in to_stored(values, layout).items()}
    return State(arrays, layout, shardings, values)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(autouse=True)
def small_cells(monkeypatch):
    """So that the small arrays of tests have several a chunk."""
    monkeypatch.setattr(cells, "CELL_BYTES", 16)


@pytest.fixture
def quiet_reader():
    """What is read from another level is not told of thousands of times."""
    logger = logging.getLogger("checkpoint.reader")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


class Helpers:
    make_state = staticmethod(make_state)
    to_logical = staticmethod(to_logical)
    assert_same = staticmethod(assert_same)

    @staticmethod
    def check(restored, state):
        """The restored arrays equal the state's logical values, bit for bit."""
        assert_same(to_logical(restored.arrays, state.layout), state.logical)


@pytest.fixture(scope="session")
def h():
    return Helpers


@pytest.fixture
def state(h):
    return h.make_state()


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "ram", tmp_path / "disk"
