"""The format: encoding, damage, and cutting boxes into chunks."""

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import Level, Manager
from checkpoint.manifest import DTYPES, Array, Chunk, CorruptError, Manifest, check_coverage, digest, split
from parallelism.errors import UserError

CHUNK = Chunk((0, 0), (2, 3), "data-00000.bin", 0, 12, "0" * 32)
MANIFEST = Manifest(
    7, {"config": {"lr": 0.1}, "text": "é"}, {"a": Array(DTYPES["bfloat16"], (2, 3), ("x", None), (CHUNK,))}
)


def redigest(body):
    """Encode a changed body with a right digest, as another version of the program would."""
    head = json.dumps({k: v for k, v in body.items() if k != "digest"}).encode()[:-1]
    return head + f'\n,"digest":"{digest(head)}"}}\n'.encode()


def test_manifest_round_trips():
    assert Manifest.decode(MANIFEST.encode(), "m") == MANIFEST


def test_manifest_is_plain_json():
    body = json.loads(MANIFEST.encode())
    assert body["arrays"]["a"]["dtype"] == "bfloat16"
    assert body["meta"] == {"config": {"lr": 0.1}, "text": "é"}


def test_every_flipped_bit_of_a_manifest_is_found():
    data = MANIFEST.encode()
    for position in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[position] ^= 1 << bit
            with pytest.raises(CorruptError):
                Manifest.decode(bytes(bad), "m")


def test_every_truncation_of_a_manifest_is_found():
    data = MANIFEST.encode()
    for n in range(len(data)):
        with pytest.raises(CorruptError):
            Manifest.decode(data[:n], "m")


def test_newer_version_says_upgrade():
    with pytest.raises(UserError, match=r"version 9, newer than 2.*upgrade") as e:
        Manifest.decode(redigest({**json.loads(MANIFEST.encode()), "version": 9}), "m")
    assert not isinstance(e.value, CorruptError)


def test_foreign_format_is_refused():
    with pytest.raises(UserError, match="'other'"):
        Manifest.decode(redigest({**json.loads(MANIFEST.encode()), "format": "other"}), "m")


@pytest.mark.parametrize("change", [{"chunks": []}, {"shape": [2, 2]}, {"dtype": "float32"}])
def test_chunks_that_do_not_fill_the_array_are_found(change):
    body = json.loads(MANIFEST.encode())
    body["arrays"]["a"] |= change
    with pytest.raises(CorruptError, match="'a'"):
        Manifest.decode(redigest(body), "m")


def with_boxes(shape, boxes, **changes):
    """An array of bytes with these chunks (start, shape)."""
    chunks = [Chunk(start, size, "data", 0, math.prod(size), "0" * 32) for start, size in boxes]
    chunks = [dataclasses.replace(chunk, **changes) for chunk in chunks]
    return Array(DTYPES["int8"], tuple(shape), (None,) * len(shape), tuple(chunks))


