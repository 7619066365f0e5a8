"""safetensors reading and writing against the safetensors library."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.formats.safetensors import INDEX, SINGLE, SafetensorsDir, write_safetensors
from parallelism.errors import UserError

RNG = np.random.default_rng(0)
DTYPES = [
    np.float32,
    np.float16,
    np.float64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int32,
    np.bool_,
]


def arrays(count=6, rows=40):
    return {f"layers.{i}.w": RNG.standard_normal((rows, i + 1)).astype(DTYPES[i % len(DTYPES)]) for i in range(count)}


def assert_same(directory, expected):
    got = SafetensorsDir(directory)
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(got.read(name), array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_back(tmp_path, dtype):
    expected = {
        "a": RNG.standard_normal((3, 5)).astype(dtype),
        "scalar": np.ones((), dtype),
        "none": np.ones((0, 4), dtype),
    }
    assert write_safetensors(tmp_path, expected.items()) == [tmp_path / SINGLE]
    assert_same(tmp_path, expected)
    assert_same(tmp_path / SINGLE, expected)


def test_the_library_reads_what_is_written(tmp_path):
    expected = {k: v for k, v in arrays(4).items()}
    write_safetensors(tmp_path, expected.items(), metadata={"author": "me"})
    with safetensors.safe_open(tmp_path / SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt", "author": "me"}
        assert set(file.keys()) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_what_the_library_writes_is_read(tmp_path):
    expected = {
        "b": RNG.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
        "a": np.arange(7),
        "c": np.float32([[1.5]]),
    }
    safetensors.numpy.save_file(expected, tmp_path / "any.safetensors")
    assert_same(tmp_path / "any.safetensors", expected)


def test_shards_stay_under_the_limit_and_are_indexed(tmp_path):
    expected = {f"w{i}": RNG.standard_normal((10, 10)).astype(np.float32) for i in range(7)}
    files = write_safetensors(tmp_path, expected.items(), max_shard_bytes=1000)
    assert [f.name for f in files] == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2800
    assert index["weight_map"]["w6"] == files[3].name
    for file in files:
        with safetensors.safe_open(file, "np") as opened:
            assert sum(opened.get_tensor(k).nbytes for k in opened.keys()) <= 1000  # noqa: SIM118
    assert sorted(os.listdir(tmp_path)) == sorted([INDEX, *(f.name for f in files)])
    assert_same(tmp_path, expected)


def test_an_array_larger_than_the_limit_gets_its_own_shard(tmp_path):
    expected = {"a": np.ones(2, np.float32), "big": np.ones(1000, np.float32), "b": np.ones(2, np.float32)}
    assert len(write_safetensors(tmp_path, expected.items(), max_shard_bytes=100)) == 3
    assert_same(tmp_path, expected)


def test_a_header_that_outgrows_its_room_opens_another_shard(tmp_path):
    expected = {f"{i:04}" + "n" * 1000: np.ones(1, np.int8) for i in range(300)}
    assert len(write_safetensors(tmp_path, expected.items())) == 2
    assert_same(tmp_path, expected)


def test_writing_holds_one_array_at_a_time(tmp_path):
    alive = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is None

    def stream():
        nonlocal alive
        for i in range(5):
            alive += 1
            assert alive <= 2, "the previous array and the one being made"
            yield f"w{i}", np.full(1000, i, np.float32).view(Counted).copy()

    write_safetensors(tmp_path, stream())
    assert len(SafetensorsDir(tmp_path)) == 5


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_box_is_what_numpy_slices(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    box = tuple(slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape)
    directory = tmp_path_factory.mktemp("box")
    write_safetensors(directory, [("other", np.ones(3, np.int8)), ("w", array)])
    got = SafetensorsDir(directory).read("w", box)
    np.testing.assert_array_equal(got, array[box])
    assert got.flags.c_contiguous
    assert got.flags.writeable


def test_existing_weights_are_left_alone(tmp_path):
    write_safetensors(tmp_path, [("a", np.ones(2))])
    before = (tmp_path / SINGLE).read_bytes()
    with pytest.raises(UserError, match="holds weights already"):
        write_safetensors(tmp_path, [("a", np.zeros(2))])
    assert (tmp_path / SINGLE).read_bytes() == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_no_files(tmp_path, failure):
    def stream():
        yield "a", np.ones(100)
        yield "b", np.ones(100)
        raise failure

    with pytest.raises(failure):
        write_safetensors(tmp_path, stream(), max_shard_bytes=800)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/model: cannot write the weights"):
        write_safetensors(tmp_path / "file" / "model", [("a", np.ones(2))])


def test_a_name_given_twice_is_an_error(tmp_path):
    with pytest.raises(UserError, match="'a' is given twice"):
        write_safetensors(tmp_path, [("a", np.ones(2)), ("a", np.ones(2))])


def test_a_dtype_outside_the_format_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"'a'.*complex128"):
        write_safetensors(tmp_path, [("a", np.ones(2, np.complex128))])


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match="no safetensors weights"):
        SafetensorsDir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        SafetensorsDir(tmp_path / "nowhere")


def sharded(directory):
    return write_safetensors(directory, [(f"w{i}", np.full(10, i, np.float32)) for i in range(3)], max_shard_bytes=40)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors, which is not there"):
        SafetensorsDir(tmp_path)


def test_an_array_in_two_files_is_named_with_both(tmp_path):
    first, second, _ = sharded(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=rf"'w0' is in {first.name} and {second.name}"):
        SafetensorsDir(tmp_path)


def test_an_array_that_only_the_index_knows_is_named(tmp_path):
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["w0"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="'ghost'"):
        SafetensorsDir(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 200_000, '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_one_line(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match="index"):
        SafetensorsDir(tmp_path)


def test_every_truncation_is_one_line_naming_the_file(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(10, np.float32)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for size in range(len(whole)):
        cut = tmp_path / SINGLE
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors") as error:
            SafetensorsDir(tmp_path)
        assert "\n" not in str(error.value)


def entry(shape=(2,), offsets=(0, 8), dtype="F32", name="a"):
    return f'"{name}": ' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


HEADERS = {
    "an unknown dtype": (entry(dtype="F4"), "'a' has dtype 'F4'"),
    "a dtype that is a list": (entry(dtype=["F32"]), "'a' has dtype ['F32']"),
    "a negative start": (entry(offsets=[-8, 0]), "'a' lies at [-8, 0]"),
    "an end before the start": (entry(offsets=[8, 0]), "'a' lies at [8, 0]"),
    "offsets as strings": (entry(offsets=["0", "8"]), "'a' lies at ['0', '8']"),
    "offsets as floats": (entry(offsets=[0.0, 8.0]), "'a' lies at [0.0, 8.0]"),
    "one offset": (entry(offsets=[0]), "'a' lies at [0]"),
    "a float shape": (entry([2.0]), "'a' has the shape [2.0]"),
    "a truth for a size": (entry([2, True]), "'a' has the shape [2, True]"),
    "a negative shape": (entry([-1, -2]), "'a' has the shape [-1, -2]"),
    "a string shape": (entry("2"), "'a' has the shape '2'"),
    "a shape beyond memory": (entry([2**63, 0], [0, 0]), "'a' has the shape [9223372036854775808, 0]"),
    "a product beyond memory": (entry([2**40, 2**40, 0], [0, 0]), "'a' has the shape [1099511627776,"),
    "65 dimensions": (entry([1] * 65, [0, 4]), "'a' has the shape [1, 1,"),
    "bytes that do not fit the shape": (entry([3]), "'a' of shape [3] and dtype F32 has 8 bytes"),
    "a missing field": ('"a": {"dtype": "F32", "shape": [2]}', "'a' lacks one of dtype, shape, data_offsets"),
    "an array for an entry": ('"a": []', "'a' lacks"),
    "overlapping arrays": (entry() + "," + entry(offsets=[4, 12], name="b"), "'a' and 'b' overlap"),
    "the same bytes twice": (entry() + "," + entry(name="b"), "'a' and 'b' overlap"),
    "a name twice": (entry() + "," + entry(offsets=[8, 16]), "'a' is there twice"),
    "a field twice": (entry()[:-1] + ', "dtype": "F32"}', "'dtype' is there twice"),
    "endless depth": ('"a": ' + "[" * 200_000, "recursion"),
    "a number of many digits": (entry().replace("8", "8" * 9999), "digits"),
    "an array beyond the file": (entry([9], [0, 36]), "'a' ends at byte"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_makes_no_sense_is_one_line_naming_the_file(tmp_path, case):
    entries, said = HEADERS[case]
    header = "{" + entries + "}"
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(UserError) as error:
        SafetensorsDir(tmp_path)
    assert said in str(error.value) and str(tmp_path / SINGLE) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_that_is_a_list_is_refused(tmp_path):
    (tmp_path / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(UserError, match="it is a list, expected an object"):
        SafetensorsDir(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_header_is_read_within_the_file_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    whole = bytearray(safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int16)}))
    header = whole[8 : -(24 + 8)]
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.sampled_from(b'0123456789-.,:"[]{}aFI'))
    path.write_bytes(whole[:8] + header + whole[-(24 + 8) :])
    try:
        found = SafetensorsDir(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert sum(found.read(name).nbytes for name in found) <= 24 + 8


@pytest.mark.parametrize("file", [3, None, "../model.safetensors", "/model.safetensors", "", "..", "a\0b"])
def test_an_index_names_files_beside_it(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"'a' is in .*beside the index"):
        SafetensorsDir(tmp_path)
