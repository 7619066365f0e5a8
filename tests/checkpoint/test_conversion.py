"""From any format to any other: what comes out, what an interrupt leaves, what is refused."""

import dataclasses
import itertools
import math
import os
import tracemalloc
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import CorruptError, NativeSink, NativeSource, Progress, Rules, convert, open_checkpoint, write
from checkpoint import conversion as module
from checkpoint.conversion import boxes
from checkpoint.formats.safetensors_sink import SafetensorsSink, SafetensorsSource, state_metadata
from checkpoint.formats.tensors import plain
from checkpoint.manifest import DTYPES
from checkpoint.rules import rename_rule
from checkpoint.writer import Piece
from parallelism.errors import UserError
from parallelism.layout import Logical

VALUES = {
    "layers.0.w": np.arange(96, dtype=np.float32).reshape(8, 12) / 7,
    "layers.1.w": np.arange(96, dtype=np.float32).reshape(8, 12) / 3,
    "embed": np.linspace(-1, 1, 40).astype(ml_dtypes.bfloat16).reshape(10, 4),
    "optimizer.nu.embed": np.float32([[1e-12, 1e6]]),
    "optimizer.count": np.asarray(7, np.int32),
    "nothing": np.zeros((0, 3), np.float32),
}


def checkpoint_of(path, values, chunk_bytes=64):
    specs = {n: Logical(n, v.shape, v.dtype, ("a", None, "b")[: v.ndim]) for n, v in values.items()}
    pieces = (Piece(specs[n], (0,) * v.ndim, v) for n, v in values.items() if v.size)
    return write(path, 5, {"seed": 1}, specs.values(), pieces, chunk_bytes)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 128)


@pytest.fixture
def source(tmp_path):
    return NativeSource(checkpoint_of(tmp_path / "source", VALUES))


def sink_of(format, source, chosen, **how):
    if format == "native":
        return NativeSink(chosen, source.step, source.meta)
    arrays = {name: array.logical for name, array in chosen.items()}
    metadata = state_metadata(source.step, source.meta, arrays)
    return SafetensorsSink("safetensors", plain(arrays.values()), metadata=metadata, **how)


def run(source, destination, format="native", rules=Rules(), progress=Progress(), max_bytes=200):  # noqa: B008
    chosen = rules.apply(source.arrays, source.where)
    how = {"max_bytes": max_bytes} if format == "safetensors" else {}
    return convert(source, chosen, sink_of(format, source, chosen, **how), destination, progress=progress)


def opened(format, path):
    return {"native": NativeSource, "safetensors": SafetensorsSource}[format](path)


