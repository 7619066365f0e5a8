"""Tables, their generators, their buffers and what they cost: against brute force and closed forms."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelism.errors import UserError
from pipelines.buffers import allocate
from pipelines.draw import check_output, check_picture, picture, text
from pipelines.generators import GENERATORS, generate
from pipelines.interpret import Toy, interpret
from pipelines.schedule import NONE, Action, B, F, Placement, Table, from_actions, from_orders
from pipelines.search import by_priority
from pipelines.simulate import Costs, simulate


@st.composite
def tables(draw):
    name = draw(st.sampled_from(sorted(GENERATORS)))
    stages = draw(st.integers(1, 6))
    microbatches = draw(st.integers(1, 12))
    if name == "interleaved":
        return GENERATORS[name](stages, stages * draw(st.integers(1, 3)), draw(st.integers(2, 3)))
    return GENERATORS[name](stages, microbatches)


@st.composite
def random_tables(draw):
    """By priority, with any costs and limits."""
    placement = Placement(draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from(["loop", "v"])))
    m = draw(st.integers(1, 8))
    limits = [draw(st.integers(placement.chunks, 12)) for _ in range(placement.stages)]
    costs = tuple(draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(3))
    split = draw(st.booleans())
    orders = by_priority(placement, m, limits, costs, draw(st.sampled_from([0.0, 0.3])), split)
    return from_orders(placement, m, orders, "random", together=draw(st.booleans()))


@settings(deadline=None, max_examples=200)
@given(st.one_of(tables(), random_tables()), st.integers(0, 99))
def test_a_table_computes_what_the_model_without_a_pipeline_does(table, seed):
    table.check()
    toy = Toy.random(table, seed)
    for found, expected in zip(interpret(table, toy), toy.expected(), strict=True):
        np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=100)
@given(st.one_of(tables(), random_tables()))
def test_buffers_are_as_deep_as_the_most_that_is_held(table):
    """Slots of an interval graph: the fewest there can be. In milliseconds sums are no whole numbers."""
    for each in (1.0, 1e-3):
        timeline = simulate(table, Costs(each, each, each), how="executed")
        assert allocate(table).made.depth == timeline.live.max()


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_the_ideal_agrees_with_closed_forms(stages, times, backward):
    m, costs = stages * times, Costs(1.0, backward / 2, backward / 2)
    for name in ("gpipe", "1f1b", "eager"):
        assert simulate(GENERATORS[name](stages, m), costs).bubble == pytest.approx((stages - 1) / (m + stages - 1))
    for chunks in (2, 3):
        bubble = simulate(GENERATORS["interleaved"](stages, m, chunks), costs).bubble
        assert bubble == pytest.approx((stages - 1) / (chunks * m + stages - 1))
    live = [simulate(GENERATORS[name](stages, m), costs).live for name in ("gpipe", "1f1b")]
    np.testing.assert_array_equal(live[0], m)
    np.testing.assert_array_equal(live[1], [min(m, stages - s) for s in range(stages)])


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("times", [2, 3, 4])
def test_split_backwards_leave_the_bubbles_of_their_papers(stages, times):
    """Qi et al. 2024, table 2 with F = B = W: (p - 1)(F + B - W) under ZB-H1, nothing between a stage's first action
    and its last under ZB-V, so that the step takes what the last stage has to do after p - 1 others have begun."""
    m = stages * times
    h1 = simulate(GENERATORS["zb-h1"](stages, m))
    assert h1.makespan == 3 * m + stages - 1
    assert h1.live.max() <= stages
    for how in ("ideal", "executed"):
        v = simulate(GENERATORS["zb-v"](stages, m), how=how)
        assert v.makespan == 6 * m + stages - 1
        assert v.live.max() <= 2 * stages


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 16])
def test_zero_bubble_schedules_hold_no_more_than_1f1b(stages, m):
    for name, chunks in (("zb-h1", 1), ("zb-v", 2)):
        table = GENERATORS[name](stages, m)
        table.check()
        assert simulate(table).live.max() <= min(stages, m) * chunks
        buffers = allocate(table)
        assert buffers.made.depth <= stages * chunks and buffers.cotangents.depth <= stages
        if m >= stages:
            assert table.ticks == 3 * chunks * m + stages - 1


@pytest.mark.parametrize(("name", "chunks"), [("zb", None), ("zb-v", 2), ("1f1b", 3)])
def test_a_schedule_that_there_is_not_is_refused(name, chunks):
    with pytest.raises(UserError, match=f"schedule '{name}'"):
        generate(name, 4, 8, chunks)


@settings(deadline=None, max_examples=30)
@given(tables())
def test_a_table_is_the_same_after_it_was_written_and_read(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("tables") / "table.json"
    table.save(path)
    again = Table.load(path)
    assert (again.placement, again.microbatches, again.split, again.name) == (
        table.placement, table.microbatches, table.split, table.name,
    )  # fmt: skip
    np.testing.assert_array_equal(again.microbatch, table.microbatch)
    np.testing.assert_array_equal(again.chunk, table.chunk)


def test_what_is_no_json_is_refused_with_its_path(tmp_path):
    with pytest.raises(UserError, match=r"table\.json: No such file or directory; expected a schedule"):
        Table.load(tmp_path / "table.json")
    (tmp_path / "table.json").write_text("[")
    with pytest.raises(UserError, match=r"table\.json: not JSON"):
        Table.load(tmp_path / "table.json")
    (tmp_path / "table.json").write_text("[]")
    with pytest.raises(UserError, match=r"table\.json: found no schedule: list, expected name, placement"):
        Table.load(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "found no schedule: .*'more'"),
        ({"microbatches": "4"}, "microbatches: found '4', expected int"),
        ({"microbatches": 0, "ticks": []}, "microbatches: found 0, expected at least 1"),
        ({"split": None}, "split: found None, expected bool"),
        ({"placement": {"stages": 1}}, "placement: found .* expected stages, chunks and shape"),
        ({"placement": {"stages": 1, "chunks": 1, "shape": "w"}}, "'w'"),
        ({"placement": {"stages": "1", "chunks": 1, "shape": "loop"}}, "placement: found"),
        ({"ticks": [3]}, "tick 0: found 3, expected a list for each of 1 stages"),
        ({"ticks": [[["F0"], []]]}, "tick 0: found .* expected a list for each of 1 stages"),
        ({"ticks": [[["F0"]], [["X0"]]]}, "tick 1, stage 0: found 'X0', expected an action such as"),
        ({"ticks": [[["F0", "F-1"]], [["B0"]]]}, "tick 0, stage 0: found 'F-1'"),
        ({"ticks": [[["F0"]], [[0]]]}, "tick 1, stage 0: found 0"),
        ({"ticks": [[["F9"]], [["B0"]]]}, "a microbatch out of range"),
    ],
    ids=str,
)
def test_what_is_no_table_is_refused_with_where_it_is_wrong(change, message):
    values = GENERATORS["gpipe"](1, 1).as_dict()
    assert Table.from_dict(values).ticks == 2
    with pytest.raises(UserError, match=message):
        Table.from_dict(values | change)


def moved(table, action, by):
    """The table with one action ``by`` ticks later, or earlier."""
    ticks = [[[] for _ in range(table.placement.stages)] for _ in range(table.ticks)]
    for tick, stage, each in table.walk():
        ticks[tick + (by if (stage, each) == action else 0)][stage].append(each)
    return from_actions(table.placement, table.microbatches, table.split, ticks, "moved")


def test_a_wrong_table_is_refused_with_what_is_wrong():
    table = GENERATORS["1f1b"](2, 3)
    with pytest.raises(
        UserError, match="F of microbatch 0 at virtual stage 1 at tick 0, expected 1 or later: it needs"
    ):
        moved(table, (1, Action(F, 0, 0)), -1).check()
    with pytest.raises(UserError, match="no F of microbatch 3 at virtual stage 0"):
        dataclasses.replace(table, microbatches=4).check()
    with pytest.raises(UserError, match="a microbatch out of range, expected 0 to 1"):
        dataclasses.replace(table, microbatches=2).check()
    twice = from_actions(
        table.placement, 3, False, [*([list(table.at(t, s)) for s in (0, 1)] for t in (0, 0))], "twice"
    )
    with pytest.raises(UserError, match="F of microbatch 0 at virtual stage 0 is at ticks 0 and 1, expected once"):
        twice.check()
    order = [Action(F, 0, 0), Action(B, 0, 0)]
    with pytest.raises(UserError, match="wait for each other, stage 0 for B0"):
        from_orders(Placement(2), 1, [order, order[::-1]], "stuck")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("interleaved", (4, 6), "6 microbatches, expected a multiple of the 4 stages"),
        ("interleaved", (4, 8, 1), "chunks=1, expected at least 2"),
        ("1f1b", (2, 0), "2 stages, 0 microbatches: expected at least 1 of each"),
    ],
)
def test_what_a_schedule_cannot_use_is_refused(name, arguments, message):
    with pytest.raises(UserError, match=message):
        GENERATORS[name](*arguments)


def test_a_lock_step_makes_1f1b_wait_where_backward_takes_longer_and_not_with_both_in_a_tick():
    """F:B of 1:2. Stages that go tick by tick: 1F1B takes a third more for each microbatch, ``eager`` nothing."""
    costs = Costs(1, 1, 1)
    ideal, lock_step = (simulate(GENERATORS["1f1b"](4, 32), costs, how).makespan for how in ("ideal", "executed"))
    assert 1.25 < lock_step / ideal < 1.34
    assert simulate(GENERATORS["eager"](4, 32), costs, "executed").makespan == ideal


def test_a_slot_that_is_written_too_early_is_found():
    table = GENERATORS["1f1b"](4, 8)
    buffers = allocate(table)
    made = buffers.made.slot.copy()
    made[made != NONE] = 0
    with pytest.raises(UserError, match="writes to a slot that is in use"):
        interpret(
            table, Toy.random(table), dataclasses.replace(buffers, made=dataclasses.replace(buffers.made, slot=made))
        )


def test_drawings(tmp_path):
    timeline = simulate(GENERATORS["zb-h1"](2, 4))
    assert text(timeline).splitlines() == ["0 01.aA2bB3cCdD", "1 .0a1bA2cB3dCD"]
    path = tmp_path / "timeline.svg"
    picture([("zb-h1", timeline), ("gpipe", simulate(GENERATORS["gpipe"](2, 4)))], path)
    assert "backward for the weights" in path.read_text()
    free = simulate(GENERATORS["zb-h1"](2, 4), Costs(1.0, 1.0, 0.0))
    assert text(free).splitlines()[1].startswith("1 .0")


def test_where_nothing_can_be_written_is_said(tmp_path):
    check_picture(tmp_path / "a.svg")
    for path, message in (
        (tmp_path / "a.unknown", "ending '.unknown', expected .svg, .png, .pdf"),
        (tmp_path / "a", "ending ''"),
        (tmp_path / "no" / "a.png", "there is no directory"),
        (Path(tmp_path), "ending"),
    ):
        with pytest.raises(UserError, match=message):
            check_picture(path)
    with pytest.raises(UserError, match="is a directory"):
        check_output(tmp_path)
