"""A level that is written as often as it can be."""

import itertools

import pytest

from checkpoint import Level, Manager
from checkpoint.pace import AHEAD, BUSY, Pace
from parallelism.coordinator import SingleProcess


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Of:
    """One of several processes; all share what is told."""

    def __init__(self, index, told):
        self.index, self.count, self._told = index, 2, told

    def tell(self, name, value):
        self._told[name] = value

    def told(self, name):
        return self._told.get(name)


def steps(pace, clock, last, seconds, write):
    """The steps taken, where a step takes ``seconds`` and a save ``write``."""
    found, free = [], 0.0
    for step in range(1, last + 1):
        clock.now += seconds
        if pace.due(step, write if clock.now >= free else None):
            found.append(step)
            free = clock.now + write
    return found


@pytest.mark.parametrize(("write", "apart"), [(0.1, AHEAD + 1), (5.0, 5 / BUSY), (20.0, 20 / BUSY)])
def test_a_level_writes_at_most_half_of_the_time(write, apart):
    clock = Clock()
    found = steps(Pace(SingleProcess(), "x", clock), clock, 400, 1.0, write)
    assert {later - step for step, later in itertools.pairwise(found[1:])} == {apart}


def test_other_processes_take_the_same_steps():
    told, clock = {}, Clock()
    first, second = (Pace(Of(i, told), "x", clock) for i in (0, 1))
    taken = []
    for step in range(1, 100):
        clock.now += 1.0
        taken.append((first.due(step, 7.0), second.due(step, None)))
    assert {a == b for a, b in taken} == {True}
    assert sum(a for a, _ in taken) >= 5


def test_a_process_that_is_as_late_as_can_be_is_told_in_time():
    """It asks for a step when the first has launched one more."""
    told, clock = {}, Clock()
    first, second = (Pace(Of(i, told), "x", clock) for i in (0, 1))
    ours, theirs = [], []
    for step in range(1, 101):
        clock.now += 1.0
        # The second is ahead by one: it asks for step + 1 before the first does.
        theirs += [step + 1] if second.due(step + 1, None) else []
        ours += [step] if first.due(step, 7.0) else []
    assert [s for s in ours if s > 5] == [s for s in theirs if s > 5 and s <= 100]


def test_a_manager_with_such_a_level_saves_to_it(tmp_path, h):
    state = h.make_state()
    with Manager([Level("disk", tmp_path, every="auto", keep=None)]) as manager:
        for step in range(1, 30):
            if manager.due(step):
                assert manager.due(step)
                manager.save(step, state.arrays, state.layout, {}).wait()
        assert len(manager.steps()) >= 2