def values_of(source):
    return {name: source.read(name, array.box) for name, array in source.arrays.items()}


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------------------------- what comes out


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    limit=st.integers(4, 200),
    rows=st.booleans(),
)
def test_boxes_cover_every_element_once_in_row_major_order(shape, itemsize, limit, rows):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    with mock.patch.object(module, "CHUNK_BYTES", limit):
        found = list(boxes(shape, itemsize, rows))
    taken = [numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].ravel() for box in found]
    np.testing.assert_array_equal(np.concatenate([[], *taken]), numbers.ravel())
    for _, size in found:
        whole_rows = size[1:] == shape[1:]
        assert whole_rows or not rows
        assert math.prod(size) * itemsize <= limit or math.prod(size) == 1 or (rows and size[0] == 1)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_arrays_through_any_formats_are_the_same(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("convert")
    types = ["float32", "bfloat16", "bool", "int16", "float8_e5m2", "uint64", "float16"]
    values = {}
    for i in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = DTYPES[data.draw(st.sampled_from(types))]
        values[f"a.{i}"] = np.random.default_rng(i).integers(0, 2, shape).astype(dtype)
    checkpoint_of(root / "0", values, data.draw(st.integers(16, 400)))
    now = NativeSource(root / "0")
    for i, format in enumerate(data.draw(st.lists(st.sampled_from(["native", "safetensors"]), min_size=1, max_size=3))):
        with mock.patch.object(module, "CHUNK_BYTES", data.draw(st.integers(8, 300))):
            run(now, root / str(i + 1), format, max_bytes=data.draw(st.integers(1, 2000)))
        now = opened(format, root / str(i + 1))
    assert (now.step, dict(now.meta)) == (5, {"seed": 1})
    assert now.arrays == NativeSource(root / "0").arrays
    for name, array in values_of(now).items():
        np.testing.assert_array_equal(array, values[name], strict=True)


def test_a_result_verifies_and_its_chunks_do_not_tell_how_the_source_was_cut(tmp_path, source):
    run(source, tmp_path / "one")
    assert open_checkpoint(tmp_path / "one").verify().ok
    run(NativeSource(checkpoint_of(tmp_path / "other", VALUES, chunk_bytes=1000)), tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_safetensors_library_reads_what_is_written(tmp_path, source):
    from safetensors.numpy import load_file

    run(source, tmp_path / "out", "safetensors", Rules(exclude=("embed",)), max_bytes=400)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: array for shard in shards for name, array in load_file(shard).items()}
    assert len(shards) == 2 and found.keys() == VALUES.keys() - {"embed"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, VALUES[name], strict=True)


def test_a_stream_is_the_chosen_arrays_box_by_box(source):
    seen, found = [], {}
    chosen = Rules(dtype="bfloat16", exclude=("embed",), rename=(("layers", "l"),)).apply(source.arrays, source.where)
    for name, shape, dtype, own in module.stream(source, chosen, Progress(lambda *told: seen.append(told))):
        found[name] = np.full(shape, 0, dtype)
        for start, data in own:
            assert data.dtype == dtype and data.size <= 32
            found[name][tuple(slice(a, a + n) for a, n in zip(start, data.shape, strict=True))] = data
    for name, array in found.items():
        np.testing.assert_array_equal(array, VALUES[chosen[name].source].astype(array.dtype), strict=True)
    total = sum(array.nbytes for array in found.values())
    assert found.keys() == chosen.keys() and seen[-1] == ("write", total, total)


def test_memory_is_bounded_by_parts(tmp_path, monkeypatch):
    values = {"w": np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)}
    source = NativeSource(checkpoint_of(tmp_path / "source", values, chunk_bytes=1 << 16))
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    for format in ("native", "safetensors"):
        tracemalloc.start()
        run(source, tmp_path / format, format, Rules(dtype="bfloat16"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < values["w"].nbytes / 3, format


def test_progress_goes_from_writing_to_verifying_all(tmp_path, source):
    seen = []
    total = run(source, tmp_path / "out", progress=Progress(lambda *told: seen.append(told)))
    phases = [phase for phase, _ in itertools.groupby(seen, lambda told: told[0])]
    assert phases == ["write", "verify"] and seen[-1] == ("verify", total, total)
    assert [done for phase, done, _ in seen if phase == "write"] == sorted(done for p, done, _ in seen if p == "write")


# ---------------------------------------------------------------------------------------------------------- interrupts


@dataclasses.dataclass
class Stopping:
    """A source that is interrupted at its n-th box."""

    inner: NativeSource
    left: int

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, name, box):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.read(name, box)


class Counting(Stopping):
    """One that counts: ``-left`` boxes are read."""

    def read(self, name, box):
        self.left -= 1
        return self.inner.read(name, box)


@pytest.mark.parametrize("format", ["native", "safetensors"])
@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_an_interrupted_conversion_goes_on_and_ends_the_same(tmp_path, source, format, at):
    run(source, tmp_path / "whole", format)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(source, at), tmp_path / "out", format, progress=Progress(line=lines.append))
    assert "goes on from there" in lines[-1] and not (tmp_path / "out").exists()
    done = len((tmp_path / ".tmp-out" / ".journal").read_bytes().splitlines()) - 1
    counting = Counting(source, 0)
    lines.clear()
    run(counting, tmp_path / "out", format, progress=Progress(line=lines.append))
    chosen = Rules().apply(source.arrays, source.where)
    parts = len(sink_of(format, source, chosen).parts)
    assert done <= at and -counting.left == parts - done
    assert lines == ([f"goes on: {done} of {parts} parts (0 MB) are there already"] if done else [])
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


