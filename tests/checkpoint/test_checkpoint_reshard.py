"""Read plans against numpy slicing, loading into other meshes and layouts, the reader."""

import collections
import itertools
import logging
import math
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import CorruptError, Level, Manager, find_checkpoint, load, open_checkpoint
from checkpoint.cells import pack_into
from checkpoint.manifest import DTYPES, MANIFEST
from checkpoint.reader import CheckpointReader
from checkpoint.reshard import castable, exact, fill, narrow, plan_array
from checkpoint.shares import shares_of, stored_specs
from checkpoint.storage import LocalFiles
from checkpoint.writer import Block, ChunkWriter, Piece, blocks_of, data_file, manifest_of
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored


def grid(draw, shape):
    """Random cuts of every axis -> boxes (tuples of slices) that tile ``shape``."""
    axes = []
    for n in shape:
        cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))})
        axes.append([slice(a, b) for a, b in itertools.pairwise(cuts)] or [slice(0, n)])
    return list(itertools.product(*axes))


def write(path, values, boxes, chunk_bytes=32):
    """A checkpoint of ``values`` whose pieces are ``boxes[name]``."""
    specs = {k: Logical(k, v.shape, v.dtype, (None,) * v.ndim) for k, v in values.items()}
    pieces = [
        Piece(specs[k], tuple(s.start for s in box), np.array(values[k][box], order="C"))
        for k in values
        for box in boxes[k]
    ]
    return commit(path, specs.values(), pieces, chunk_bytes)


