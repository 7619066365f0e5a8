"""The offload pass: its tables are right, hold what they say, and nobody waits where it says so."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import random_tables, tables

from parallelism.errors import UserError
from pipelines.buffers import allocate
from pipelines.generators import GENERATORS
from pipelines.interpret import Toy, interpret
from pipelines.offload import lightest, offload
from pipelines.schedule import NONE, B, F, O, R, Table
from pipelines.simulate import Costs, simulate


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(tables(), random_tables()),
    st.sampled_from([None, 1, 2, 3, 5]),
    st.sampled_from([0.2, 1.0, 3.0]),
    st.integers(1, 3),
    st.sampled_from([1, 4]),
)
def test_a_table_with_transfers_is_right_and_holds_what_was_asked(table, slots, move, shared, pieces):
    costs = Costs(1.0, 1.0, 1.0, residual=1.0, link=1 / move, shared=shared, pieces=pieces)
    try:
        found = offload(table, costs, slots)
    except UserError:
        assert slots is not None
        assert table.split or slots < most_at_once(table)  # between B and W they stay
        return
    found.table.check()
    toy = Toy.random(table)
    for a, b in zip(interpret(found.table, toy), toy.expected(), strict=True):
        np.testing.assert_array_equal(a, b)
    buffers, timeline = allocate(found.table), simulate(found.table, costs, "executed")
    assert buffers.made.depth == timeline.live.max() <= found.slots
    assert buffers.host_away.depth == timeline.host.max()
    if slots is None:
        assert timeline.makespan == pytest.approx(simulate(table, costs, "executed").makespan)


def most_at_once(table):
    """Residuals that some stage uses in one tick."""
    return int((table.microbatch != NONE).sum(-1).max())


def test_everything_can_wait_on_the_host_with_one_slot_on_the_device():
    table = GENERATORS["1f1b"](8, 32)
    costs = Costs(residual=1.0, link=1e9, pieces=4)
    found = offload(table, costs, 1)
    assert (found.slots, found.before) == (1, 8)
    # The last stage's forward is followed by its backward at once: it holds one anyway.
    assert found.moved == pytest.approx(7 / 8)
    timeline = simulate(found.table, costs)
    np.testing.assert_array_equal(timeline.host, [8 - s if s < 7 else 0 for s in range(8)])


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "eager", "zb-v"])
def test_where_the_link_is_fast_enough_nobody_waits_with_few_slots(name):
    table = GENERATORS[name](4, 16)
    costs = Costs(residual=1.0, link=1.0, pieces=4)
    found = offload(table, costs)
    assert found.slots < found.before and "nobody waits for a transfer" in found.because
    assert simulate(found.table, costs, "executed").makespan == simulate(table, costs, "executed").makespan


def test_the_peak_falls_faster_than_the_share_that_moves_grows_where_lives_differ():
    """Interleaved: the first chunk's residuals live longest (Wan et al. 2025, section 3.2)."""
    table = GENERATORS["interleaved"](4, 32, 2)
    costs = Costs(residual=1.0, link=1e9)
    points = [offload(table, costs, slots) for slots in (6, 8)]
    for found in points:
        peak = 1 - found.slots / found.before
        stage = (found.table.microbatch[:, 0, O] != NONE).sum() / (found.table.microbatch[:, 0, F] != NONE).sum()
        assert peak > found.moved and peak > 0.9 * stage


def test_a_link_that_is_too_slow_is_said():
    table = GENERATORS["1f1b"](4, 8)
    slow = Costs(residual=1.0, link=0.1)
    found = offload(table, slow)
    assert found.table.microbatch[..., O].max() == NONE and found.slots == found.before == 4
    assert "takes 10 s each way; an action takes 1 to 2 s" in found.because and "nothing moves" in found.because
    forced = offload(table, slow, 2)
    assert forced.slots == 2 and "longer" in forced.because
    assert simulate(forced.table, slow, "executed").makespan > simulate(table, slow, "executed").makespan


def test_neighbours_on_one_link_take_turns():
    table = GENERATORS["1f1b"](4, 16)
    costs = Costs(residual=1.0, link=1.0, shared=2, pieces=4)
    found = offload(table, costs)
    moves = found.table.microbatch[..., (O, R)] != NONE
    assert moves.any() and found.slots < found.before
    window = 2.0  # the longest tick
    assert (moves.reshape(table.ticks, 2, 2, 2).sum(2) <= window).all()


@pytest.mark.parametrize(("again", "best"), [(0.02, "light"), (0.5, "all")])
def test_what_is_computed_again_is_weighed_against_what_it_saves(again, best):
    """Five residuals wait, or two fifths of their bytes; both tables are what ``offload`` makes of those costs."""
    table, whole = GENERATORS["1f1b"](4, 8), Costs(residual=5.0, link=1.0, pieces=4)
    light = dataclasses.replace(whole, residual=2.0, backward=1.0 + again)
    name, found = lightest(table, {"all": whole, "light": light})
    assert name == best
    expected = offload(table, {"all": whole, "light": light}[best])
    np.testing.assert_array_equal(found.table.microbatch, expected.table.microbatch)
    assert found.because.startswith(expected.because) and f": {best}, the least on a device" in found.because


def test_too_few_slots_are_refused():
    with pytest.raises(UserError, match=r"schedule 'eager': slots=1 are too few .* expected at least 2"):
        offload(GENERATORS["eager"](2, 8), Costs(), 1)


def test_transfers_are_written_and_read_with_the_table(tmp_path):
    table = offload(GENERATORS["zb-v"](4, 8), Costs(residual=1.0, link=9.0), 6).table
    table.save(tmp_path / "table.json")
    np.testing.assert_array_equal(Table.load(tmp_path / "table.json").microbatch, table.microbatch)


def test_a_wrong_transfer_is_refused():
    table = offload(GENERATORS["1f1b"](4, 8), Costs(residual=1.0, link=9.0), 1).table
    ticks = np.argwhere(table.microbatch[:, 0, R] != NONE)[:, 0]
    gone = table.microbatch.copy()
    gone[ticks[0], 0, R] = NONE
    with pytest.raises(UserError, match="O of microbatch 0 at virtual stage 0 without R of microbatch 0"):
        Table(table.placement, 8, False, gone, table.chunk).check()
    late, chunk = table.microbatch.copy(), table.chunk.copy()
    late[ticks[0], 0, R], late[ticks[0] + 1, 0, R], chunk[ticks[0] + 1, 0, R] = NONE, 0, 0
    with pytest.raises(UserError, match=r"B of microbatch 0 at virtual stage 0 at tick .* it needs R of microbatch 0"):
        Table(table.placement, 8, False, late, chunk).check()
    assert B in table.kinds
