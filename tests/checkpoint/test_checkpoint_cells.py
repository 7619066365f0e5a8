"""Cells: the order of a chunk's bytes, which of them a box meets, and that any mesh reads little more than it needs."""

import errno
import itertools
import json
import math
import mmap
import os

import jax
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from checkpoint import cells, open_checkpoint
from checkpoint.cells import ALIGNMENT, HUGE_PAGE, aligned, digests, grid_of, pack, runs, touched, unpack
from checkpoint.manifest import CHUNK_BYTES, Array, Chunk, CorruptError, Manifest, split
from checkpoint.reshard import distinct_boxes, plan_array
from checkpoint.writer import Piece
from parallelism.layout import Logical, Stored

DTYPES = [np.dtype(name) for name in ("float32", "int8", "float64")]


@st.composite
def chunks(draw):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 5]), max_size=3)))
    grid = tuple(draw(st.sampled_from([g for g in range(1, n + 1) if n % g == 0])) for n in shape)
    return shape, grid, draw(st.sampled_from(DTYPES))


@settings(max_examples=150, deadline=None)
@given(chunks())
def test_cells_are_the_parts_of_the_grid_in_row_major_order(chunk):
    shape, grid, dtype = chunk
    data = np.arange(math.prod(shape), dtype=dtype).reshape(shape)
    raw = pack(data, grid)
    parts = [[np.split(np.arange(n), g)[i] for i in range(g)] for n, g in zip(shape, grid, strict=True)]
    expected = [data[np.ix_(*which)].tobytes() if shape else data.tobytes() for which in itertools.product(*parts)]
    assert raw.tobytes() == b"".join(expected)
    assert digests(raw, grid) == b"".join(xxhash.xxh3_128_digest(cell) for cell in expected)
    found = unpack(raw, shape, dtype, grid)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, data)


