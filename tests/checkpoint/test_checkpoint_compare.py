"""What ``diff`` finds, against Python's own arithmetic, an element at a time."""

import contextlib
import io
import math
from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import CheckpointSource, cells, compare, diff
from checkpoint.manifest import DTYPES, CorruptError
from checkpoint.reader import CheckpointReader
from checkpoint.writer import ChunkWriter, Piece, blocks_of, manifest_of
from parallelism.errors import UserError
from parallelism.layout import Logical


class Memory:
    """Files of a checkpoint, in a dictionary."""

    def __init__(self, where, files):
        self.where, self.files = where, files

    def read(self, name):
        return self.files[name]

    def read_into(self, name, offset, buffer):
        buffer[:] = self.files[name][offset : offset + len(buffer)]


def source(arrays, chunk_bytes=64, where="a"):
    """A checkpoint of numpy arrays."""
    specs = {n: Logical(n, x.shape, x.dtype, (None,) * x.ndim) for n, x in arrays.items()}
    file = io.BytesIO()
    pieces = [Piece(specs[n], (0,) * x.ndim, np.ascontiguousarray(x).reshape(x.shape)) for n, x in arrays.items()]
    writer = ChunkWriter(lambda name: contextlib.nullcontext(file), lambda number: "data")
    for block in blocks_of(pieces, chunk_bytes):
        writer.add(block)
    manifest = manifest_of(1, {}, specs.values(), writer.chunks)
    return CheckpointSource(
        CheckpointReader(Memory(where, {"manifest.json": manifest.encode(), "data": file.getvalue()}))
    )


def expected(x, y, tolerance=None):
    """(different, nans, largest difference, largest relative) by Python."""
    different = nans = 0
    largest = relative = 0.0
    kind = complex if "complex" in x.dtype.name else float if "float" in x.dtype.name else int
    for p, q in zip(x.reshape(-1), y.reshape(-1), strict=True):
        a, b = kind(p), kind(q)
        nan = [v != v for v in (a, b)]
        d = 0 if a == b or any(nan) else abs(a - b)
        most = max(abs(a), abs(b)) if not any(nan) else 0
        if tolerance is not None:
            same = a == b or all(nan) or (not any(nan) and d <= tolerance * most)
        else:
            same = a == b if kind is int else p.tobytes() == q.tobytes()
        if not same:
            different += 1
            nans += nan[0] != nan[1]
            largest = max(largest, float(d))
            if d:
                relative = max(relative, math.inf if d == math.inf else float(d) / float(most))
    return different, nans, largest, relative


def found(report, x, y):
    """As ``expected``, once it is sure that the place is one of the largest difference."""
    if report.same:
        return 0, 0, 0.0, 0.0
    (array,) = report.differing
    if array.different:
        a, b = ([v[array.where]] for v in (x, y))
        different, nans, largest, _ = expected(np.array(a, x.dtype), np.array(b, y.dtype))
        assert different == 1 and largest == pytest.approx(array.largest_difference, rel=1e-12)
        assert not nans or array.nans == array.different
    return array.different, array.nans, array.largest_difference, array.largest_relative


SPECIAL = [0.0, -0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e-3, 3e38]
INTEGERS = [0, 1, -1, 3, -8, 7, 2**31 - 1, -(2**63), 2**63 - 1, 2**64 - 1]


@st.composite
def pairs(draw, names=tuple(DTYPES)):
    """Two arrays of one shape and dtype, most elements the same."""
    dtype = DTYPES[draw(st.sampled_from(names))]
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    seed, changed = draw(st.integers(0, 999)), draw(st.sampled_from([0.0, 0.1, 1.0]))
    rng = np.random.default_rng(seed)

    @np.errstate(all="ignore")
    def values():
        if dtype.kind == "b":
            return rng.integers(0, 2, shape).astype(bool)
        if "int" in dtype.name:
            info = ml_dtypes.iinfo(dtype) if dtype.itemsize == 1 else np.iinfo(dtype)
            fitting = [n for n in INTEGERS if int(info.min) <= n <= int(info.max)]
            return (
                np.array([fitting[i] for i in rng.integers(0, len(fitting), math.prod(shape))])
                .astype(dtype)
                .reshape(shape)
            )
        out = np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), rng.standard_normal(shape))
        if "complex" in dtype.name:
            out = np.where(np.isfinite(out), out, 2.0) + 1j * rng.choice([0.0, 1.0, 2.5], shape)
        return np.asarray(out).astype(dtype)

    x = np.asarray(values())
    y = np.asarray(np.where(rng.random(shape) < changed, values(), x), dtype)
    return x, y


@settings(max_examples=150, deadline=None)
@given(pairs(), st.sampled_from([16, 64, 1 << 20]), st.sampled_from([16, 64, 1 << 20]), st.booleans())
def test_what_differs_is_what_differs_element_by_element(pair, one, other, full):
    x, y = pair
    report = diff(source({"x": x}, one), source({"x": y}, other), full=full)
    assert found(report, x, y) == pytest.approx(expected(x, y), rel=1e-12)
    assert report.arrays == 1


@settings(max_examples=60, deadline=None)
@given(
    pairs(("float32", "bfloat16", "float8_e4m3fn", "float64", "int4", "int32")),
    st.sampled_from(["float32", "float64", "bfloat16"]),
    st.sampled_from([0.0, 1e-3, 0.5]),
)
def test_with_a_tolerance_values_of_any_dtype_are_compared(pair, other, tolerance):
    x, y = pair
    with np.errstate(all="ignore"):
        y = y.astype(DTYPES[other])
    report = diff(source({"x": x}), source({"x": y}), tolerance=tolerance)
    wide = (v.astype(np.float64) for v in (x, y))
    different, nans, largest, relative = expected(*wide, tolerance)
    counted = found(report, x.astype(np.float64), y.astype(np.float64))
    assert counted == pytest.approx((different, nans, largest, relative), rel=1e-12)


