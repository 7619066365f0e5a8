"""A local store: what is there after a crash, and the writer's lock; and which files a level keeps."""

import os
import subprocess
import sys

import numpy as np
import pytest

from checkpoint import Level
from checkpoint.levels import OpenLevel
from checkpoint.manifest import CorruptError
from checkpoint.storage import LocalFiles, LocalStore, steps_in
from checkpoint.writer import Piece, blocks_of
from parallelism.coordinator import SingleProcess
from parallelism.errors import UserError
from parallelism.layout import Logical


def put(store, step, content=b"x"):
    store.put(f"step-{step:08d}", "manifest.json", content)


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    put(store, 1, b"old")

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            put(store, 1, b"new")
    assert store.open("step-00000001").read("manifest.json") == b"old"
    put(store, 1, b"new")
    assert store.open("step-00000001").read("manifest.json") == b"new"
    assert store.names() == {"step-00000001": {"manifest.json"}}


def test_what_has_no_manifest_is_no_step(tmp_path):
    store = LocalStore(tmp_path)
    with store.create("step-00000003", "data") as file:
        file.write(b"abc")
    assert steps_in(store.names()) == []
    put(store, 3)
    assert steps_in(store.names()) == [3]
    assert store.open("step-00000003").read("data") == b"abc"


@pytest.mark.parametrize("name", ["manifest.json", "data"])
@pytest.mark.parametrize("what", ["pipe", "loop", "directory"])
def test_what_is_no_file_is_damage_and_nobody_waits_for_it(tmp_path, name, what):
    LocalStore(tmp_path)
    place = tmp_path / "step-00000001" / name
    place.parent.mkdir()
    {"pipe": lambda: os.mkfifo(place), "loop": lambda: place.symlink_to(place), "directory": place.mkdir}[what]()
    files = LocalStore(tmp_path).open(place.parent.name)
    for read in (files.read, files.size, lambda name: files.read_into(name, 0, memoryview(bytearray(1)))):
        with pytest.raises((CorruptError, OSError) if read not in (files.read, files.size) else CorruptError):
            read(name)


def test_steps_are_in_numerical_order_past_eight_digits(tmp_path):
    store = LocalStore(tmp_path)
    for step in (123456789, 5, 99999999):
        put(store, step)
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert steps_in(store.names()) == [5, 99999999, 123456789]


def test_a_directory_goes_with_its_last_file(tmp_path):
    store = LocalStore(tmp_path)
    put(store, 1)
    with store.create("step-00000001", "data") as file:
        file.write(b"abc")
    store.delete("step-00000001", ["manifest.json"])
    assert store.names() == {"step-00000001": {"data"}}
    store.delete("step-00000001", ["data", "is not there"])
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    first, second = LocalStore(tmp_path), LocalStore(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=f"being written by process {os.getpid()} on host"):
        second.acquire()
    first.release()
    second.acquire()


def test_a_killed_writer_holds_no_lock(tmp_path):
    code = (
        "import os, signal, sys; from checkpoint.storage import LocalStore;"
        "LocalStore(sys.argv[1]).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env={**os.environ, "PYTHONPATH": "."})
    assert (tmp_path / ".lock").exists()
    LocalStore(tmp_path).acquire()


def test_a_root_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="cannot make checkpoint directory"):
        LocalStore(tmp_path / "f")


def test_reading_past_the_end_is_damage(tmp_path):
    store = LocalStore(tmp_path)
    put(store, 1, b"abc")
    with pytest.raises(CorruptError, match="truncated: 3 bytes, expected at least 5"):
        store.open("step-00000001").read_into("manifest.json", 1, memoryview(bytearray(4)))


# -- chunks that stay the same


SPEC = {name: Logical(name, (64,), np.dtype(np.float32), (None,)) for name in "abcd"}


@pytest.fixture
def level(tmp_path):
    found = OpenLevel(Level("disk", tmp_path, keep=2), LocalStore(tmp_path), SingleProcess())
    found.acquire("")
    yield found
    found.store.release()


def save(level, step, **values):
    """256 bytes each, all of one value."""
    pieces = [Piece(SPEC[name], (0,), np.full(64, value, np.float32)) for name, value in values.items()]
    return level.write(step, {}, [SPEC[name] for name in values], blocks_of(pieces))


def check(level, step, **values):
    reader = level.open(step)
    assert reader.verify().ok
    for name, value in values.items():
        np.testing.assert_array_equal(reader.read(name), np.full(64, value, np.float32))


def files(level):
    return {f"{directory}/{name[:10]}" for directory, names in level.store.names().items() for name in names}


