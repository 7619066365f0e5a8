"""The memory between devices and writers: bounded, given back."""

import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.cells import ALIGNMENT, unpack
from checkpoint.shares import holders_of, shares_of
from checkpoint.snapshot import Snapshot, Staging, by_shard
from parallelism.layout import Layout, Logical, Stored

GO_ON = threading.Event()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_room_in_use_never_overlaps_nor_exceeds_the_budget(data):
    budget = data.draw(st.integers(1, 20)) * ALIGNMENT
    staging, taken = Staging(budget), []

    def free():
        room, value = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
        assert (room.data == value).all()
        staging.free(room)

    for number in range(data.draw(st.integers(1, 40))):
        nbytes = data.draw(st.integers(0, budget))
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        while taken and (staging._start(size) is None or data.draw(st.booleans())):
            free()
        room = staging.take(nbytes, GO_ON)
        assert len(room.data) == nbytes and room.data.ctypes.data % ALIGNMENT == 0
        room.data[:] = number
        taken.append((room, number))
        assert staging.peak <= budget
        assert sum(r.stop - r.start for r, _ in taken) <= budget
    while taken:
        free()
    assert staging._memory is None


def test_what_lies_first_is_used_again_before_more_is_touched():
    staging = Staging(100 * ALIGNMENT)
    rooms = [staging.take(1, GO_ON)]
    for _ in range(1000):
        rooms.append(staging.take(1, GO_ON))
        staging.free(rooms.pop(0))
    assert staging.peak == 2 * ALIGNMENT


def test_what_is_larger_than_the_budget_waits_for_all_of_it():
    staging = Staging(4 * ALIGNMENT)
    small = staging.take(1, GO_ON)
    found = []
    thread = threading.Thread(target=lambda: found.append(staging.take(1000, GO_ON)))
    thread.start()
    thread.join(0.2)
    assert not found
    staging.free(small)
    thread.join(10)
    assert len(found[0].data) == 1000


def test_a_taker_that_gives_up_is_woken():
    staging, given_up = Staging(ALIGNMENT), threading.Event()
    room, found = staging.take(1, given_up), []
    thread = threading.Thread(target=lambda: found.append(staging.take(1, given_up)))
    thread.start()
    given_up.set()
    staging.wake()
    thread.join(10)
    assert found == [None]
    staging.free(room)
    assert staging._memory is None


def snapshot_of(budget, count=8):
    specs = [Logical(f"w{i}", (32, 8), np.dtype(np.float32), (None, None)) for i in range(count)]
    layout = Layout([Stored(x.name, x.shape, x.dtype, x.axes, (x,)) for x in specs])
    values = {x.name: np.random.default_rng(i).standard_normal(x.shape, np.float32) for i, x in enumerate(specs)}
    arrays = {name: jax.device_put(value, jax.devices()[0]) for name, value in values.items()}
    shardings = {name: array.sharding for name, array in arrays.items()}
    staging = Staging(budget)
    shares = by_shard(arrays, shares_of(layout, holders_of(layout, shardings), 0, 512))
    return Snapshot(arrays, shares, staging), staging, values


def test_a_snapshot_goes_through_a_ring_far_smaller_than_itself():
    snapshot, staging, values = snapshot_of(1024)
    for block in snapshot.blocks():
        at = tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))
        found = unpack(block.raw, block.shape, np.dtype(np.float32), block.grid)
        np.testing.assert_array_equal(found, values[block.logical.name][at])
    assert snapshot.wait() >= 0
    assert 0 < staging.peak <= 1024
    assert staging._memory is None


def test_arrays_are_copied_once_a_writer_makes_room_and_not_before():
    snapshot, _, _ = snapshot_of(2048)
    snapshot.wait(["w0", "w1"])
    assert "w2" not in snapshot._copied
    blocks = snapshot.blocks()
    for _ in range(4):  # the fourth is asked for when three have been used
        next(blocks)
    snapshot.wait(["w2"]) if next(blocks) else None
    assert "w7" not in snapshot._copied
    snapshot.release()


def test_what_devices_are_busy_with_meanwhile_is_not_a_stall():
    for busy in (True, False):
        snapshot, _, _ = snapshot_of(1024)
        timer = threading.Timer(0.2, snapshot.release)
        timer.start()
        seconds = snapshot.wait(busy=lambda busy=busy: busy)
        timer.join()
        assert seconds == snapshot.stalled_seconds == 0 if busy else seconds > 0.1


def test_a_snapshot_that_is_let_go_frees_who_waits_for_it():
    snapshot, staging, _ = snapshot_of(1024)
    timer = threading.Timer(0.2, snapshot.release)
    timer.start()
    snapshot.wait()
    timer.join()
    staging.thread.shutdown()
    assert staging._memory is None


def test_a_block_that_was_not_taken_is_the_next_ones_first():
    snapshot, _, _ = snapshot_of(1 << 20)
    first = snapshot.blocks()
    next(first)
    kept = next(first)
    with pytest.raises(OSError):
        first.throw(OSError("full"))
    again = next(snapshot.blocks())
    assert (again.logical, again.start) == (kept.logical, kept.start)
    snapshot.release()
