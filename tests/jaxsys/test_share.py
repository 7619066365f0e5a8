"""Devices that two parties want."""

import random
import threading
import time

import pytest

from jaxsys.share import DeviceShare


class Hours:
    """A clock that is set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def compete(share, clock, seconds, step, batch, gap, until=1e9):
    """A loop that trains, and a server whose clients never rest, without their threads.

    step, batch: draw how long each has the devices at a time; gap: how long the loop is gone after each. until: when
    it ends. Returns how much of the time each had, and the longest that each waited.
    """
    began, back, used = clock.now, clock.now, {name: party.used for name, party in share.parties.items()}
    came, longest = {"serve": clock.now}, dict.fromkeys(share.parties, 0.0)
    share._arrive("serve")

    def spend(seconds):
        """Time passes; the loop comes back in it."""
        nonlocal back
        end = clock.now + seconds
        if back <= end:
            clock.now, came["train"] = max(clock.now, back), back
            back = float("inf")
            share._arrive("train")
        clock.now = end

    while clock.now - began < seconds:
        spend(0.0)
        ready = [name for name in share._waiting if share._may(name)]
        if not ready:  # they are kept for the loop
            spend(min(share._patience(), max(back - clock.now, 0.0)) + 1e-9)
            continue
        (name,) = ready
        longest[name] = max(longest[name], clock.now - came[name])
        share._enter(name)
        if name == "train":
            clock.now += step()
            back = clock.now + gap() if clock.now - began < until else float("inf")
            share._leave(name)
            continue
        spend(batch())
        while not share.over(name) and clock.now - began < seconds:
            spend(batch())
        share._leave(name)
        share._arrive(name)
        came[name] = clock.now
    return {name: (party.used - used[name]) / (clock.now - began) for name, party in share.parties.items()}, longest


def trainer_and_server(wanted, clock):
    return DeviceShare({"train": 1 - wanted, "serve": wanted}, {"train": 0.1}, clock)


GAPS = {"none": lambda draw: 0.0, "a moment": lambda draw: 0.02 * draw.random(), "some": lambda draw: 0.08}


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("wanted", [0.02, 0.2, 0.5, 0.9])
def test_who_always_wants_the_devices_has_its_share_of_the_time(wanted, gap):
    clock, draw = Hours(), random.Random(1)
    had, longest = compete(
        trainer_and_server(wanted, clock), clock, 2000.0, lambda: 0.1 + 0.2 * draw.random(),
        lambda: 0.05 + 0.05 * draw.random(), lambda: GAPS[gap](draw),
    )  # fmt: skip
    assert abs(had["serve"] - wanted) < 0.002
    # Nobody starves: a batch is made up for, and a step.
    assert longest["serve"] < 0.1 * (1 - wanted) / wanted + 0.5
    assert longest["train"] < 0.3 * wanted / (1 - wanted) + 0.2


def test_a_server_of_long_batches_and_short_steps_has_its_share_too():
    clock, draw = Hours(), random.Random(2)
    had, _ = compete(
        trainer_and_server(0.2, clock), clock, 2000.0, lambda: 0.02 * draw.random(), lambda: draw.random(),
        lambda: 0.01 * draw.random(),
    )  # fmt: skip
    assert abs(had["serve"] - 0.2) < 0.003


def test_a_loop_that_is_gone_for_long_is_not_waited_for_and_keeps_no_claim():
    clock = Hours()
    had, longest = compete(trainer_and_server(0.2, clock), clock, 400.0, lambda: 0.1, lambda: 0.05, lambda: 0.5)
    assert had["serve"] > 0.78  # of the 5/6 that training does not use, with no more than its batch to wait
    assert longest["train"] < 0.06
    share = trainer_and_server(0.2, clock := Hours())
    compete(share, clock, 100.0, lambda: 0.2, lambda: 0.05, lambda: 0.01, until=10.0)
    assert share.parties["serve"].used > 91.0
    share._waiting.clear()
    had, longest = compete(share, clock, 100.0, lambda: 0.2, lambda: 0.05, lambda: 0.01)
    assert abs(had["serve"] - 0.2) < 0.005 and longest["serve"] < 0.5  # what it had alone is nobody's debt


def test_what_one_does_not_use_is_the_others_and_is_not_saved_up():
    clock = Hours()
    share = DeviceShare({"train": 0.5, "serve": 0.5}, clock=clock)
    share._enter("train")
    clock.now += 100.0
    assert not share.over("train")
    share._arrive("serve")
    clock.now += 1.0
    assert share.over("train")
    share._leave("train")
    share._enter("serve")
    share._arrive("train")
    assert not share.over("serve")
    clock.now += 1.1
    assert share.over("serve")  # not after 100 seconds


def test_what_one_does_for_the_other_is_the_others():
    clock = Hours()
    share = DeviceShare({"train": 0.5, "serve": 0.5}, clock=clock)
    with share.turn("train"):
        clock.now += 8.0
        share.book({"train": 30, "serve": 10})
        clock.now += 1.0
    assert {name: (party.used, party.tag) for name, party in share.parties.items()} == {
        "train": (7.0, 14.0), "serve": (2.0, 4.0),
    }  # fmt: skip


def test_nobody_has_the_devices_beside_another_and_both_come_on():
    share = DeviceShare({"train": 0.7, "serve": 0.3})
    inside, seen, stop = [], {"train": 0, "serve": 0}, time.monotonic() + 0.5

    def work(name, seconds):
        while time.monotonic() < stop:
            with share.turn(name):
                for _ in range(3):
                    inside.append(name)
                    time.sleep(seconds)
                    assert inside == [name]
                    inside.clear()
                    seen[name] += 1
                    share.pause(name)

    threads = [threading.Thread(target=work, args=each) for each in (("train", 0.004), ("serve", 0.001))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(seen.values()) > 5
    assert sum(party.used for party in share.parties.values()) <= 0.8
    assert all(party.turns > 1 and party.waited > 0 for party in share.parties.values())


def test_threads_have_their_shares_though_one_is_gone_for_a_moment_after_each_turn():
    share = DeviceShare({"train": 0.8, "serve": 0.2}, {"train": 30.0})  # however loaded the machine that tests
    began = time.monotonic()

    def train():
        while time.monotonic() < began + 1.0:
            with share.turn("train"):
                time.sleep(0.01)
            time.sleep(0.002)

    def serve():
        while training.is_alive():
            with share.turn("serve"):
                while not share.over("serve") and training.is_alive():
                    time.sleep(0.005)

    training = threading.Thread(target=train)
    serving = threading.Thread(target=serve)
    training.start(), serving.start()
    training.join()
    seconds = time.monotonic() - began
    share.parties["train"].patience = 0.0  # it does not come back
    share.parties["train"].brief = False
    with share._change:
        share._change.notify_all()
    serving.join()
    assert abs(share.parties["serve"].used / seconds - 0.2) < 0.05


def test_a_turn_that_fails_is_left():
    share = DeviceShare({"train": 1.0, "serve": 1.0})
    with pytest.raises(KeyError), share.turn("train"):
        raise KeyError
    with share.turn("serve"):
        pass


def test_who_is_interrupted_as_it_waits_keeps_nobody_from_the_devices(monkeypatch):
    clock = Hours()
    share = DeviceShare({"train": 1.0, "serve": 1.0}, clock=clock)

    def interrupted(seconds=None):
        share._waiting.discard("serve")  # which has its turn meanwhile
        share._enter("serve")
        raise KeyboardInterrupt

    monkeypatch.setattr(share._change, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), share.turn("train"):
        share._arrive("serve")
        clock.now += 1.0
        share.pause("train")
    assert share._holder == "serve" and not share._waiting
    share._leave("serve")
    with share.turn("serve"):
        pass


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        DeviceShare({"train": 1.0, "serve": 0.0})