def test_a_chunk_that_did_not_change_is_not_written_again(level):
    first = save(level, 1, a=1, b=1, c=1)
    second = save(level, 2, a=1, b=1, c=2)
    assert (first.kept_bytes, second.kept_bytes) == (0, 512)
    assert 3 * second.nbytes == first.nbytes
    check(level, 1, a=1, b=1, c=1)
    check(level, 2, a=1, b=1, c=2)


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_what_is_far_is_not_read_back_but_must_be_there(level, tmp_path, damage, monkeypatch):
    level.store.near = False
    save(level, 1, a=1, b=1, c=1)
    with monkeypatch.context() as m:
        m.setattr(LocalFiles, "read_into", None)
        assert save(level, 2, a=1, b=1, c=1).kept_bytes == 768
    (file,) = (tmp_path / "step-00000001").glob("data-*")
    file.write_bytes(file.read_bytes()[:-3]) if damage == "cut" else file.unlink()
    assert save(level, 3, a=1, b=1, c=1).kept_bytes == {"cut": 512, "missing": 0}[damage]
    check(level, 3, a=1, b=1, c=1)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_chunk_that_is_damaged_is_written_again(level, tmp_path, damage):
    save(level, 1, a=1, b=1, c=1)
    (file,) = (tmp_path / "step-00000001").glob("data-*")
    good = bytearray(file.read_bytes())
    good[5] ^= 1
    {"flip": lambda: file.write_bytes(good), "cut": lambda: file.write_bytes(good[:3]), "missing": file.unlink}[
        damage
    ]()
    second = save(level, 2, a=1, b=1, c=1)
    assert second.kept_bytes == {"flip": 512, "cut": 0, "missing": 0}[damage]
    check(level, 2, a=1, b=1, c=1)


def test_nothing_that_changed_writes_no_data(level):
    save(level, 1, a=1)
    assert save(level, 2, a=1).nbytes == 0
    assert files(level) == {"step-00000001/data-00000", "step-00000001/manifest.j", "step-00000002/manifest.j"}
    check(level, 2, a=1)


def test_a_file_stays_while_a_kept_step_uses_it(level):
    for step in (1, 2, 3, 4):
        save(level, step, a=1, b=1, c=step)
    assert level.steps() == [3, 4]
    expected = {"step-00000001/data-00000"} | {
        f"step-0000000{n}/{name}" for n in (3, 4) for name in ("data-00000", "manifest.j")
    }
    assert files(level) == expected
    check(level, 4, a=1, b=1, c=4)
    for step in (5, 6):
        save(level, step, a=step, b=step, c=step)
    assert not [name for name in files(level) if name < "step-00000005"]


def test_a_file_of_which_little_is_used_is_left(level):
    """Or what is used of many files would keep all of them."""
    save(level, 1, a=1, b=1, c=1, d=1)
    assert save(level, 2, a=1, b=1, c=2, d=2).kept_bytes == 512
    assert save(level, 3, a=1, b=3, c=3, d=3).kept_bytes == 256
    assert save(level, 4, a=1, b=4, c=4, d=4).kept_bytes == 0  # a quarter of the first file is in use
    check(level, 4, a=1, b=4, c=4, d=4)
    save(level, 5, a=1, b=5, c=5, d=5)
    assert not [name for name in files(level) if name.startswith("step-00000001")]


def test_what_stays_the_same_is_written_at_most_twice_however_little_it_is(level):
    """The second time into a file of its own."""
    kept = [save(level, step, a=1, b=step, c=step, d=step).kept_bytes for step in range(1, 7)]
    assert kept == [0, 256, 0, 256, 256, 256]
    check(level, 6, a=1, b=6, c=6, d=6)
    assert len([name for name in files(level) if "/data" in name]) == 3  # the last two steps', and what they share


def test_a_step_may_be_written_again(level):
    save(level, 1, a=1, b=1)
    save(level, 2, a=1, b=2)
    save(level, 2, a=1, b=3)
    check(level, 2, a=1, b=3)
    check(level, 1, a=1, b=1)
    assert len(level.store.names()["step-00000002"]) == 2


def test_a_save_that_fails_leaves_the_steps_before_as_they_were(level):
    save(level, 1, a=1, b=1)
    before = level.store.names()

    def pieces():
        yield Piece(SPEC["a"], (0,), np.zeros(64, np.float32))
        raise OSError(28, "No space left on device")

    level.pin(2)
    with pytest.raises(OSError):
        level.write(2, {}, list(SPEC.values()), blocks_of(pieces()))
    assert [block.logical.name for block in level.salvage(2, list(SPEC.values()))] == ["a"]
    level.unpin(2)
    assert level.store.names() == before
    check(level, 1, a=1, b=1)


def test_what_a_killed_writer_left_is_removed_and_nothing_else(level, tmp_path):
    save(level, 1, a=1, b=1)
    save(level, 2, a=1, b=2)
    (tmp_path / "step-00000002" / ".tmp-manifest.json").write_text("{")
    (tmp_path / "step-00000001" / "manifest.json").unlink()  # killed while it deleted step 1
    for name in ("step-00000003/data-00000-a.bin", "step-00000002/data-00000-b.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("torn")
    level.store.release()
    level.acquire("")
    assert files(level) == {"step-00000001/data-00000", "step-00000002/data-00000", "step-00000002/manifest.j"}
    check(level, 2, a=1, b=2)


def test_nothing_beside_a_damaged_manifest_is_removed(level, tmp_path):
    save(level, 1, a=1)
    before = level.store.names()
    path = tmp_path / "step-00000001" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    fresh = OpenLevel(level.level, level.store, SingleProcess())
    level.store.release()
    fresh.acquire("")
    assert level.store.names() == before