@st.composite
def partitions(draw):
    """A shape, and boxes that fill it: cut in two where and as often as chance has it, so not only grids."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 12))):
        start, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axes = [d for d, n in enumerate(size) if n > 1]
        if not axes:
            boxes.append((start, size))
            continue
        axis = draw(st.sampled_from(axes))
        at = draw(st.integers(1, size[axis] - 1))
        boxes.append((start, (*size[:axis], at, *size[axis + 1 :])))
        boxes.append(
            ((*start[:axis], start[axis] + at, *start[axis + 1 :]), (*size[:axis], size[axis] - at, *size[axis + 1 :]))
        )
    return shape, draw(st.permutations(boxes))


@settings(max_examples=200, deadline=None)
@given(partitions(), st.data())
def test_boxes_that_fill_an_array_are_accepted_and_no_others(partition, data):
    shape, boxes = partition
    check_coverage("a", with_boxes(shape, boxes), "m")
    at, other = (data.draw(st.integers(0, len(boxes) - 1)) for _ in range(2))
    rest = boxes[:at] + boxes[at + 1 :]
    wrong = {"dropped": rest, "duplicated": [*boxes, boxes[at]]}
    if at != other:
        wrong["one for another"] = [*rest, boxes[other]]
    start, size = boxes[at]
    for axis, step in itertools.product(range(len(shape)), (-1, 1)):
        moved = (*start[:axis], start[axis] + step, *start[axis + 1 :])
        wrong[f"moved by {step} along {axis}"] = [*rest, (moved, size)]
        grown = (*size[:axis], size[axis] + step, *size[axis + 1 :])
        wrong[f"grown by {step} along {axis}"] = [*rest, (start, grown)]
    for what, chunks in wrong.items():
        with pytest.raises(CorruptError, match="'a'"):
            check_coverage("a", with_boxes(shape, chunks), "m")
            raise AssertionError(what)


def test_an_overlap_with_a_hole_is_found():
    """The elements are as many as they should be."""
    boxes = [((0, 0), (1, 2)), ((0, 1), (1, 2)), ((1, 0), (1, 2))]
    with pytest.raises(CorruptError, match=r"at \(0, 0\) and \(0, 1\) overlap"):
        check_coverage("a", with_boxes((2, 3), boxes), "m")


@pytest.mark.parametrize("shape", [(6_000, 1), (1, 6_000), (60, 100)])
def test_thousands_of_chunks_are_checked_in_a_moment(shape):
    boxes = [(index, (1, 1)) for index in np.ndindex(*shape)]
    began = time.perf_counter()
    check_coverage("a", with_boxes(shape, boxes), "m")
    assert time.perf_counter() - began < 5  # all pairs one by one would take minutes
    with pytest.raises(CorruptError, match="overlap"):
        check_coverage("a", with_boxes(shape, [*boxes[:-1], boxes[7]]), "m")


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_one_line(number):
    body = redigest(json.loads(MANIFEST.encode()) | {"meta": {"at": "HERE"}}).replace(b'"HERE"', number.encode())
    head = body[: body.rindex(b"\n,")]
    with pytest.raises(CorruptError, match=r"^m makes no sense"):
        Manifest.decode(head + f'\n,"digest":"{digest(head)}"}}\n'.encode(), "m")


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "a" * 256, "é" * 128, "../data", "a/b", "..", ".", "", "a\\b", "a\0", "c:x", 3, None]
)
def test_a_chunk_lies_beside_the_manifest(file):
    body = json.loads(MANIFEST.encode())
    body["arrays"]["a"]["chunks"][0]["file"] = file
    with pytest.raises(CorruptError, match=r"'a' has a chunk in .*beside the manifest"):
        Manifest.decode(redigest(body), "m")


@pytest.mark.parametrize(
    "change",
    [
        {"start": [0.0, 0]},
        {"start": "00"},
        {"shape": [2, True]},
        {"shape": None},
        {"shape": [2]},
        {"shape": [-2, -3]},
        {"offset": -1},
        {"offset": "0"},
        {"offset": 2**63},
        {"nbytes": 10**400},
        {"digest": 7},
        {"digest": "0" * 31},
        {"digest": "G" * 32},
        {"zstd": [7, None]},
        {"nbytes": 12.0},
        {"grid": [1]},
        {"grid": [0, 1]},
        {"grid": [2, 2]},
        {"grid": [1.0, 1]},
        {"grid": 3},
    ],
    ids=str,
)
def test_a_chunk_that_makes_no_sense_is_one_line(change):
    body = json.loads(MANIFEST.encode())
    body["arrays"]["a"]["chunks"][0] |= change
    with pytest.raises(CorruptError, match=r"^m") as error:
        Manifest.decode(redigest(body), "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"shape": [2**63, 0], "chunks": []}, {"shape": "23"}, {"chunks": 3}, {"axes": 3}])
def test_an_array_that_makes_no_sense_is_one_line(change):
    body = json.loads(MANIFEST.encode())
    body["arrays"]["a"] |= change
    with pytest.raises(CorruptError, match=r"^m makes no sense"):
        Manifest.decode(redigest(body), "m")


def test_meta_that_is_not_json_is_refused():
    with pytest.raises(ValueError):
        Manifest(1, {"loss": math.nan}, {}).encode()


def test_dtypes_are_known_by_their_numpy_names():
    assert DTYPES["bfloat16"] == ml_dtypes.bfloat16
    assert all(dtype.name == name for name, dtype in DTYPES.items())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([1, 2, 4]), st.integers(1, 200))
def test_split_cuts_row_major_bytes_into_runs_within_the_limit(shape, itemsize, limit):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    parts = [
        numbers[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].ravel()
        for start, size in split(tuple(shape), itemsize, limit)
    ]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *parts]), numbers.ravel())
    assert all(0 < part.size * itemsize <= max(limit, itemsize) for part in parts)


def test_the_reader_in_the_format_document_reads_what_is_saved(tmp_path, h):
    text = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    scope = {}
    exec(text.split("```python")[1].split("```")[0], scope)
    state = h.make_state()
    with Manager([Level("disk", tmp_path)], chunk_bytes=40) as manager:
        manager.save(1, state.arrays, state.layout, {}).wait()
    h.assert_same({name: scope["read"](tmp_path / "step-00000001", name) for name in state.logical}, state.logical)
