"""What the verdict is for which reports; the threads that carry them are tested with real processes."""

import dataclasses

import pytest

from parallelism.liveness import Limits, Report, Watch, judge, stop_step
from parallelism.multihost import Processes

LIMITS = Limits(dead=5, stuck=10, setup=100)
WELL = Report(phase="launch", step=7, sequence=20, idle=0.1, limit=10)


def report(**changes):
    return dataclasses.replace(WELL, **changes)


def test_a_job_in_which_all_go_on_does_not_end():
    assert judge([WELL, report(sequence=19), report(ended="done")], [0, 4.9, 1000], LIMITS) == ""


def test_a_process_that_is_silent_is_named_with_what_it_did():
    why = judge([WELL, WELL], [0, 6], LIMITS)
    assert why.startswith(
        "process 1 of 2 is dead or stopped: no sign of life for 6 s (allowed: 5); it was in launch (step 7)"
    )


def test_the_one_that_is_behind_hangs_not_those_that_wait_for_it():
    waiting = report(phase="metrics", sequence=21, idle=11)
    hung = report(phase="batch", idle=11, stacks="  File x")
    why = judge([waiting, hung, waiting], [0, 0, 0], LIMITS)
    first, *stacks = why.splitlines()
    assert first.startswith("process 1 of 3 hangs in batch (step 7): no progress for 11 s (allowed: 10)")
    assert first.endswith("while others wait in metrics (step 7)") and stacks == ["process 1:", "  File x"]


def test_others_may_wait_as_long_as_the_one_behind_makes_progress():
    waiting = report(phase="metrics", sequence=21, idle=50)
    assert judge([waiting, report(idle=9)], [0, 0], LIMITS) == ""
    assert judge([waiting, report(idle=50, limit=100)], [0, 0], LIMITS) == ""


def test_all_that_hang_in_the_same_place_are_said_to():
    assert judge([report(idle=11)] * 2, [0, 0], LIMITS).startswith("every process hangs in launch (step 7)")


def test_a_failure_ends_the_job_and_a_symptom_waits_for_its_cause():
    failed = report(ended="ValueError: x")
    assert judge([WELL, failed], [0, 0], LIMITS) == "process 1 of 2 failed in launch (step 7): ValueError: x"
    symptom = report(ended="JaxRuntimeError: connection reset", symptom=True)
    assert judge([symptom, WELL], [0, 1], LIMITS) == ""
    assert "process 1 of 2 is dead" in judge([symptom, WELL], [0, 6], LIMITS)


def test_a_process_that_launches_something_else_ends_the_job_before_it_is_found_to_hang():
    assert judge([WELL, report(differs="launches a where process 0 launches b", idle=50)], [0, 9], LIMITS) == (
        "process 1 of 2 launches a where process 0 launches b: all must launch the same programs in one order"
    )


def test_all_stop_after_the_first_step_that_none_has_passed():
    assert stop_step([report(passed=4), report()]) is None
    assert stop_step([report(passed=4), report(passed=5)]) == 6
    assert stop_step([report(passed=4), report(ended="done")]) == 5
    assert stop_step([report(ended="done")]) is None


@pytest.mark.parametrize("signal", [None, "SIGTERM"])
def test_one_process_stops_when_it_is_asked(signal):
    with Watch(Processes(), LIMITS) as watch:
        assert not watch.stops(1)
        if signal:
            watch.ask(signal)
        assert watch.stops(2) == bool(signal)
        assert watch.reason == (signal or "")
