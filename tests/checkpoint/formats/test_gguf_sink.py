"""GGUF files as conversions write them, read by the gguf package and by our reader."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import NativeSource, Rules, conversion, convert, write
from checkpoint.formats.gguf import GGUFFile
from checkpoint.formats.gguf_sink import TYPES, GGUFSink, tensor_type
from checkpoint.formats.tensors import Tensor
from checkpoint.writer import Piece
from parallelism.errors import UserError
from parallelism.layout import Logical

# Heads of q lie in two dimensions; rows of "odd" are not made of blocks of 32.
SHAPES = {"embed": (7, 64), "q": (2, 4, 96), "norm": (64,), "odd": (5, 40)}
FILE_SHAPES = {**SHAPES, "q": (8, 96)}
METADATA = {
    "general.architecture": "test",
    "test.whole": 7,
    "test.part": 0.25,
    "test.yes": True,
    "test.no": False,
    "test.words": ["one", "zwei", "três", ""],
    "test.numbers": [1, -2, 3],
    "test.fractions": [0.5, -1.0],
    "test.nothing": [],
}
CONSTANT = np.float32([1, 2, 8])


def values():
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays["embed"][3] = 0  # a block whose scale is zero
    return arrays


def converted(path, dtype, monkeypatch, chunk_bytes=800, metadata=METADATA):
    arrays = values()
    specs = {n: Logical(n, a.shape, a.dtype, (None,) * a.ndim) for n, a in arrays.items()}
    write(path / "source", 0, {}, specs.values(), (Piece(specs[n], (0,) * a.ndim, a) for n, a in arrays.items()))
    source = NativeSource(path / "source")
    made = {"F16": "float16", "BF16": "bfloat16"}
    chosen, tensors = {}, []
    for name, shape in FILE_SHAPES.items():
        rules = Rules(select=(name,), dtype=made.get(tensor_type(shape, dtype).name, "float32"))
        chosen |= rules.apply(source.arrays, source.where)
        tensors.append(Tensor(f"{name}.weight", shape, chosen[name].logical))
    monkeypatch.setattr(conversion, "CHUNK_BYTES", chunk_bytes)
    sink = GGUFSink(path / "m.gguf", metadata, tensors, dtype, {"constant": CONSTANT}, lambda name, rows: rows)
    convert(source, chosen, sink, path / "m.gguf")
    assert sorted(p.name for p in path.iterdir()) == ["m.gguf", "source"]
    return path / "m.gguf", sink


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gguf_package_reads_the_tensors_that_it_would_write(tmp_path, monkeypatch, dtype):
    path, _ = converted(tmp_path, dtype, monkeypatch)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kind = TYPES[dtype][0]
    kinds = {"embed": kind, "q": kind, "norm": gguf.GGMLQuantizationType.F32}
    kinds["odd"] = gguf.GGMLQuantizationType.F16 if dtype == "q8_0" else kind
    for name, array in values().items():
        tensor = found[f"{name}.weight"]
        assert tensor.tensor_type == kinds[name] and [*reversed(tensor.shape)] == list(FILE_SHAPES[name])
        expected = gguf.quants.quantize(array.reshape(FILE_SHAPES[name]), kinds[name])
        assert tensor.data.tobytes() == expected.tobytes(), name
    assert found.keys() == {"constant", *(f"{name}.weight" for name in SHAPES)}
    np.testing.assert_array_equal(found["constant"].data, CONSTANT)


def test_a_block_of_q8_0_is_a_scale_and_32_rounded_values(tmp_path, monkeypatch):
    path, _ = converted(tmp_path, "q8_0", monkeypatch)
    (embed,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "embed.weight"]
    blocks = values()["embed"].reshape(-1, 32)
    scales = np.abs(blocks).max(1) / np.float32(127)
    raw = np.asarray(embed.data).reshape(-1, 34)
    np.testing.assert_array_equal(raw[:, :2].copy().view(np.float16)[:, 0], scales.astype(np.float16))
    assert np.abs(raw[:, 2:].view(np.int8) * scales[:, None] - blocks).max() <= 0.51 * scales.max()


def test_our_reader_reads_what_is_written(tmp_path, monkeypatch):
    path, sink = converted(tmp_path, "float16", monkeypatch)
    file = GGUFFile(path)
    assert file.metadata == {**METADATA, "general.file_type": 1, "general.quantization_version": 2} == sink.metadata
    assert {n: (t.shape, t.type, t.nbytes) for n, t in file.tensors.items()} == {
        n: (t.shape, t.type, t.nbytes) for n, t in sink.tensors.items()
    }
    np.testing.assert_array_equal(file.read("q.weight"), values()["q"].reshape(8, 96).astype(np.float16))
    np.testing.assert_array_equal(file.read("norm.weight"), values()["norm"])
    np.testing.assert_array_equal(file.read("constant"), sink.read("constant"))


def test_the_gguf_package_reads_metadata_with_their_types(tmp_path, monkeypatch):
    path, _ = converted(tmp_path, "float32", monkeypatch)
    kinds, fields = gguf.GGUFValueType, gguf.GGUFReader(path).fields
    expected = {
        "test.whole": [kinds.UINT32],
        "test.part": [kinds.FLOAT32],
        "test.yes": [kinds.BOOL],
        "test.words": [kinds.ARRAY, kinds.STRING],
        "test.numbers": [kinds.ARRAY, kinds.INT32],
        "test.fractions": [kinds.ARRAY, kinds.FLOAT32],
    }
    assert {name: fields[name].types for name in expected} == expected
    assert {name: fields[name].contents() for name in METADATA if METADATA[name]} == {
        k: v for k, v in METADATA.items() if v
    }


def test_how_parts_are_cut_does_not_show(tmp_path, monkeypatch):
    paths = []
    for limit in (16, 100, 1 << 20):
        (tmp_path / str(limit)).mkdir()
        paths.append(converted(tmp_path / str(limit), "q8_0", monkeypatch, limit)[0])
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_number_that_has_no_room_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"test\.whole is 4294967296"):
        converted(tmp_path, "float32", monkeypatch, metadata={"test.whole": 1 << 32})


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(SHAPES)), start=st.integers(0, 8), stop=st.integers(0, 8))
def test_rows_are_what_numpy_slices(file_of_every_type, name, start, stop):
    for file in file_of_every_type:
        rows = slice(min(start, stop), max(start, stop))
        whole = file.read(f"{name}.weight")
        np.testing.assert_array_equal(file.read(f"{name}.weight", rows=rows), whole[rows], strict=True)


@pytest.fixture(scope="module")
def file_of_every_type(tmp_path_factory):
    files = []
    for dtype in TYPES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            files.append(GGUFFile(converted(tmp_path_factory.mktemp(dtype), dtype, monkeypatch)[0]))
    return files