@settings(max_examples=150, deadline=None)
@given(chunks(), st.data())
def test_the_cells_of_a_box_are_those_that_hold_its_elements(chunk, data):
    shape, grid, _ = chunk
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(1, n - a)) for a, n in zip(start, shape, strict=True))
    owner = np.empty(shape, np.int64)
    cell = [n // g for n, g in zip(shape, grid, strict=True)]
    for index in np.ndindex(*shape):
        owner[index] = np.ravel_multi_index([i // c for i, c in zip(index, cell, strict=True)], grid) if shape else 0
    box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    found = touched([box], shape, grid)
    np.testing.assert_array_equal(found, np.unique(owner[box]))
    assert [n for first, last in runs(found) for n in range(first, last)] == found.tolist()


@pytest.mark.parametrize("nbytes", [1, 100_000, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 1])
def test_memory_is_zero_and_aligned_whatever_was_there_before(nbytes):
    for _ in range(3):  # what was let go comes again
        memory = aligned(nbytes)
        assert memory.shape == (nbytes,) and memory.ctypes.data % ALIGNMENT == 0 and not memory.any()
        memory[:] = 0xA5


def test_no_memory_is_no_damage_and_a_kernel_without_huge_pages_gives_others(monkeypatch):
    class Small(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(cells.mmap, "mmap", Small)
    assert not aligned(HUGE_PAGE).any()
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        aligned(1 << 60)


def test_a_grid_halves_the_axis_that_is_cut_least_down_to_the_size_of_a_cell(monkeypatch):
    monkeypatch.setattr(cells, "CELL_BYTES", 4 << 10)
    assert grid_of((1536, 576), (1536, 576), 4) == (16, 16)
    assert grid_of((4096, 1024), (4096, 1024), 4) == (16, 16)  # 256 cells at most
    assert grid_of((72, 192), (576, 192), 4) == (1, 8)  # a shard of eight
    assert grid_of((7233, 576), (50257, 576), 4) == (1, 16)  # what does not divide is not cut
    assert grid_of((16 << 20,), (16 << 20,), 1) == (16,)
    assert grid_of((64, 16), (64, 16), 4) == (1, 1)
    assert grid_of((), (), 4) == ()


WIDTHS = {  # embed, heads * head, key/value heads * head, feed-forward, vocabulary, layers
    "SmolLM2 135M": (576, 576, 192, 1536, 49152, 30),
    "Llama 3 8B": (4096, 4096, 1024, 14336, 128256, 32),
}
MESHES = [(1, 8), (8, 1), (2, 4), (4, 2)]


def shapes_of(model):
    d, q, kv, ff, vocab, _ = WIDTHS[model]
    names = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, ff), "up": (d, ff), "down": (ff, d)}
    return {"embed": (vocab, d), "norm": (d,)} | names


@pytest.mark.parametrize("writer", MESHES, ids=str)
@pytest.mark.parametrize("reader", MESHES, ids=str)
@pytest.mark.parametrize(("model", "allowed"), [("SmolLM2 135M", 1.05), ("Llama 3 8B", 1.005)])
def test_a_shard_on_any_mesh_reads_little_more_than_it_needs(model, allowed, writer, reader, monkeypatch):
    """Of a layer and the embedding in float32, sharded over both axes, each process with one device."""
    monkeypatch.setattr(cells, "CELL_BYTES", 4 << 10)
    wanted = read = 0
    for name, shape in shapes_of(model).items():
        spec = PartitionSpec(*("fsdp", "tensor")[: len(shape)])
        meshes = [jax.make_mesh(axes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2) for axes in (writer, reader)]
        logical = Logical(name, shape, np.dtype("float32"), (None,) * len(shape))
        stored = Stored(name, shape, logical.dtype, logical.axes, (logical,))
        there = []
        for index in distinct_boxes(shape, NamedSharding(meshes[0], spec)):
            for start, size in split(tuple(s.stop - s.start for s in index), 4, CHUNK_BYTES):
                at = tuple(s.start + a for s, a in zip(index, start, strict=True))
                there.append(Chunk(at, size, "data", 0, 4 * math.prod(size), "", grid_of(size, shape, 4)))
        manifest = Manifest(0, {}, {name: Array(logical.dtype, shape, logical.axes, tuple(there))})
        for index in distinct_boxes(shape, NamedSharding(meshes[1], spec)):
            plan = plan_array(manifest, stored, (index,))
            wanted, read = wanted + plan.bytes_needed, read + plan.bytes_read
    assert wanted <= read <= allowed * wanted


@pytest.fixture
def one_chunk(tmp_path):
    """A checkpoint of one array of 16 cells: its directory, values and chunk."""
    from checkpoint import write

    data = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    spec = Logical("a", data.shape, data.dtype, (None, None))
    directory = write(tmp_path / "c", 3, {}, [spec], [Piece(spec, (0, 0), data)])
    (chunk,) = open_checkpoint(directory).manifest.arrays["a"].chunks
    assert chunk.grid == (4, 4)
    return directory, data, chunk


def test_a_box_is_read_by_its_cells(one_chunk):
    directory, data, _ = one_chunk
    reader = open_checkpoint(directory)
    np.testing.assert_array_equal(reader.read("a", (slice(2, 5), slice(6, 8))), data[2:5, 6:8])
    assert reader.bytes_read == 2 * 16 + 16 * 16  # of 256 bytes and as many of their digests


def test_every_flipped_bit_of_a_chunk_and_its_table_is_found(one_chunk):
    directory, _, chunk = one_chunk
    (file,) = directory.glob("data-*")
    good = file.read_bytes()
    assert len(good) == chunk.nbytes + 16 * 16
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        reader = open_checkpoint(directory)
        with pytest.raises(CorruptError, match=r"'a': bytes \d+ to \d+ of .* are damaged"):
            reader.read("a")
        assert not reader.verify().ok
        # A box elsewhere does not need the bytes, but always the table.
        if bit // 8 >= chunk.nbytes or bit // 8 < 16:
            with pytest.raises(CorruptError, match="damaged"):
                reader.read("a", (slice(0, 1), slice(0, 1)))
        elif bit // 8 >= 32:
            reader.read("a", (slice(0, 2), slice(0, 2)))


def test_a_checkpoint_of_version_1_is_read(tmp_path):
    """Written out as its document said it: chunks without a grid, digests over their bytes."""
    data = np.arange(12, dtype=np.int16).reshape(3, 4)
    halves = [data[:2].tobytes(), data[2:].tobytes()]
    (tmp_path / "x.bin").write_bytes(b"".join(halves))
    chunks_ = [
        {"start": [row, 0], "shape": [len(raw) // 8, 4], "file": "x.bin", "offset": 8 * row, "nbytes": len(raw)}
        | {"digest": xxhash.xxh3_128_hexdigest(raw)}
        for row, raw in zip((0, 2), halves, strict=True)
    ]
    array = {"dtype": "int16", "shape": [3, 4], "axes": [None, "embed"], "chunks": chunks_}
    body = {"format": "jaxsys-checkpoint", "version": 1, "step": 5, "meta": {"a": 1}, "arrays": {"w": array}}
    head = json.dumps(body).encode()[:-1]
    (tmp_path / "manifest.json").write_bytes(head + f'\n,"digest":"{xxhash.xxh3_128_hexdigest(head)}"}}\n'.encode())
    reader = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(reader.read("w"), data)
    np.testing.assert_array_equal(reader.read("w", (slice(1, 3), slice(1, 2))), data[1:3, 1:2])
    assert reader.verify().ok and reader.manifest.step == 5
