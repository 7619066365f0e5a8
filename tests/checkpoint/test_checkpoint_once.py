"""Processes of one machine that restore from far away: each byte comes once, and all have all they need."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import once
from checkpoint.reader import CheckpointReader
from checkpoint.reshard import fill, plan_array, write
from checkpoint.storage import LocalFiles
from checkpoint.writer import Piece
from parallelism.layout import Logical, Stored

SHAPE = (16, 48)
SPECS = [Logical(name, SHAPE, np.dtype(np.float32), (None, None)) for name in "ab"]
VALUES = {x.name: np.random.default_rng(i).standard_normal(SHAPE, np.float32) for i, x in enumerate(SPECS)}
STORED = [Stored(x.name, x.shape, x.dtype, x.axes, (x,)) for x in SPECS]


class Process:
    def __init__(self, index, said, barrier):
        self.index, self.count, self._said, self._barrier = index, len(said), said, barrier

    def gather(self, channel, value):
        self._said[self.index] = value
        self._barrier.wait(60)
        found = list(self._said)
        self._barrier.wait(60)
        return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pieces = [Piece(spec, (row, 0), VALUES[spec.name][row : row + 8]) for spec in SPECS for row in (0, 8)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("checkpoint.cells.CELL_BYTES", 16)
        return write(tmp_path_factory.mktemp("far") / "c", 1, {}, SPECS, pieces, chunk_bytes=1024)


def boxes(draw):
    """What a process holds: a few boxes of an array, in places that others may hold too."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        (a, b), (c, d) = (sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in SHAPE)
        found.append((slice(a, b), slice(c, d)))
    return tuple(found)


def ranges(read):
    """The bytes of a file that a plan has to read of a chunk."""
    chunk = read.chunk
    if read.cells is None:
        return set(range(chunk.offset, chunk.offset + chunk.stored_bytes))
    cell = chunk.nbytes // int(np.prod(chunk.grid))
    spans = [(number * cell, (number + 1) * cell) for number in read.cells] + [(chunk.nbytes, chunk.whole_bytes)]
    return {byte for a, b in spans for byte in range(chunk.offset + a, chunk.offset + b)}


def restore(path, held, readers=None):
    """Each process fills its boxes, in a thread; returns the bytes that each read."""
    readers = readers or [CheckpointReader(LocalFiles(path)) for _ in held]
    said, barrier = [None] * len(held), threading.Barrier(len(held))

    def plan(process):
        return [plan_array(readers[0].manifest, stored, held[process][stored.key]) for stored in STORED]

    def run(index):
        machine = once.OncePerMachine(Process(index, said, barrier))
        with machine.reading(readers[index], plan):
            for own in plan(index):
                for box, piece in zip(own.pieces, fill(readers[index], own), strict=True):
                    np.testing.assert_array_equal(piece, VALUES[own.stored.key][box])

    with ThreadPoolExecutor(len(held)) as pool:
        list(pool.map(run, range(len(held))))
    needed = [[ranges(read) for own in plan(i) for read in own.reads] for i in range(len(held))]
    each = [set().union(*own) for own in needed]
    return [reader.bytes_read for reader in readers], each


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_byte_comes_to_a_machine_once(path, data):
    held = [{stored.key: boxes(data.draw) for stored in STORED} for _ in range(data.draw(st.integers(2, 4)))]
    read, needed = restore(path, held)
    # One process may need a chunk for two arrays of its own; these boxes are of one each.
    assert sum(read) == len(set().union(*needed))


ALL = {stored.key: ((slice(0, 16), slice(0, 48)),) for stored in STORED}


def test_what_all_need_is_divided_evenly(path):
    read, needed = restore(path, [ALL] * 4)
    assert sum(read) == len(needed[0]) and max(read) <= 1.5 * len(needed[0]) / 4


def test_processes_of_other_machines_read_for_themselves(path, monkeypatch):
    names = iter("xyz")
    monkeypatch.setattr(once, "machine", lambda: next(names))
    read, needed = restore(path, [ALL] * 3)
    assert read == [len(own) for own in needed]


class Failing(LocalFiles):
    """The first of its reads of data fails."""

    failed = False

    def read_into(self, name, offset, buffer):
        if not self.failed:
            self.failed = True
            raise OSError(5, "Input/output error")
        super().read_into(name, offset, buffer)


def test_what_one_process_cannot_get_the_others_get_for_themselves(path):
    readers = [CheckpointReader((Failing if i == 1 else LocalFiles)(path)) for i in range(3)]
    read, needed = restore(path, [ALL] * 3, readers)
    assert sum(read) > len(needed[0])


def test_nothing_is_left_open(path):
    import os

    def count():
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found += "memfd:checkpoint" in os.readlink(f"/proc/self/fd/{fd}")
        return found

    restore(path, [ALL] * 2)
    assert count() == 0
