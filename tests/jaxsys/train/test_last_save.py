"""Signals that ask a run to stop, and the save of a machine that is about to be gone."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from tiny_runs import make_config, quiet

from checkpoint import Level
from checkpoint.levels import OpenLevel
from checkpoint.storage import LocalStore
from checkpoint.writer import ChunkWriter
from jaxsys.train import last_save
from jaxsys.train.config import CheckpointConfig
from jaxsys.train.last_save import order, save_within
from jaxsys.train.stop import AHEAD, Stop, is_notice
from jaxsys.train.trainer import Trainer
from parallelism.coordinator import SingleProcess
from parallelism.errors import UserError

LADDER = (
    Level("ram", "memory", on="host"),
    Level("peer", "peer"),
    Level("disk", "disk"),
    Level("store", "store"),
)


# ---------------------------------------------------------------------------------------------------------- signals


def wait_for(stop):
    while stop.asked is None:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("number", AHEAD)
def test_a_signal_ahead_of_sigterm_is_a_notice_and_the_sigterm_after_it_does_not_end_the_save(number):
    with Stop() as stop:
        os.kill(os.getpid(), number)
        wait_for(stop)
        since = stop.since
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.asked, stop.since) == (number.name, since)
    assert is_notice(stop.asked) and is_notice("SIGTERM (process 3)") and not is_notice("SIGINT (process 0)")


def test_the_second_of_sigint_and_sigterm_ends_the_process():
    code = (
        "import os, signal, threading\nfrom jaxsys.train.stop import Stop\n"
        "with Stop() as stop:\n"
        "    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):\n"
        "        os.kill(os.getpid(), number)\n"
        "        threading.Event().wait(0.1)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    threading.Event().wait(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "still here\n")
    assert done.stderr == "SIGUSR1: finishing the step, saving, then exiting; SIGTERM twice to exit at once\n"


# ------------------------------------------------------------------------------------------------------- which level


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, ["peer", "disk", "store", "ram"]),  # as the ladder has them
        ({"ram": 1.0, "peer": 9.0, "disk": 3.0, "store": 5.0}, ["disk", "store", "peer", "ram"]),
        ({"peer": 9.0, "disk": 3.0}, ["disk", "peer", "store", "ram"]),
    ],
)
def test_levels_that_survive_the_host_come_first_each_by_its_seconds(seconds, expected):
    assert order(LADDER, lambda name: seconds.get(name, float("inf"))) == expected


class Books:
    """Estimates, and a clock that saves move."""

    def __init__(self, monkeypatch, seconds, taken=(), failing=()):
        self.seconds, self.taken, self.failing = seconds, {**seconds, **dict(taken)}, failing
        self.now, self.begun, self.given_up = 100.0, [], []
        monkeypatch.setattr(last_save, "time", SimpleNamespace(monotonic=lambda: self.now))

    def estimate(self, name):
        return self.seconds.get(name, float("inf"))

    def save(self, name):
        self.begun.append(name)
        give_up = partial(self.given_up.append, name)
        return SimpleNamespace(wait=partial(self._wait, name), give_up=give_up)

    def _wait(self, name, seconds):
        self.now += min(self.taken[name], seconds)
        if self.taken[name] > seconds:
            raise TimeoutError
        if name in self.failing:
            raise UserError("the disk is full")

    def within(self, seconds):
        said = []
        done = save_within(seconds, 95.0, LADDER, self, SingleProcess(), self.save, said.append)
        assert done == any(line.startswith("saved to") for line in said)
        return said


def test_slower_levels_follow_while_there_is_time(monkeypatch):
    books = Books(monkeypatch, {"ram": 1.0, "peer": 2.0, "disk": 8.0, "store": 60.0})
    said = books.within(30.0)
    assert books.begun == ["peer", "disk", "ram"]
    assert said == [
        "saved to peer in 2.0 s, 7.0 s after the notice (allowed: 30)",
        "saved to disk in 8.0 s, 15.0 s after the notice (allowed: 30)",
        "saved to ram in 1.0 s, 16.0 s after the notice (allowed: 30)",
        "not saved to store (no time: 15 s left)",
    ]


def test_until_one_level_has_it_the_next_is_tried_however_late(monkeypatch):
    seconds = {"ram": 1.0, "peer": 2.0, "disk": 8.0, "store": 60.0}
    books = Books(monkeypatch, seconds, failing=("peer", "disk"))
    assert books.within(6.0)[-1].startswith("not saved to peer (it failed), disk (it failed), ram")
    assert books.begun == ["peer", "disk", "store"]


def test_a_level_that_hangs_leaves_time_for_the_others(monkeypatch):
    books = Books(monkeypatch, {"ram": 1.0, "peer": 2.0, "disk": 8.0, "store": 60.0}, taken={"peer": 1000.0})
    said = books.within(30.0)
    assert (books.begun, books.given_up) == (["peer", "disk", "ram"], ["peer"])
    assert said[0] == "saved to disk in 8.0 s, 19.2 s after the notice (allowed: 30)"
    assert said[-1].startswith("not saved to peer (not done in time), store")


def test_a_level_that_was_never_measured_is_tried_as_long_as_any_time_is_left(monkeypatch):
    seconds = {"ram": 1.0, "peer": 2.0, "disk": 3.0}
    books = Books(monkeypatch, seconds, taken={"store": 50.0})
    assert books.within(30.0)[-1] == "not saved to store (not done in time), ram (no time: 0 s left)"
    assert books.begun == ["peer", "disk", "store"]
    books = Books(monkeypatch, seconds, taken={"store": 50.0})
    books.within(10.0)  # no time for the disk, so none for what is slower
    assert books.begun == ["peer", "ram"]


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def written(monkeypatch):
    """(level, step) in the order in which they are committed."""
    found, write = [], OpenLevel._write

    def spied(self, step, *arguments):
        metrics = write(self, step, *arguments)
        found.append((self.name, step))
        # As slow as the level's name says, without anybody waiting for it.
        return dataclasses.replace(metrics, seconds={"ram": 0.0, "disk": 1000.0}[self.name])

    monkeypatch.setattr(OpenLevel, "_write", spied)
    return found


@pytest.mark.parametrize(
    ("signal_name", "expected"),
    [
        ("SIGTERM", ["disk", "ram"]),
        ("SIGUSR1", ["disk", "ram"]),
        ("SIGINT", ["ram", "disk"]),  # up the ladder, as any save
    ],
)
def test_a_notice_saves_first_where_the_host_is_not_needed(tmp_path, material, written, signal_name, expected):
    levels = CheckpointConfig(every=100, ram=str(tmp_path / "memory"), ram_every=1, grace_seconds=2000.0)
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=5, checkpoint=levels)
    console = quiet()
    with Trainer(config, console) as trainer:
        stops = trainer._stops

        def asked():
            if trainer.step == 2:
                trainer.manager.wait()
                trainer.stop.asked = signal_name
            return stops()

        trainer._stops = asked
        summary = trainer.run()
    assert (summary.step, summary.finished, summary.save_error) == (2, False, None)
    assert written == [("ram", 1), *((name, 2) for name in expected)]
    told = [line for line in console.lines if line.startswith("step 2: saved to disk in")]
    assert len(told) == (signal_name != "SIGINT")
    assert summary.checkpoint_bytes > 0
    with Trainer(config, quiet()) as again:
        assert again.step == 2


def test_what_the_grace_time_has_no_room_for_is_left_out(tmp_path, material, written):
    levels = CheckpointConfig(every=1, ram=str(tmp_path / "memory"), ram_every=100, grace_seconds=1e-6)
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=5, checkpoint=levels)
    console = quiet()
    with Trainer(config, console) as trainer:
        trainer.stop.asked = "SIGTERM"
        summary = trainer.run()
    assert written == [("disk", 1)] and summary.save_error is None
    assert any("not saved to ram (no time: 0 s left)" in line for line in console.lines)


def test_a_disk_that_hangs_with_an_earlier_save_does_not_keep_the_last_from_other_levels(
    tmp_path, material, monkeypatch
):
    """Its blocks fill the staging memory, and the next step waits for the rest of the state to be copied."""
    go_on, create, write, found, released = threading.Event(), LocalStore.create, OpenLevel._write, [], []
    levels = CheckpointConfig(every=1, ram=str(tmp_path / "memory"), ram_every=100, grace_seconds=6.0)
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=5, checkpoint=levels)
    with Trainer(config, quiet()) as trainer:

        @contextlib.contextmanager
        def hangs(store, directory, name):
            if store.root.is_relative_to(tmp_path / "run"):
                trainer.stop.asked = "SIGTERM"
                released.append(go_on.wait(30))
            with create(store, directory, name) as file:
                yield file

        def spied(self, step, *arguments):
            metrics = write(self, step, *arguments)
            found.append((self.name, step))
            go_on.set()
            return metrics

        monkeypatch.setattr(LocalStore, "create", hangs)
        monkeypatch.setattr(OpenLevel, "_write", spied)
        trainer.manager._staging.budget = 1 << 10
        summary = trainer.run()
    assert released and all(released)
    assert (summary.step, found[0], summary.save_error) == (2, ("ram", 2), None)


@pytest.mark.parametrize("ram", [False, True])
def test_a_disk_that_is_slow_and_writes_on_keeps_its_save_on_a_notice(tmp_path, material, monkeypatch, ram):
    """The save takes longer than a third of the grace time, in which it would be given up if it did not move."""
    add, found, write = ChunkWriter.add, [], OpenLevel._write
    memory = {"ram": str(tmp_path / "memory"), "ram_every": 100} if ram else {}
    levels = CheckpointConfig(every=1, grace_seconds=9.0, **memory)
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=5, checkpoint=levels)
    with Trainer(config, quiet()) as trainer:

        def slow(writer, block):
            trainer.stop.asked = "SIGTERM"
            if "run" in writer.where and not found:
                threading.Event().wait(4.0 / 34)  # of which there are as many
            add(writer, block)

        def spied(self, step, *arguments):
            metrics = write(self, step, *arguments)
            found.append((self.name, step))
            return metrics

        monkeypatch.setattr(ChunkWriter, "add", slow)
        monkeypatch.setattr(ChunkWriter, "where", property(lambda self: self._files.where), raising=False)
        monkeypatch.setattr(OpenLevel, "_write", spied)
        trainer.manager._staging.budget = 1 << 10
        trainer.run()
    assert found[0] == ("disk", 1)