def commit(path, specs, pieces, chunk_bytes=32):
    path.mkdir()
    (path / data_file(0)).touch()
    with ChunkWriter(lambda name: (path / name).open("wb"), lambda number: data_file(0)) as writer:
        for block in blocks_of(pieces, chunk_bytes):
            writer.add(block)
    (path / MANIFEST).write_bytes(manifest_of(3, {"a": 1}, specs, writer.chunks).encode())
    return path


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_boxes_written_read_back_as_any_other_boxes(tmp_path_factory, data):
    draw = data.draw
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "int4", "bool", "float8_e4m3fn"]))
    parts = draw(st.integers(1, 3)) if draw(st.booleans()) else None
    names = [f"a.{i}" for i in range(parts or 1)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = {name: rng.integers(0, 2, shape).astype(DTYPES[dtype]) for name in names}
    path = tmp_path_factory.mktemp("plan") / "c"
    write(path, values, {name: grid(draw, shape) for name in names}, draw(st.integers(1, 64)))

    padded = tuple(n + draw(st.integers(0, 2)) for n in shape)
    logical = tuple(Logical(name, shape, DTYPES[dtype], (None,) * len(shape)) for name in names)
    whole_shape = (parts, *padded) if parts else padded
    stored = Stored("a", whole_shape, DTYPES[dtype], (None,) * len(whole_shape), logical, parts is not None)
    boxes = tuple(grid(draw, whole_shape))
    reader = CheckpointReader(LocalFiles(path))
    plan = plan_array(reader.manifest, stored, boxes)
    pieces = fill(reader, plan)

    inner = tuple(slice(0, n) for n in shape)
    whole = np.zeros(whole_shape, DTYPES[dtype])
    for row, name in enumerate(names):
        whole[(row, *inner) if parts else inner] = values[name]
    for box, piece in zip(boxes, pieces, strict=True):
        np.testing.assert_array_equal(piece, whole[box])
    assert len({(r.name, r.chunk) for r in plan.reads}) == len(plan.reads), "a chunk is read twice"
    assert reader.bytes_read == plan.bytes_read
    assert plan.bytes_needed == sum(v.nbytes for v in values.values())
    for name in names:
        box = draw(st.sampled_from(grid(draw, shape)))
        np.testing.assert_array_equal(reader.read(name, box), values[name][box])


def sharded(draw, values):
    """The arrays as some mesh stores them: alike ones stacked or listed, axes padded until they divide, and cut.

    values: name -> [L, ...], whose rows are the logical arrays name.0, name.1, ... Returns (stored, boxes, whole) each.
    """
    out = []
    for name, rows in values.items():
        shape, axes = rows.shape[1:], (None,) * (rows.ndim - 1)
        parts = [Logical(f"{name}.{i}", shape, rows.dtype, axes) for i in range(len(rows))]
        ways = [draw(st.integers(1, 3)) for _ in shape]
        padded = tuple(-(-n // k) * k for n, k in zip(shape, ways, strict=True))
        whole = np.zeros((len(rows), *padded), rows.dtype)
        whole[(slice(None), *(slice(0, n) for n in shape))] = rows
        if draw(st.booleans()):
            stored = [Stored(name, whole.shape, rows.dtype, (None, *axes), tuple(parts), True)]
            ways, wholes = [draw(st.sampled_from([k for k in (1, 2, 3) if len(rows) % k == 0])), *ways], [whole]
        else:
            stored = [Stored(part.name, padded, rows.dtype, axes, (part,)) for part in parts]
            wholes = [whole[i, ...] for i in range(len(rows))]
        for each, array in zip(stored, wholes, strict=True):
            sizes = [n // k for n, k in zip(each.shape, ways, strict=True)]
            cuts = [[slice(i * n, (i + 1) * n) for i in range(k)] for n, k in zip(sizes, ways, strict=True)]
            out.append((each, tuple(itertools.product(*cuts)), array))
    return out


KINDS = [
    "float32", "bfloat16", "int32", "uint8", "bool", "int4", "float8_e4m3fn", "float8_e5m2", "float64", "complex64",
]  # fmt: skip


def saved(draw, path, source):
    """A checkpoint of what some processes hold, boxes of which several may hold, each written by the write plan."""
    layout = Layout([stored for stored, _, _ in source])
    count, chunk_bytes = draw(st.integers(1, 4)), draw(st.integers(1, 64))
    some = st.lists(st.integers(0, count - 1), min_size=1, unique=True)
    bounds = {s.key: [tuple((i.start, i.stop) for i in box) for box in boxes] for s, boxes, _ in source}
    holders = {key: {box: draw(some) for box in boxes} for key, boxes in bounds.items()}
    wholes = {stored.key: whole for stored, _, whole in source}
    path.mkdir()
    chunks = collections.defaultdict(list)
    for process in range(count):
        with ChunkWriter(
            lambda name: (path / name).open("wb"), lambda n, p=process: data_file(p, "", n), 100
        ) as writer:
            for key, own in shares_of(layout, holders, process, chunk_bytes).items():
                for box, shares in own:
                    held = wholes[key][tuple(slice(*b) for b in box)]
                    for share in shares:
                        raw = np.empty(share.nbytes, np.uint8)
                        pack_into(raw, np.asarray(held[share.within]), share.grid)
                        writer.add(Block(share.logical, share.start, share.shape, share.grid, raw))
        for name, found in writer.chunks.items():
            chunks[name] += found
    (path / MANIFEST).write_bytes(manifest_of(3, {}, stored_specs(layout), chunks).encode())
    return open_checkpoint(path)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_mesh_and_processes_to_any_other_and_back_is_identity(tmp_path_factory, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(0, 5), max_size=3)))
        dtype = DTYPES[draw(st.sampled_from(KINDS))]
        values[name] = (7 * rng.standard_normal(shape)).astype(np.float32).astype(dtype)
    root, source = tmp_path_factory.mktemp("mesh"), sharded(draw, values)
    for name in ("there", "back"):
        reader = saved(draw, root / name, source)
        assert reader.verify().ok
        source = sharded(draw, values)
        for stored, boxes, whole in source:
            for box, piece in zip(boxes, fill(reader, plan_array(reader.manifest, stored, boxes)), strict=True):
                assert piece.dtype == whole.dtype and piece.tobytes() == whole[box].tobytes()
                whole[box] = piece


def save(h, root, chunk_bytes=64, **how):
    state = h.make_state(**how)
    with Manager([Level("disk", root)], chunk_bytes=chunk_bytes) as manager:
        manager.save(5, state.arrays, state.layout, {"seed": 1}).wait()
    return state


LAYOUTS = [
    ("fsdp=8", False, 10),
    ("fsdp=2,tensor=4", True, 12),
    ("stage=4,tensor=2", True, 16),
    ("replicated", False, 11),
]


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_any_mesh_and_layout_restores_into_any_other(tmp_path, h, source, target):
    mesh, stacked, pad = source
    save(h, tmp_path, mesh=mesh, stacked=stacked, pad=pad)
    mesh, stacked, pad = target
    state = h.make_state(mesh, stacked=stacked, pad=pad)
    arrays, _ = load(open_checkpoint(tmp_path / "step-00000005"), state.layout, state.shardings)
    h.assert_same(h.to_logical(arrays, state.layout), state.logical)
    assert all(arrays[key].sharding == state.shardings[key] for key in arrays)
    np.testing.assert_array_equal(np.asarray(arrays["embed"])[10:], 0)


def test_padding_is_not_in_the_checkpoint(tmp_path, h):
    state = save(h, tmp_path, pad=16)
    reader = open_checkpoint(tmp_path / "step-00000005")
    h.assert_same({name: reader.read(name) for name in reader.manifest.arrays}, state.logical)
    assert reader.manifest.nbytes == sum(value.nbytes for value in state.logical.values())


def test_widening_restores_exactly(tmp_path, h):
    state = save(h, tmp_path)
    wide = h.make_state(dtypes={"embed": np.float32})
    arrays, _ = load(open_checkpoint(find_checkpoint(tmp_path)), wide.layout, wide.shardings)
    found = h.to_logical(arrays, wide.layout)["embed"]
    np.testing.assert_array_equal(found, state.logical["embed"].astype(np.float32))


def test_narrowing_is_refused_unless_asked_for(tmp_path, h):
    state = save(h, tmp_path)
    narrow = h.make_state(dtypes={"layers": ml_dtypes.bfloat16})
    reader = open_checkpoint(find_checkpoint(tmp_path))
    with pytest.raises(UserError, match=r"layers.0.w.*float32.*bfloat16"):
        load(reader, narrow.layout, narrow.shardings)
    arrays, _ = load(reader, narrow.layout, narrow.shardings, cast=True)
    found = h.to_logical(arrays, narrow.layout)["layers.3.w"]
    np.testing.assert_array_equal(found, state.logical["layers.3.w"].astype(ml_dtypes.bfloat16))


def test_a_cast_refuses_values_that_the_dtype_does_not_reach(tmp_path, h):
    values = {"w": np.float32([1, -1e6])}
    path = write(tmp_path / "c", values, {"w": [(slice(0, 2),)]})
    logical = Logical("w", (2,), DTYPES["float16"], (None,))
    stored = Stored("w", (2,), logical.dtype, (None,), (logical,))
    plan = plan_array(open_checkpoint(path).manifest, stored, ((slice(0, 2),),))
    with pytest.raises(UserError, match="'w' has values beyond float16"):
        fill(open_checkpoint(path), plan)


@pytest.mark.parametrize("source", ["int8", "uint8", "int16", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("target", ["int8", "int32", "float16", "bfloat16", "float32", "float64", "float8_e5m2fnuz"])
def test_exact_casts_are_those_that_lose_nothing(source, target):
    a, b = DTYPES[source], DTYPES[target]
    bits = np.arange(2 ** (8 * a.itemsize), dtype=f"u{a.itemsize}").view(a)
    with np.errstate(all="ignore"):
        values, back = bits.astype(np.float64), bits.astype(b).astype(np.float64)
    assert exact(a, b) == np.array_equal(values, back, equal_nan=True)


def test_float_does_not_cast_to_integer():
    assert not castable(DTYPES["float32"], DTYPES["int32"])


def test_missing_and_unused_arrays_are_named_and_counted(tmp_path, h):
    save(h, tmp_path)
    state = h.make_state()
    reader = open_checkpoint(find_checkpoint(tmp_path))
    smaller = type(state.layout)(s for s in state.layout.values() if s.key != "embed")
    with pytest.raises(UserError, match=r"1 not in the model \(embed\)"):
        load(reader, smaller, state.shardings)
    more = state.layout | type(state.layout)(
        [Stored("extra", (2,), DTYPES["int32"], (None,), (Logical("extra.x", (2,), DTYPES["int32"], (None,)),))]
    )
    with pytest.raises(UserError, match=r"1 missing from it \(extra.x\)"):
        load(reader, more, state.shardings)


def test_partial_load_reads_only_what_the_layout_names(tmp_path, h):
    save(h, tmp_path)
    state = h.make_state()
    embed = type(state.layout)([state.layout["embed"]])
    reader = open_checkpoint(find_checkpoint(tmp_path))
    arrays, metrics = load(reader, embed, state.shardings, partial=True)
    np.testing.assert_array_equal(np.asarray(arrays["embed"])[:10], state.logical["embed"])
    assert reader.bytes_read == metrics.bytes_read == state.logical["embed"].nbytes


def test_another_shape_is_refused_with_both_shapes(tmp_path, h):
    save(h, tmp_path)
    other = Logical("embed", (9, 8), DTYPES["bfloat16"], ("vocab", "embed"))
    state = h.make_state()
    layout = type(state.layout)(
        Stored("embed", (9, 8), other.dtype, other.axes, (other,)) if s.key == "embed" else s
        for s in state.layout.values()
    )
    with pytest.raises(UserError, match=r"'embed' has shape \(10, 8\), the model expects \(9, 8\)"):
        load(open_checkpoint(find_checkpoint(tmp_path)), layout, state.shardings)


def test_a_sharded_restore_reads_no_more_than_it_needs_where_boxes_match_chunks(tmp_path, h):
    values = {"w": np.arange(64 * 16, dtype=np.float32).reshape(64, 16)}
    path = write(tmp_path / "c", values, {"w": [(slice(0, 64), slice(0, 16))]}, chunk_bytes=8 * 16 * 4)
    logical = Logical("w", (64, 16), DTYPES["float32"], (None, None))
    stored = Stored("w", (64, 16), logical.dtype, logical.axes, (logical,))
    reader = CheckpointReader(LocalFiles(path))
    plan = plan_array(reader.manifest, stored, ((slice(16, 32), slice(0, 16)),))
    fill(reader, plan)
    tables = sum(16 * math.prod(read.chunk.grid) for read in plan.reads)
    assert reader.bytes_read == plan.bytes_read == plan.bytes_needed + tables == 16 * 16 * 4 + tables


def test_loading_replicas_reads_each_byte_once(tmp_path, h):
    state = save(h, tmp_path, mesh="replicated")
    reader = open_checkpoint(find_checkpoint(tmp_path))
    _, metrics = load(reader, state.layout, state.shardings)
    stored = sum(c.stored_bytes for array in reader.manifest.arrays.values() for c in array.chunks)
    assert (metrics.bytes_read, metrics.bytes_needed) == (stored, reader.manifest.nbytes)


# -- damage


def data_of(directory):
    (file,) = directory.glob("data-*")
    return file


def test_a_flipped_bit_anywhere_in_the_data_is_found_and_named(tmp_path, h):
    state = save(h, tmp_path)
    file = data_of(tmp_path / "step-00000005")
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(good), 60, replace=False):
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        with pytest.raises(CorruptError, match=r"array '.*data-00000-.*\.bin are damaged"):
            load(open_checkpoint(tmp_path / "step-00000005"), state.layout, state.shardings)
        assert len(open_checkpoint(tmp_path / "step-00000005").verify().errors) == 1


def test_a_truncated_chunk_file_is_found_and_named(tmp_path, h):
    save(h, tmp_path)
    file = data_of(tmp_path / "step-00000005")
    file.write_bytes(file.read_bytes()[:-1])
    report = open_checkpoint(tmp_path / "step-00000005").verify()
    assert len(report.errors) == 1
    assert f"{file.name} is truncated" in report.errors[0]


def test_a_missing_chunk_file_is_found_and_named(tmp_path, h):
    save(h, tmp_path)
    data_of(tmp_path / "step-00000005").unlink()
    with pytest.raises(CorruptError, match=r"data-00000-.*\.bin is missing"):
        open_checkpoint(tmp_path / "step-00000005").read("embed")


# -- reader


def test_opening_what_does_not_exist_is_an_error(tmp_path):
    for function in (open_checkpoint, find_checkpoint):
        with pytest.raises(UserError, match="does not exist"):
            function(tmp_path / "no")


def test_opening_what_is_no_checkpoint_is_an_error(tmp_path):
    for function in (open_checkpoint, find_checkpoint):
        with pytest.raises(UserError, match="is not a checkpoint"):
            function(tmp_path)


def test_reading_an_unknown_array_is_an_error(tmp_path, h):
    save(h, tmp_path)
    with pytest.raises(UserError, match="no array 'nope'"):
        open_checkpoint(find_checkpoint(tmp_path)).read("nope")


@pytest.mark.parametrize(
    "box",
    [
        (slice(0, 11), slice(0, 8)),
        (slice(10, 12), slice(0, 8)),
        (slice(-1, None), slice(0, 8)),
        (slice(3, 2), slice(0, 8)),
        (slice(0, 10, 2), slice(0, 8)),
        (slice(0, 10),),
        (slice(0, 10), slice(0, 8), slice(0, 1)),
        (),
    ],
    ids=str,
)
def test_a_box_that_is_not_inside_the_array_is_refused(tmp_path, h, box):
    save(h, tmp_path)
    with pytest.raises(UserError, match=r"the box .* is not inside array 'embed' of shape \(10, 8\)"):
        open_checkpoint(find_checkpoint(tmp_path)).read("embed", box)


@pytest.mark.parametrize("box", [(0, slice(None)), slice(0, 3), 0], ids=str)
def test_a_box_that_is_not_of_slices_is_refused(tmp_path, h, box):
    save(h, tmp_path)
    with pytest.raises(UserError, match=r"the box .* of array 'embed': expected a slice for each dimension"):
        open_checkpoint(find_checkpoint(tmp_path)).read("embed", box)


def test_find_checkpoint_takes_the_newest_step_that_verifies(tmp_path, h, caplog):
    with Manager([Level("disk", tmp_path, keep=None)]) as manager:
        for step in (1, 2, 3, 4):
            state = h.make_state(seed=step)
            manager.save(step, state.arrays, state.layout, {}).wait()
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    file = data_of(tmp_path / "step-00000003")
    file.write_bytes(b"\0" * file.stat().st_size)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path).name == "step-00000002"
    assert ["step-00000003" in record.getMessage() for record in caplog.records] == [True]
    assert find_checkpoint(tmp_path / "step-00000001").name == "step-00000001"


def replacing(h, root, monkeypatch, times):
    """While a step is verified, a run replaces it by the next one: so many times."""
    verify, state = CheckpointReader.verify, h.make_state()

    def replaced(reader, progress=None):
        step = reader.manifest.step
        if step < 5 + times:
            shutil.rmtree(reader.where)
            with Manager([Level("disk", root)]) as manager:
                manager.save(step + 1, state.arrays, state.layout, {}).wait()
        return verify(reader, progress)

    monkeypatch.setattr(CheckpointReader, "verify", replaced)


def test_find_checkpoint_looks_again_where_a_run_replaced_what_it_found(tmp_path, h, monkeypatch):
    save(h, tmp_path)
    replacing(h, tmp_path, monkeypatch, 3)
    assert find_checkpoint(tmp_path).name == "step-00000008"


def test_find_checkpoint_does_not_look_for_ever(tmp_path, h, monkeypatch, caplog):
    save(h, tmp_path)
    replacing(h, tmp_path, monkeypatch, 99)
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* verifies"):
        find_checkpoint(tmp_path)
    assert len(caplog.records) == 4


def test_find_checkpoint_does_not_look_again_at_the_same_steps(tmp_path, h, caplog):
    save(h, tmp_path)
    data_of(tmp_path / "step-00000005").unlink()
    with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* verifies"):
        find_checkpoint(tmp_path)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [("int32", "int8", 300), ("int32", "uint8", -1), ("int64", "int4", 9), ("float32", "float4_e2m1fn", 100.0)],
)
def test_what_does_not_fit_is_an_error_for_integers_and_floats_without_infinity(source, target, value):
    ok = np.zeros(3, DTYPES[source])
    assert (narrow(ok, DTYPES[target], "a") == 0).all()
    with pytest.raises(UserError, match=f"array 'a' has values beyond {target}"):
        narrow(np.asarray([0, value, 0], DTYPES[source]), DTYPES[target], "a")