def only(x, y, **options):
    (array,) = diff(source({"x": x}), source({"x": y}), **options).differing
    return array.different, array.nans, array.largest_difference, array.largest_relative, array.where


def test_a_tolerance_is_a_part_of_the_larger_value():
    x, y = np.array([100.0, 100.0, -100.0, 0.0]), np.array([101.0, 101.02, -99.0, 0.0])
    assert only(x, y, tolerance=0.01) == (1, 0, pytest.approx(1.02), pytest.approx(1.02 / 101.02), (1,))
    assert diff(source({"x": x}), source({"x": y}), tolerance=0.0101).same


def test_every_bit_counts_without_a_tolerance():
    x = np.array([math.nan, 0.0, 1.0])
    y = np.array([math.nan, -0.0, 1.0])
    y.view(np.uint64)[0] ^= 1
    assert only(x, y) == (2, 0, 0.0, 0.0, (0,))
    assert diff(source({"x": x}), source({"x": y}), tolerance=0).same
    infinite = np.array([complex(math.inf, 0.0)])
    assert only(infinite, infinite.conj()) == (1, 0, 0.0, 0.0, (0,))


def test_integers_of_64_bits_are_compared_as_such():
    x = np.array([2**62, 2**62 + 1, -(2**63)])
    y = np.array([2**62 + 256, 2**62 + 1, 2**63 - 1])
    assert only(x, y) == (2, 0, 2.0**64, pytest.approx(2.0), (2,))
    assert only(x[:1], y[:1]) == (1, 0, 256.0, pytest.approx(2.0**-54), (0,))


def test_what_has_the_same_digest_is_not_read():
    x = np.arange(64, dtype=np.float32)
    y = x.copy()
    y[40] += 1
    a, b = source({"x": x, "same": x}), source({"x": y, "same": x})
    report = diff(a, b)
    assert report.skipped_bytes == 256 + 192 and report.compared_bytes == 2 * 64
    assert a.reader.bytes_read == b.reader.bytes_read == sum(c.stored_bytes for c in a.reader.array("x").chunks) // 4
    full = diff(a, b, full=True)
    assert (full.skipped_bytes, full.compared_bytes, full.differing) == (0, 2 * 512, report.differing)
    assert [(d.name, d.where, d.different) for d in report.differing] == [("x", (40,), 1)]


def test_the_same_bytes_of_another_dtype_are_not_the_same():
    x = np.zeros(8, np.int32)
    (array,) = diff(source({"x": x}), source({"x": x.view(np.float32)})).differing
    assert (array.dtypes, array.different) == (("int32", "float32"), 0)
    assert diff(source({"x": x}), source({"x": x.view(np.float32)}), tolerance=0).same


def test_names_and_shapes_that_differ():
    a = source({"both": np.ones(3), "only a": np.ones(2), "shape": np.ones((2, 3)), "empty": np.ones((0, 2))})
    b = source({"both": np.ones(3), "only b": np.ones(2), "shape": np.ones((3, 2)), "empty": np.ones((0, 2))})
    found = {d.name: (d.shapes, d.different) for d in diff(a, b).differing}
    assert found == {
        "only a": (((2,), None), 0),
        "only b": ((None, (2,)), 0),
        "shape": (((2, 3), (3, 2)), 0),
    }
    assert diff(a, b, select=["b*", "empty"]).arrays == 2


def test_boxes_of_bounded_size_are_read(monkeypatch):
    monkeypatch.setattr(compare, "CHUNK_BYTES", 128)
    monkeypatch.setattr(cells, "CELL_BYTES", 16)
    monkeypatch.setattr(compare, "ELEMENTS", 5)
    x = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    y = x.copy()
    y[9, 7], y[15, 11] = 5.5, x[15, 11] + 1
    seen = defaultdict(list)

    class Plain:
        """Not a checkpoint of ours."""

        def __init__(self, where, array):
            self.where, self.array, self.arrays = where, array, source({"x": array}).arrays

        def read(self, name, box):
            seen[self.where].append(self.array[box].nbytes)
            return self.array[box]

    reports = [diff(Plain("a", x), Plain("b", y)), diff(source({"x": x}, 1 << 20), Plain("c", y))]
    for report in reports:
        assert found(report, x, y) == pytest.approx(expected(x, y), rel=1e-12)
    for sizes in seen.values():
        assert max(sizes) <= 128 and sum(sizes) == x.nbytes


def test_damage_is_not_a_difference():
    x = np.arange(64, dtype=np.float32)
    a, b = source({"x": x}), source({"x": x + 1}, where="b")
    files = b.reader._files.files
    files["data"] = bytes([files["data"][0] ^ 1]) + files["data"][1:]
    with pytest.raises(CorruptError, match=r"bytes 0 to .* of b/data are damaged"):
        diff(a, b)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    x = source({"x": np.ones(1)})
    with pytest.raises(UserError, match="expected a number from 0 on"):
        diff(x, x, tolerance=tolerance)


def test_a_pattern_that_meets_nothing_is_refused_with_what_is_near():
    x = source({"layers.0.w": np.ones(1), "embed": np.ones(1)})
    with pytest.raises(
        UserError, match=r"select 'layer.0.w' meets none of the 2 arrays of a and a; near it are layers.0.w"
    ):
        diff(x, x, select=["embed", "layer.0.w"])
