"""Checkpoints in an object store: against a real server that speaks S3, in a process of its own."""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from crash_checks import copy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import write_recipe

import checkpoint
from checkpoint import CorruptError, Level, Manager, find_checkpoint, machine, objects, open_checkpoint
from checkpoint.levels import OpenLevel
from checkpoint.objects import ObjectError, ObjectStore
from checkpoint.places import find_place, root_of
from checkpoint.storage import committed, place_of, steps_in, store_of
from checkpoint.writer import Piece, blocks_of
from jaxsys.cli.main import main
from parallelism.coordinator import SingleProcess
from parallelism.errors import UserError
from parallelism.layout import Logical

BUCKET = "checkpoints"


class Server:
    """A moto server. Tests look at its objects and damage them by plain HTTP, as the code under test does not."""

    def __init__(self, log):
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        for _ in range(600):
            if found := re.search(r"Running on (http://[\d.:]+)", log.read_text()):
                break
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.1)
        self.url = found[1]
        self.put("")

    def _ask(self, method, key, data=None):
        signed = (
            "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        )
        headers = {"Authorization": signed, "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.url}/{BUCKET}/{key}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def put(self, key, data=None):
        self._ask("PUT", key, data)

    def get(self, key):
        return self._ask("GET", key)

    def delete(self, key):
        self._ask("DELETE", key)

    def keys(self, prefix):
        text = self._ask("GET", f"?list-type=2&prefix={prefix}/").decode()
        return {key.removeprefix(f"{prefix}/") for key in re.findall(r"<Key>(.*?)</Key>", text)}

    def stop(self):
        self.process.kill()
        self.process.wait()


def connect(monkeypatch, url):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server") / "log")
    with pytest.MonkeyPatch.context() as monkeypatch:
        connect(monkeypatch, found.url)
        yield found
    found.stop()


@pytest.fixture
def run(server):
    """A prefix that no other test has."""
    return f"runs/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def url(run):
    return f"s3://{BUCKET}/{run}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(objects, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(objects, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})


def store_at(url, lease=0.4, timeout=20.0):
    return ObjectStore(url, lease=lease, timeout=timeout)


# -- files


def test_what_is_put_is_read_and_listed_and_deleted(server, run, url):
    store = store_at(url)
    with store.create("step-00000003", "data") as file:
        file.write(b"abc")
        file.write(b"de")
        assert server.keys(run) == set()  # nothing is seen of it before its end
    assert steps_in(store.names()) == []
    store.put("step-00000003", "manifest.json", b"old")
    store.put("step-00000003", "manifest.json", b"new")
    server.put(f"{run}/notes/step-00000004/x", b"not a step")
    assert store.names() == {"step-00000003": {"data", "manifest.json"}}
    assert server.get(f"{run}/step-00000003/data") == b"abcde"
    assert store.open("step-00000003").read("manifest.json") == b"new"
    assert store.open("step-00000004").read("../step-00000003/data") == b"abcde"
    store.delete("step-00000003", ["data", "is not there"])
    assert store.names() == {"step-00000003": {"manifest.json"}}


def test_a_file_whose_writing_fails_is_not_there(server, run, url):
    with pytest.raises(KeyboardInterrupt), store_at(url).create("step-00000003", "data") as file:
        file.write(b"abc")
        raise KeyboardInterrupt
    assert server.keys(run) == set()


def test_several_files_may_be_sent_at_once(server, url):
    store = store_at(url)

    def send(i):
        with store.create("step-00000001", f"data-{i}") as file:
            file.write(bytes([i]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(16)))
    assert all(store.open("step-00000001").read(f"data-{i}") == bytes([i]) * 1000 for i in range(16))


@settings(max_examples=25, deadline=None)
@given(data=st.binary(min_size=1, max_size=40), cut=st.tuples(st.integers(0, 45), st.integers(0, 45)))
def test_any_range_of_a_file_is_read_and_what_is_beyond_its_end_is_damage(server, data, cut):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(objects, "READ_BYTES", 3)
        monkeypatch.setattr(objects, "PROBE_BYTES", 4)
        server.put("ranges/step-00000001/data", data)
        files = store_at(f"s3://{BUCKET}/ranges").open("step-00000001")
        assert files.size("data") == len(data)
        offset, stop = sorted(cut)
        buffer = bytearray(stop - offset)
        if stop <= len(data) or not buffer:
            files.read_into("data", offset, memoryview(buffer))
            assert buffer == data[offset:stop]
        else:
            with pytest.raises(
                CorruptError, match=f"ranges/step-00000001/data is truncated: it ends before byte {stop}"
            ):
                files.read_into("data", offset, memoryview(buffer))


def test_a_file_that_is_missing_is_damage(url):
    files = store_at(url).open("step-00000001")
    for read in (files.read, files.size, lambda name: files.read_into(name, 0, memoryview(bytearray(1)))):
        with pytest.raises(CorruptError, match=rf"file {url}/step-00000001/data is missing; use another checkpoint"):
            read("data")
    with pytest.raises(CorruptError, match="which this step shares with one before it"):
        files.read("../step-00000000/data")


def test_a_patch_replaces_bytes_or_makes_the_file(server, run, url):
    store = store_at(url)
    store.put("step-00000001", "data", b"0123456789")
    store.patch("step-00000001", "data", 3, b"abc")
    assert server.get(f"{run}/step-00000001/data") == b"012abc6789"
    store.patch("step-00000001", "data", 9, b"xyz")
    assert server.get(f"{run}/step-00000001/data") == b"012abc678xyz"
    store.patch("step-00000001", "other", 2, b"ab")
    assert server.get(f"{run}/step-00000001/other") == b"\0\0ab"
    assert store.open("step-00000001").size("data") == 12


# -- levels


SPEC = {name: Logical(name, (64,), np.dtype(np.float32), (None,)) for name in "abcd"}


def open_level(url, **options):
    level = OpenLevel(Level("remote", url, keep=2), store_at(url, **options), SingleProcess())
    level.acquire("")
    return level


@pytest.fixture
def level(url):
    found = open_level(url)
    yield found
    found.store.release()


def save(level, step, **values):
    """256 bytes each, all of one value."""
    pieces = [Piece(SPEC[name], (0,), np.full(64, value, np.float32)) for name, value in values.items()]
    return level.write(step, {}, [SPEC[name] for name in values], blocks_of(pieces))


def check(reader, **values):
    assert reader.verify().ok
    for name, value in values.items():
        np.testing.assert_array_equal(reader.read(name), np.full(64, value, np.float32))


def keys(server, run):
    """Without the random part of names of data files, and without the lock."""
    return {re.sub(r"-00000-\w+\.bin", "", key) for key in server.keys(run) if key != ".lock"}


def data_key(server, run, step):
    (name,) = [key for key in server.keys(run) if key.startswith(f"step-{step:08d}/data")]
    return f"{run}/{name}"


@pytest.mark.parametrize("again", [False, True], ids=["same writer", "started again"])
def test_chunks_that_did_not_change_are_not_sent_again(server, run, url, again):
    with contextlib.closing(contextlib.ExitStack()) as stack:
        level = open_level(url)
        first = save(level, 1, a=1, b=1, c=1)
        if again:  # how long the files are is not known then
            level.store.release()
            level = open_level(url)
        stack.callback(level.store.release)
        second = save(level, 2, a=1, b=1, c=2)
        assert (first.kept_bytes, second.kept_bytes) == (0, 512)
        assert len(server.get(data_key(server, run, 2))) * 3 == len(server.get(data_key(server, run, 1)))
        check(level.open(1), a=1, b=1, c=1)
        check(level.open(2), a=1, b=1, c=2)
        assert save(level, 3, a=1, b=1, c=2).nbytes == 0


def test_retention_keeps_what_is_in_use_and_nothing_else(server, run, level):
    for step in (1, 2, 3, 4):
        save(level, step, a=1, b=1, c=step)
    assert level.steps() == [3, 4]
    kept = {f"step-0000000{step}/{name}" for step in (3, 4) for name in ("data", "manifest.json")}
    assert keys(server, run) == kept | {"step-00000001/data"}
    check(level.open(4), a=1, b=1, c=4)
    for step in (5, 6):
        save(level, step, a=step, b=step, c=step)
    assert min(keys(server, run)) > "step-00000005"


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_damage_is_found(server, run, level, damage):
    save(level, 1, a=1, b=1)
    key = f"{run}/step-00000001/manifest.json" if damage == "manifest" else data_key(server, run, 1)
    data = bytearray(server.get(key))
    data[30] ^= 4
    if damage == "missing":
        server.delete(key)
    else:
        server.put(key, bytes(data[:30]) if damage == "cut" else bytes(data))
    if damage == "manifest":
        with pytest.raises(CorruptError, match=rf"s3://{BUCKET}/{key} is damaged: digest"):
            level.open(1)
    else:
        report = level.open(1).verify()
        assert len(report.errors) == {"flip": 1, "cut": 2, "missing": 2}[damage]
        assert f"s3://{BUCKET}/{key}" in report.errors[0]


def test_who_cannot_read_a_manifest_deletes_nothing(server, run, level, monkeypatch):
    """Or chunks of step 1, of which step 2 is made, would be lost with it when the network fails for a moment."""
    for step in (1, 2, 3):
        save(level, step, a=1, b=1, c=step)
    before = server.keys(run)
    level._known_steps.clear()

    def fails(files, name):
        raise ObjectError("no answer")

    with monkeypatch.context() as m:
        m.setattr(objects.ObjectFiles, "read", fails)
        level.pin(3)
        level.unpin(3)
    assert server.keys(run) == before
    check(level.open(3), a=1, b=1, c=3)


def test_a_writer_killed_in_a_save_leaves_the_steps_before_and_is_swept_by_the_next(server, run, url):
    code = (
        "import os, signal, sys; import numpy as np; from checkpoint import Level, objects;"
        "from checkpoint.levels import OpenLevel; from checkpoint.objects import ObjectStore;"
        "from checkpoint.writer import Piece, blocks_of; from parallelism.coordinator import SingleProcess;"
        "from parallelism.layout import Logical\n"
        "objects.SETTLE_SECONDS = 0\n"
        "store = ObjectStore(sys.argv[1], lease=1000)\n"
        "level = OpenLevel(Level('remote', sys.argv[1]), store, SingleProcess())\n"
        "level.acquire('')\n"
        "spec = Logical('a', (64,), np.dtype(np.float32), (None,))\n"
        "def save(step): level.write(step, {}, [spec], blocks_of([Piece(spec, (0,), np.full(64, step, np.float32))]))\n"
        "save(1)\n"
        "put = store.put\n"
        "def dies(directory, name, data):\n"
        "    if name == 'manifest.json': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    put(directory, name, data)\n"
        "store.put = dies\n"
        "save(2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", code, url], check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert keys(server, run) == {"step-00000001/data", "step-00000001/manifest.json", "step-00000002/data"}
    assert ".lock" in server.keys(run)
    level = open_level(url)  # at once, although the lease is one of 1000 seconds
    try:
        assert level.steps() == [1]
        check(level.open(1), a=1)
        assert keys(server, run) == {"step-00000001/data", "step-00000001/manifest.json"}
        save(level, 2, a=2)
        check(level.open(2), a=2)
    finally:
        level.store.release()
    assert ".lock" not in server.keys(run)


# -- one writer


def holder(machine="another", pid=77, process="77 1", seconds=0.4, **more):
    found = {"host": "elsewhere", "pid": pid, "machine": machine, "process": process, "seconds": seconds}
    return json.dumps({**found, "mark": "theirs", "id": "theirs", "beats": 0, **more}).encode()


def test_a_second_writer_is_refused_and_told_who_writes(url):
    first, second = store_at(url, lease=1000), store_at(url)
    first.acquire("mark")
    assert second.mark() == "mark"
    with pytest.raises(
        UserError, match=rf"{url} is being written by process {os.getpid()} on host {socket.gethostname()};"
    ):
        second.acquire()
    first.release()
    assert second.mark() is None
    second.acquire()
    second.release()


def test_of_writers_that_come_at_once_one_writes(url):
    stores = [store_at(url) for _ in range(6)]

    def comes(store):
        try:
            store.acquire()
        except UserError as e:
            assert "is being written by process" in str(e)
            return False
        return True

    with ThreadPoolExecutor(len(stores)) as pool:
        assert sum(pool.map(comes, stores)) == 1
    for store in stores:
        store.release()


def test_a_writer_elsewhere_that_lives_is_refused_within_its_lease(server, run, url):
    server.put(f"{run}/.lock", holder(seconds=1000))
    timer = threading.Timer(0.3, lambda: server.put(f"{run}/.lock", holder(seconds=1000, beats=1)))
    timer.start()
    with pytest.raises(UserError, match="is being written by process 77 on host elsewhere; stop that"):
        store_at(url).acquire()
    timer.join()


def test_a_writer_elsewhere_that_is_not_heard_of_for_its_lease_is_replaced(server, run, url, caplog):
    server.put(f"{run}/.lock", holder(seconds=0.6))
    store, began = store_at(url), time.monotonic()
    store.acquire("ours")
    assert time.monotonic() - began >= 0.6
    assert "process 77 on host elsewhere; waiting up to 0.6 s" in caplog.text
    assert store.mark() == "ours"
    store.release()


@pytest.mark.parametrize("gone", ["no such process", "not waited for by its parent", "its number is another's now"])
def test_a_writer_of_this_machine_that_is_gone_is_replaced_at_once(server, run, url, gone, caplog):
    pid, process = os.getpid(), f"{os.getpid()} 1"
    if gone != "its number is another's now":
        child = subprocess.Popen([sys.executable, "-c", ""])
        pid, process = child.pid, machine.process(child.pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if gone == "no such process":
            child.wait()
    server.put(f"{run}/.lock", holder(machine.machine(), pid, process, seconds=1000))
    store = store_at(url)
    store.acquire()
    assert "waiting" not in caplog.text
    store.release()


def test_a_lock_that_makes_no_sense_is_nobodys(server, run, url):
    server.put(f"{run}/.lock", b"{")
    store = store_at(url)
    store.acquire("ours")
    assert store.mark() == "ours"
    store.release()


def test_a_holder_renews_its_lease(server, run, url):
    store = store_at(url)
    store.acquire()
    seen = set()
    for _ in range(200):
        seen.add(json.loads(server.get(f"{run}/.lock"))["beats"])
        if len(seen) == 4:
            break
        time.sleep(0.05)
    assert len(seen) == 4
    store.put("step-00000001", "data", b"x")
    store.release()
    assert server.keys(run) == {"step-00000001/data"}


def test_a_holder_that_was_replaced_writes_and_deletes_nothing_more(server, run, url, level, caplog):
    save(level, 1, a=1)
    server.put(f"{run}/.lock", holder(seconds=1000))
    level.store._lease._renew()
    before = server.keys(run)
    with pytest.raises(
        OSError, match=r"did not renew its lease in time, and now .* written by process 77 on host elsewhere"
    ):
        save(level, 2, a=2)
    with pytest.raises(ObjectError, match="end one of the two"):
        level.store.delete("step-00000001", ["manifest.json"])
    level.store.release()
    assert server.keys(run) == before
    assert json.loads(server.get(f"{run}/.lock"))["id"] == "theirs"


def test_a_holder_that_slept_asks_before_it_writes(server, run, url):
    store = store_at(url, lease=1000)
    store.acquire()
    server.put(f"{run}/.lock", holder(seconds=1000))
    store._lease._renewed -= 501  # seconds without a beat
    with pytest.raises(ObjectError, match="process 77"):
        store.put("step-00000001", "manifest.json", b"x")
    assert server.keys(run) == {".lock"}
    store.release()


def test_a_conditional_write_whose_answer_was_lost_is_not_taken_for_refused(server, run, url):
    bucket = store_at(url)._bucket
    nothing = bucket.get(f"{run}/x").generation
    server.put(f"{run}/x", b"mine")  # by the request that had no answer
    assert bucket.swap(f"{run}/x", b"mine", nothing)
    assert not bucket.swap(f"{run}/x", b"another's", nothing)


# -- a run


def test_a_run_saves_and_restores_from_an_object_store(server, run, url, h):
    state = h.make_state()
    with Manager([Level("remote", url, keep=2)]) as manager:
        for step in (1, 2, 3):
            manager.save(step, state.arrays, state.layout, {"seed": 7}).wait()
        assert manager.steps() == [2, 3]
        assert all(report.ok for report in manager.verify())
    with Manager([Level("remote", url)]) as manager:
        wide = h.make_state("stage=4,tensor=2", stacked=False, pad=16)
        restored = manager.restore(layout=wide.layout, shardings=wide.shardings)
        h.check(restored, wide)
    assert (restored.step, restored.meta) == (3, {"seed": 7})
    assert list(restored.sources) == [f"{url}/step-00000003"]


def test_a_chunk_damaged_on_disk_is_read_from_the_object_store(server, url, h, tmp_path, caplog):
    state = h.make_state()
    with Manager([Level("disk", tmp_path), Level("remote", url)]) as manager:
        manager.save(1, state.arrays, state.layout, {}).wait()
        (file,) = tmp_path.glob("step-00000001/data-*")
        good = file.read_bytes()
        file.write_bytes(good[:10] + bytes([good[10] ^ 1]) + good[11:])
        restored = manager.restore(layout=state.layout, shardings=state.shardings)
        h.check(restored, state)
    assert set(restored.sources) == {str(tmp_path / "step-00000001"), f"{url}/step-00000001"}
    assert file.read_bytes() == good


def test_a_chunk_damaged_in_the_object_store_is_mended_from_disk(server, run, url, h, tmp_path):
    state = h.make_state()
    with Manager([Level("remote", url), Level("disk", tmp_path)]) as manager:
        manager.save(1, state.arrays, state.layout, {}).wait()
        key = data_key(server, run, 1)
        good = server.get(key)
        server.put(key, good[:10] + bytes([good[10] ^ 1]) + good[11:])
        h.check(manager.restore(layout=state.layout, shardings=state.shardings), state)
        assert server.get(key) == good


def test_training_goes_on_when_the_server_stops_in_a_save(tmp_path, monkeypatch, h):
    server = Server(tmp_path / "log")
    connect(monkeypatch, server.url)
    state = h.make_state()
    url = f"s3://{BUCKET}/run"
    try:
        with Manager([Level("disk", tmp_path / "disk"), Level("remote", url)]) as manager:
            manager.save(1, state.arrays, state.layout, {}).wait()
            remote = manager._levels[1].store
            put = remote.put

            def stops(directory, name, data):
                if name == "manifest.json":
                    server.stop()
                put(directory, name, data)

            monkeypatch.setattr(remote, "put", stops)
            handle = manager.save(2, state.arrays, state.layout, {})
            with pytest.raises(UserError, match=rf"step 2 was not saved to {url}: .*{server.url} does not serve") as e:
                handle.wait()
            assert "\n" not in str(e.value)
            assert [(failure.step, failure.level) for failure in manager.failures] == [(2, "remote")]
            assert list(handle.metrics.levels) == ["disk"]
    finally:
        server.stop()
    reader = open_checkpoint(find_checkpoint(tmp_path / "disk"))
    assert reader.manifest.step == 2


# -- by URL, without a run


def test_checkpoints_are_found_opened_and_copied_by_url(server, run, url, level, tmp_path, caplog):
    save(level, 1, a=1, b=1)
    save(level, 2, a=1, b=2)
    assert committed(url) == [(1, f"{url}/step-00000001"), (2, f"{url}/step-00000002")]
    for place in (url, f"{url}/", Path(url)):
        assert find_checkpoint(place) == f"{url}/step-00000002"
    check(open_checkpoint(f"{url}/step-00000002"), a=1, b=2)
    assert find_checkpoint(f"{url}/step-00000001") == f"{url}/step-00000001"
    copy(url, tmp_path / "copy")
    check(open_checkpoint(tmp_path / "copy"), a=1, b=2)
    key = data_key(server, run, 2)
    server.put(key, b"x" * len(server.get(key)))
    assert find_checkpoint(url) == f"{url}/step-00000001"
    assert f"skipping checkpoint {url}/step-00000002" in caplog.text
    server.delete(data_key(server, run, 1))
    with pytest.raises(UserError, match=f"none of the 2 checkpoints in {url} verifies"):
        find_checkpoint(url)


def test_a_bucket_may_be_the_place_itself(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    level = open_level(f"s3://{BUCKET}")
    save(level, 1, a=1)
    level.store.release()
    assert [info.step for info in checkpoint.list_steps(find_place(f"s3://{BUCKET}"))] == [1]
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_is_told(url):
    with pytest.raises(UserError, match=f"{url} is not a checkpoint: it holds no manifest.json"):
        open_checkpoint(url)
    with pytest.raises(UserError, match=f"{url} is not a checkpoint: no manifest.json and no step-"):
        find_checkpoint(url)


def test_a_url_that_became_a_path_is_a_url_and_a_path_is_a_path():
    assert place_of("s3://bucket//a/b/") == place_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert place_of("S3://bucket") == "s3://bucket" and place_of("s3:/") == "s3://"
    for path in ("runs/s3", "/tmp/x:/y", "c:/x", "./s3:/x"):
        assert place_of(path) == Path(path)


def test_what_takes_a_directory_takes_no_url_for_one(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for of in (find_place, root_of):
        with contextlib.suppress(UserError):  # nothing is there
            of(Path(f"{url}/none"))
    with pytest.raises(UserError, match=r"s3://.* is in an object store, expected a directory"):
        checkpoint.write(Path(f"{url}/new"), 1, {}, [], [])
    assert list(tmp_path.iterdir()) == []


# -- errors


@pytest.mark.parametrize("url", ["file:///tmp/x", "http://bucket/x", "s3:///", "s3:/"])
def test_a_url_of_another_kind_is_told(url):
    with pytest.raises(
        UserError, match=r"is no place for checkpoints; use s3://bucket/\.\.\., gs://bucket/\.\.\. or a path"
    ):
        store_of(url)


def test_a_bad_name_of_a_bucket_is_told():
    with pytest.raises(UserError, match='cannot open s3://B K/x: Invalid S3 bucket name: "B K"; check the URL'):
        store_of("s3://B K/x")


def test_without_tensorstore_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UserError, match=r"needs the package tensorstore: pip install 'jaxsys\[objects\]'"):
        store_of("s3://bucket/x")


def everything(store):
    """Each kind of request."""
    yield store.acquire
    yield store.names
    yield lambda: store.open("step-00000001").read("manifest.json")
    yield lambda: store.open("step-00000001").read_into("data", 0, memoryview(bytearray(4)))
    yield lambda: store.put("step-00000001", "manifest.json", b"x")
    yield lambda: store.delete("step-00000001", ["manifest.json"])


def assert_refused(url, match, **options):
    for request in everything(store_at(url, **options)):
        with pytest.raises(ObjectError, match=match) as e:
            request()
        assert "\n" not in str(e.value) and e.value.strerror == str(e.value)


def test_a_bucket_that_does_not_exist_is_told(server):
    url = "s3://no-such-bucket/x"
    store = store_at(url)
    for request in (
        store.acquire,
        store.names,
        lambda: store.put("step-00000001", "x", b""),
        lambda: find_checkpoint(url),
    ):
        with pytest.raises(
            ObjectError, match=f"{url}.*: .*there is no bucket 'no-such-bucket'; make it or check the URL"
        ):
            request()


def complaint(capsys, *words):
    """The one line that the program ends with."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.count("jaxsys: ") == 1
    return err.splitlines()[-1]


@pytest.mark.parametrize("url", ["s3://no-such-bucket/x", "s3://no-such-bucket"])
@pytest.mark.parametrize("words", ["ls URL", "verify URL", "gc URL", "copy URL to", "copy own URL"])
def test_the_program_says_in_one_line_that_there_is_no_bucket(server, url, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    piece = Piece(SPEC["a"], (0,), np.zeros(64, np.float32))
    checkpoint.write("own/step-00000001", 1, {}, [SPEC["a"]], [piece])
    line = complaint(capsys, "checkpoint", *(url if word == "URL" else word for word in words.split()))
    assert line.startswith("jaxsys: ") and "there is no bucket 'no-such-bucket'; make it or check the URL" in line
    assert os.listdir() == ["own"]


def test_a_run_that_begins_says_in_one_line_that_there_is_no_bucket(server, capsys, tmp_path, material):
    recipe = write_recipe(tmp_path / "recipe.py", material)
    line = complaint(capsys, "train", "--config", recipe, "--set", "checkpoint.remote=s3://no-such-bucket/x")
    assert line.startswith("jaxsys: ") and "there is no bucket 'no-such-bucket'" in line


def test_a_server_that_is_not_there_is_told(monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    connect(monkeypatch, endpoint)
    assert f"{endpoint} does not serve" in complaint(capsys, "checkpoint", "ls", "s3://bucket/x")
    assert_refused("s3://bucket/x", rf"s3://bucket/x.*: {endpoint} does not serve .*; check network and URL")


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_said(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        connect(monkeypatch, endpoint)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{endpoint}/")
        match = (
            rf"no answer from {endpoint} within 0.2 seconds; check the network and the credentials \(.* is not set\)"
        )
        assert_refused("s3://bucket/x", match, timeout=0.2)


@pytest.mark.parametrize("code", ["AccessDenied", "SignatureDoesNotMatch"])
def test_refused_access_is_told(monkeypatch, capsys, code):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def refuse(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(403)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_DELETE = refuse

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as refuses:
        threading.Thread(target=refuses.serve_forever, daemon=True).start()
        connect(monkeypatch, f"http://127.0.0.1:{refuses.server_port}")
        match = rf"access is denied \(PERMISSION_DENIED: {code}\); .* the credentials \(AWS_ACCESS_KEY_ID is set\)"
        assert_refused("s3://bucket/x", match)
        assert "access is denied" in complaint(capsys, "checkpoint", "ls", "s3://bucket/x")
        refuses.shutdown()
