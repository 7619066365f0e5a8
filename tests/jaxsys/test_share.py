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


def both_want(share, clock, pieces, seconds):
    """Runs so many turns of two parties that always want one, without their threads."""
    name, other = share.parties
    share._enter(name)
    for _ in range(pieces):
        share._arrive(other)
        while not share.over(name):
            clock.now += seconds[name]()
        share._leave(name)
        share._enter(other)
        name, other = other, name


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.5, 0.9])
def test_who_always_wants_the_devices_has_its_share(wanted):
    clock, draw = Hours(), random.Random(1)
    share = DeviceShare({"train": 1 - wanted, "serve": wanted}, clock)
    both_want(share, clock, 2000, {"train": lambda: 1 + draw.random(), "serve": lambda: 0.05 * draw.random()})
    assert abs(share.parties["serve"].used / clock.now - wanted) < 0.005


def test_what_one_does_not_use_is_the_others_and_is_not_saved_up():
    clock = Hours()
    share = DeviceShare({"train": 0.5, "serve": 0.5}, clock)
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


def test_a_turn_that_fails_is_left():
    share = DeviceShare({"train": 1.0, "serve": 1.0})
    with pytest.raises(KeyError), share.turn("train"):
        raise KeyError
    with share.turn("serve"):
        pass


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        DeviceShare({"train": 1.0, "serve": 0.0})
