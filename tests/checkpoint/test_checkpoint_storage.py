"""Commit, deletion, cleaning and the writer's lock of a local directory."""

import os
import subprocess
import sys

import pytest

from checkpoint.manifest import CorruptError
from checkpoint.storage import LocalStorage
from parallelism.errors import UserError


def put(storage, step, content=b"x"):
    draft = storage.begin(step)
    with draft.write("manifest.json") as file:
        file.write(content)
    draft.commit()


def test_a_draft_is_not_there_until_it_is_committed(tmp_path):
    storage = LocalStorage(tmp_path)
    draft = storage.begin(3)
    with draft.write("manifest.json") as file:
        file.write(b"abc")
    assert storage.steps() == []
    assert draft.files().read("manifest.json") == b"abc"
    draft.commit()
    assert storage.steps() == [3]
    assert storage.open(3).read("manifest.json") == b"abc"


def test_an_aborted_draft_leaves_nothing(tmp_path):
    draft = LocalStorage(tmp_path).begin(3)
    with draft.write("a") as file:
        file.write(b"abc")
    draft.abort()
    assert list(tmp_path.iterdir()) == []


def test_committing_a_step_again_replaces_it(tmp_path):
    storage = LocalStorage(tmp_path)
    put(storage, 1, b"old")
    put(storage, 1, b"new")
    assert storage.open(1).read("manifest.json") == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("at", range(1, 4))
def test_a_replacement_that_stops_anywhere_leaves_the_old_or_the_new(tmp_path, monkeypatch, at):
    storage = LocalStorage(tmp_path)
    put(storage, 1, b"old")
    calls, rename = [], os.rename

    def dies(a, b):
        calls.append(a)
        if len(calls) == at:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        put(storage, 1, b"new")
    monkeypatch.setattr(os, "rename", rename)
    storage.acquire()
    assert storage.open(1).read("manifest.json") == (b"new" if at == 3 else b"old")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-00000001"]


def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    put(storage, 1, b"old")
    rename = os.rename

    def fails(a, b):
        if ".tmp-" in str(a):
            raise OSError(5, "Input/output error")
        rename(a, b)

    draft = storage.begin(1)
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError):
        draft.commit()
    draft.abort()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_deletion_that_stops_half_way_offers_no_torn_step(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    put(storage, 1)

    def dies(path, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("checkpoint.storage.shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            storage.delete(1)
    assert storage.steps() == []
    storage.acquire()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_steps_are_in_numerical_order_past_eight_digits(tmp_path):
    storage = LocalStorage(tmp_path)
    for step in (123456789, 5, 99999999):
        put(storage, step)
    assert storage.steps() == [5, 99999999, 123456789]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    first, second = LocalStorage(tmp_path), LocalStorage(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=f"being written by process {os.getpid()} on host"):
        second.acquire()
    first.release()
    second.acquire()


def test_a_killed_writer_holds_no_lock(tmp_path):
    code = (
        "import os, signal, sys; from checkpoint.storage import LocalStorage;"
        "LocalStorage(sys.argv[1]).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env={**os.environ, "PYTHONPATH": "."})
    assert (tmp_path / ".lock").exists()
    LocalStorage(tmp_path).acquire()


def test_a_root_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="cannot make checkpoint directory"):
        LocalStorage(tmp_path / "f")


def test_reading_past_the_end_is_damage(tmp_path):
    storage = LocalStorage(tmp_path)
    put(storage, 1, b"abc")
    with pytest.raises(CorruptError, match="truncated: 3 bytes, expected at least 5"):
        storage.open(1).read_into("manifest.json", 1, memoryview(bytearray(4)))
