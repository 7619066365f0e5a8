"""Arrays that a checkpoint has otherwise than the model: renamed, fused, split, transposed."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from checkpoint import Level, Manager, Origin, load, open_checkpoint
from checkpoint.reader import CheckpointReader
from checkpoint.reshard import check_match, fill, plan_array
from checkpoint.reshard import write as write_checkpoint
from checkpoint.storage import LocalFiles
from checkpoint.writer import Piece
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored

F32 = np.dtype(np.float32)


def spec_of(name, value):
    return Logical(name, value.shape, value.dtype, (None,) * value.ndim)


def write(path, values, chunk_bytes=32):
    specs = {name: spec_of(name, value) for name, value in values.items()}
    pieces = [Piece(specs[n], (0,) * v.ndim, np.ascontiguousarray(v)) for n, v in values.items()]
    return write_checkpoint(path, 1, {}, specs.values(), pieces, chunk_bytes)


def layout_of(values):
    return Layout([Stored(n, v.shape, v.dtype, (None,) * v.ndim, (spec_of(n, v),)) for n, v in values.items()])


def loaded(path, values, origins, **how):
    layout, device = layout_of(values), SingleDeviceSharding(jax.devices()[0])
    return load(open_checkpoint(path), layout, dict.fromkeys(layout, device), origins=origins, **how)


def same(arrays, values):
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), value)


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((6, n)).astype(np.float32) for name, n in (("q", 8), ("k", 4), ("v", 4))}


STARTS = {"q": (0, 0), "k": (0, -8), "v": (0, -12)}


def test_a_renamed_array(tmp_path, values):
    path = write(tmp_path / "c", {f"old.{name}": value for name, value in values.items()})
    same(loaded(path, values, {name: [Origin(f"old.{name}")] for name in values})[0], values)


def test_fused_arrays_into_each(tmp_path, values):
    path = write(tmp_path / "c", {"qkv": np.concatenate(list(values.values()), 1)})
    arrays, metrics = loaded(path, values, {name: [Origin("qkv", start)] for name, start in STARTS.items()})
    same(arrays, values)
    assert metrics.bytes_needed == 6 * 16 * 4


def test_each_into_a_fused_array(tmp_path, values):
    path = write(tmp_path / "c", values)
    fused = {"qkv": np.concatenate(list(values.values()), 1)}
    origins = {"qkv": [Origin(name, (0, -start)) for name, (_, start) in STARTS.items()]}
    same(loaded(path, fused, origins)[0], fused)


def test_a_transposed_array(tmp_path, values):
    path = write(tmp_path / "c", {name: value.T for name, value in values.items()})
    same(loaded(path, values, {name: [Origin(name, order=(1, 0))] for name in values})[0], values)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_cut_and_order_on_both_sides(tmp_path_factory, data):
    """One array, cut along an axis into some that the checkpoint has and others that the model has, each transposed."""
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    orders = st.permutations(range(len(shape)))

    def cut():
        at = sorted({0, shape[axis], *draw(st.lists(st.integers(0, shape[axis]), max_size=2))})
        return [(lo, np.take(whole, range(lo, hi), axis)) for lo, hi in itertools.pairwise(at)]

    there, orders_there = {}, {}
    for i, (lo, value) in enumerate(cut()):
        orders_there[f"there.{i}"] = lo, draw(orders)
        there[f"there.{i}"] = value.transpose(orders_there[f"there.{i}"][1])
    path = write(tmp_path_factory.mktemp("origins") / "c", there, draw(st.integers(4, 64)))
    here = {f"here.{i}": (lo, value) for i, (lo, value) in enumerate(cut())}
    values = {name: value for name, (_, value) in here.items()}
    origins = {}
    for name, (lo, _) in here.items():
        origins[name] = []
        for source, (begin, order) in orders_there.items():
            start = [0] * len(shape)
            start[axis] = begin - lo
            back = tuple(int(d) for d in np.argsort(order))
            origins[name].append(Origin(source, tuple(start), draw(st.sampled_from([back]))))
    reader = CheckpointReader(LocalFiles(path))
    check_match(reader.manifest, layout_of(values), "here", origins=origins)
    for name, stored in layout_of(values).items():
        (piece,) = fill(reader, plan_array(reader.manifest, stored, (stored.parts[0].box,), origins))
        np.testing.assert_array_equal(piece, values[name])


def test_a_manager_restores_by_origins(tmp_path, values):
    device = SingleDeviceSharding(jax.devices()[0])
    fused = {"qkv": np.concatenate(list(values.values()), 1)}
    with Manager([Level("disk", tmp_path)]) as manager:
        manager.save(1, {"qkv": jax.device_put(fused["qkv"], device)}, layout_of(fused), {}).wait()
        origins = {name: [Origin("qkv", start)] for name, start in STARTS.items()}
        layout = layout_of(values)
        restored = manager.restore(layout=layout, shardings=dict.fromkeys(layout, device), origins=origins)
    same(restored.arrays, values)


@pytest.mark.parametrize(
    ("origins", "message"),
    [
        ({"nope": [Origin("q")]}, "origins are given of arrays that the model does not have: nope"),
        ({"q": Origin("q")}, r"origins of array 'q': found Origin\(.*\), expected a list such as \[Origin\("),
        ({"q": "q"}, "origins of array 'q': found 'q', expected a list"),
        ({"q": [Origin("other")]}, r"1 missing from it \(other\)"),
        ({"q": [Origin("k"), Origin("v", (0, 4))]}, "1 not in the model"),
        (
            {"q": [Origin("q"), Origin("k")]},
            r"the origins of array 'q' \(q, k\) fill 72 of its 48 elements, some twice",
        ),
        ({"q": [Origin("q", (0, 1))]}, "fill 42 of its 48 elements, and no more"),
        ({"q": [Origin("q", order=(0, 0))]}, r"order \(0, 0\) and start None; give one number a dimension"),
        ({"q": [Origin("q", (0,))]}, "give one number a dimension"),
    ],
)
def test_origins_that_do_not_fit_are_refused(tmp_path, values, origins, message):
    path = write(tmp_path / "c", values)
    with pytest.raises(UserError, match=message):
        loaded(path, values, origins)
