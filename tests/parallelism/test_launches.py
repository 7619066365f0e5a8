"""Two lists of launches that differ are told apart, wherever the pieces that are compared begin."""

import pytest

from parallelism.launches import KEPT, REACH, Launches


def launched(*names):
    launches = Launches()
    for name in names:
        launches.add(name)
    return launches


STEPS = ["train_step", "evaluate"] * 30


@pytest.mark.parametrize("behind", [0, 1, 5, 2 * REACH])
def test_lists_of_which_one_is_behind_agree(behind):
    long, short = launched(*STEPS), launched(*STEPS[: len(STEPS) - behind])
    assert short.difference(long.window(short.count)) == ""
    assert long.difference(short.window(short.count)) == ""


def test_nothing_launched_yet_agrees():
    assert launched("a").difference(launched().window(0)) == launched().difference(launched("a").window(0)) == ""


@pytest.mark.parametrize("after", [0, 3, REACH - 1])
def test_the_first_difference_is_named_with_both_programs(after):
    lead, other = launched(*STEPS, "save", *STEPS[:after]), launched(*STEPS, "sample", *STEPS[:after])
    found = other.difference(lead.window(other.count))
    assert found == f"launches sample where process 0 launches save (launch {len(STEPS) + 1})"


def test_a_difference_in_the_first_launch_is_named():
    assert launched("b").difference(launched("a").window(1)) == "launches b where process 0 launches a (launch 1)"


def test_a_difference_long_ago_is_still_found():
    lead, other = launched("a", *STEPS), launched("b", *STEPS)
    assert other.difference(lead.window(other.count)).startswith("has launched something else than process 0 before")


def test_what_is_forgotten_is_not_compared():
    lead, other = launched(*["x"] * (KEPT + 100)), launched("x", "x")
    assert other.difference(lead.window(other.count)) == ""
    assert lead.difference(other.window(2)) == ""