@pytest.mark.parametrize("format", ["native", "safetensors"])
def test_an_interrupt_after_the_last_part_is_no_other(tmp_path, source, format):
    run(source, tmp_path / "whole", format)
    chosen = Rules().apply(source.arrays, source.where)
    sink = sink_of(format, source, chosen, **({"max_bytes": 200} if format == "safetensors" else {}))

    def stop(directory):
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "half").write_text("of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, chosen, sink, tmp_path / "out", add_files=stop)
    counting = Counting(source, 0)
    run(counting, tmp_path / "out", format)
    assert counting.left == 0 and files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("journal", [b"", b"{", b"[]\n", b"7\n", b"\xff\n"])
def test_a_journal_that_makes_no_sense_is_begun_anew(tmp_path, source, journal):
    draft = interrupted(tmp_path, source)
    (draft / ".journal").write_bytes(journal)
    run(source, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").verify().ok


def interrupted(tmp_path, source, **how):
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(source, 9), tmp_path / "out", **how)
    return tmp_path / ".tmp-out"


@pytest.mark.parametrize("damage", ["a part", "a torn line", "no data"])
def test_what_does_not_verify_is_written_again(tmp_path, source, damage):
    run(source, tmp_path / "whole")
    draft = interrupted(tmp_path, source)
    (data,) = draft.glob("data-*")
    if damage == "a part":
        with open(data, "r+b") as file:
            file.seek(300)
            file.write(b"\xff\xff\xff")
    elif damage == "no data":
        data.unlink()
    else:
        with open(draft / ".journal", "ab") as file:
            file.write(b"0123")
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_request_begins_anew_and_says_so(tmp_path, source):
    lines = []
    interrupted(tmp_path, source)
    run(
        source,
        tmp_path / "out",
        rules=Rules(dtype="float16", select=("layers.*",)),
        progress=Progress(line=lines.append),
    )
    assert len(lines) == 1 and lines[0].startswith("begins anew") and "what is asked for is not the same" in lines[0]
    assert values_of(NativeSource(tmp_path / "out"))["layers.0.w"].dtype == np.float16


def test_another_source_begins_anew_and_says_so(tmp_path, source):
    lines = []
    interrupted(tmp_path, source)
    changed = {**VALUES, "layers.0.w": VALUES["layers.0.w"] + 1}
    other = NativeSource(checkpoint_of(tmp_path / "other", changed))
    run(other, tmp_path / "out", progress=Progress(line=lines.append))
    assert len(lines) == 1 and "the source is another or has changed" in lines[0]
    np.testing.assert_array_equal(
        NativeSource(tmp_path / "out").read("layers.0.w", (slice(0, 1), slice(0, 12)))[0], changed["layers.0.w"][0]
    )


def test_safetensors_that_changed_are_another_source(tmp_path, source):
    run(source, tmp_path / "tensors", "safetensors", max_bytes=10**6)
    before = SafetensorsSource(tmp_path / "tensors").identity
    assert SafetensorsSource(tmp_path / "tensors").identity == before
    os.utime(tmp_path / "tensors" / "model.safetensors", ns=(1, 1))
    assert SafetensorsSource(tmp_path / "tensors").identity != before


# ------------------------------------------------------------------------------------------------------------- failures


def test_damage_in_the_source_fails_and_leaves_nothing(tmp_path, source):
    (data,) = (tmp_path / "source").glob("data-*")
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(CorruptError):
        run(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_that_goes_away_is_named_not_the_destination(tmp_path, source):
    run(source, tmp_path / "tensors", "safetensors")
    gone = SafetensorsSource(tmp_path / "tensors")
    for file in (tmp_path / "tensors").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"tensors: array 'embed' cannot be read \(No such file"):
        run(gone, tmp_path / "out", rules=Rules(select=("embed",)))


def test_a_value_beyond_the_dtype_fails_and_leaves_nothing(tmp_path):
    source = NativeSource(checkpoint_of(tmp_path / "source", {"w": np.float32([[1, -1e6]])}))
    with pytest.raises(UserError, match="'w' has values beyond float16"):
        run(source, tmp_path / "out", rules=Rules(dtype="float16"))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    run(source, tmp_path / "out", rules=Rules(dtype="float16", keep_dtype=lambda name: name == "w"))
    assert NativeSource(tmp_path / "out").arrays["w"].dtype == np.float32


def test_a_disk_that_does_not_keep_what_is_written_is_found(tmp_path, source, monkeypatch):
    write_at = module.write_at

    def lying(path, offset, data):
        write_at(path, offset, np.where(np.arange(len(data)) == 3, data ^ 1, data) if offset > 400 else data)

    monkeypatch.setattr(module, "write_at", lying)
    with pytest.raises(CorruptError, match=r"did not verify after writing: bytes .* check the disk"):
        run(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_existing_destination_is_left_alone(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        run(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path):
    source = NativeSource(checkpoint_of(tmp_path / "source", {"z": np.zeros(2, np.complex64)}))
    with pytest.raises(UserError, match="'z' has dtype complex64, safetensors has no such type"):
        run(source, tmp_path / "out", "safetensors")


@pytest.mark.parametrize("state", ["{", "[]", '{"step": 1}', '{"step": 1, "meta": {}, "axes": {"w": ["a", "b"]}}'])
def test_metadata_that_makes_no_sense_is_one_line(tmp_path, state):
    from checkpoint.formats.safetensors import write_safetensors

    write_safetensors(tmp_path / "d", [("w", np.zeros(2, np.float32))], metadata={"jaxsys": state})
    with pytest.raises(UserError, match=r"fetch .*again"):
        SafetensorsSource(tmp_path / "d")


# ---------------------------------------------------------------------------------------------------------------- rules


def names(**rules):
    arrays = {n: Logical(n, v.shape, v.dtype, (None,) * v.ndim) for n, v in VALUES.items()}
    return {new: chosen.source for new, chosen in Rules(**rules).apply(arrays, "here").items()}


def test_rules_choose_and_rename():
    assert list(names(select=("layers.*", "embed"), exclude=("*.1.*",))) == ["layers.0.w", "embed"]
    renamed = names(select=("layers.*",), rename=((r"layers\.(\d)", r"blocks.\1"), ("^blocks", "model.blocks")))
    assert renamed == {"model.blocks.0.w": "layers.0.w", "model.blocks.1.w": "layers.1.w"}


def test_a_dtype_is_for_floats_that_are_not_kept():
    arrays = {n: Logical(n, v.shape, v.dtype, (None,) * v.ndim) for n, v in VALUES.items()}
    found = Rules(dtype="float16", keep_dtype=lambda name: "nu" in name).apply(arrays, "here")
    assert {name: chosen.logical.dtype.name for name, chosen in found.items()} == {
        "layers.0.w": "float16",
        "layers.1.w": "float16",
        "embed": "float16",
        "optimizer.nu.embed": "float32",
        "optimizer.count": "int32",
        "nothing": "float16",
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"select": ("layer.*",)},
            r"select 'layer\.\*' meets none of the 6 arrays of here; near it are .*layers\.0\.w",
        ),
        ({"select": ("embed", "nope")}, "select 'nope' meets none"),
        ({"exclude": ("embde",)}, r"exclude 'embde' meets none .* near it are .*embed"),
        ({"exclude": ("*",)}, "no array of here is left"),
        ({"rename": (("layrs", "x"),)}, "rename 'layrs=x' meets none"),
        ({"rename": ((r"layers\.\d", "x"),)}, "'layers.0.w' and 'layers.1.w' are both renamed to 'x.w'"),
        ({"rename": (("(", "x"),)}, "no regular expression"),
        ({"rename": (("embed", r"\1"),)}, "no regular expression"),
        ({"rename": ((".*", ""),)}, "leaves nothing of the name"),
        ({"dtype": "int8"}, "not a floating-point dtype"),
        ({"dtype": "nope"}, "not a floating-point dtype"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        names(**rules)


def test_rename_is_cut_at_the_last_sign():
    assert rename_rule(r"(?=a)b=c") == ("(?=a)b", "c") and rename_rule("a=") == ("a", "")
    for text in ("a", "=b", ""):
        with pytest.raises(UserError, match="expected 'OLD=NEW'"):
            rename_rule(text)
