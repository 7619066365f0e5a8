"""Checkpoints in the memory of several hosts: what is served to whom, where files lie, and what a lost host leaves.

The hosts are directories of this machine, and the processes of a job are threads of this one, but for one test.
"""

import json
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_files import STEP, write

from checkpoint import Level, hosts
from checkpoint.hosts import HostsStore, peers_of
from checkpoint.levels import OpenLevel
from checkpoint.manifest import Array, Chunk, CorruptError, Manifest
from checkpoint.storage import LocalStore, steps_in
from checkpoint.writer import Piece, blocks_of
from parallelism.coordinator import PeerError
from parallelism.errors import UserError
from parallelism.layout import Logical


class Process:
    """The coordinator of one of several threads: all of them call a channel equally often."""

    def __init__(self, index, count, calls, condition):
        self.index, self.count = index, count
        self._calls, self._condition, self._at = calls, condition, {}

    def gather(self, channel, value):
        at = self._at[channel] = self._at.get(channel, -1) + 1
        with self._condition:
            values = self._calls.setdefault((channel, at), {})
            values[self.index] = json.dumps(value)
            self._condition.notify_all()
            assert self._condition.wait_for(lambda: len(values) == self.count, 30), f"alone in {channel}"
        return [json.loads(values[i]) for i in range(self.count)]


def job(count):
    calls, condition = {}, threading.Condition()
    return [Process(i, count, calls, condition) for i in range(count)]


def together(works):
    """What each of these functions returns, run in a thread each; raises the first error."""
    results = [None] * len(works)

    def run(i, work):
        try:
            results[i] = work()
        except BaseException as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture
def start():
    """Starts a job with a process on each of these hosts; returns the store of each."""
    started = []

    def start(root, names, domains=None, processes=None, **options):
        options = {"address": "127.0.0.1", "seconds": 5.0, **options}

        def store(process, name):
            domain = (domains or {}).get(name)
            return HostsStore(root, coordinator=process, host=name, domain=domain, **options)

        processes = processes or job(len(names))
        stores = together([lambda p=p, n=n: store(p, n) for p, n in zip(processes, names, strict=True)])
        started.extend(stores)
        return stores

    yield start
    for store in started:
        store.close()


def lost(path):
    """As a host that lost its memory."""
    for directory in path.glob("step-*"):
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def manifest(step, file=None):
    """file: where its only array is."""
    arrays = {"x": Array(np.dtype("u1"), (1,), (None,), (Chunk((0,), (1,), file, 0, 1, "00" * 16),))} if file else {}
    return Manifest(step, {}, arrays).encode()


# -- peers


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12))
def test_each_host_has_a_peer_in_another_domain_and_no_two_have_the_same(numbers):
    domains = {f"host{i}": f"rack{n}" for i, n in enumerate(numbers)}
    most = max(numbers.count(n) for n in numbers)
    if most > len(numbers) // 2:
        with pytest.raises(UserError, match=f"has {most} of the {len(numbers)} hosts, expected at most"):
            peers_of(domains)
        return
    peers = peers_of(domains)
    assert sorted(peers.values()) == sorted(domains)
    assert all(domains[host] != domains[peer] for host, peer in peers.items())


@pytest.mark.parametrize("count", [2, 4, 10])
def test_half_of_the_hosts_may_go(count):
    peers = peers_of({f"host{i}": f"host{i}" for i in range(count)})
    for gone in (sorted(peers)[: count // 2], sorted(peers)[count // 2 :]):
        assert not [host for host in gone if peers[host] in gone]


def test_one_host_has_no_peer(tmp_path, start):
    with pytest.raises(UserError, match=r"on one host \(a\) has no peer"):
        start(tmp_path, ["a", "a"], peers=True)


# -- where files lie


@pytest.mark.parametrize("peers", [False, True])
def test_a_file_lies_on_its_writers_host_or_that_ones_peer_and_all_read_it(tmp_path, start, peers):
    stores = start(tmp_path, ["a", "b", "a", "b"], peers=peers)
    for i, store in enumerate(stores):
        write(store, STEP, f"data-0000{i}.bin", bytes([i]) * 100)
    there = {host: sorted(os.listdir(tmp_path / host / STEP)) for host in "ab"}
    even, odd = ["data-00000.bin", "data-00002.bin"], ["data-00001.bin", "data-00003.bin"]
    assert there == ({"a": odd, "b": even} if peers else {"a": even, "b": odd})
    for store in stores:
        assert store.names() == {STEP: {*even, *odd}}
        for i in range(4):
            files = store.open(STEP)
            assert files.size(f"data-0000{i}.bin") == 100
            assert files.read(f"data-0000{i}.bin") == bytes([i]) * 100


def test_another_steps_file_is_read_through_its_name(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    write(stores[1], STEP, "data-00001.bin", b"abc")
    buffer = bytearray(2)
    stores[0].open("step-00000002").read_into(f"../{STEP}/data-00001.bin", 1, memoryview(buffer))
    assert buffer == b"bc"


def test_files_are_found_by_a_job_of_other_hosts_and_processes(tmp_path, start):
    old = start(tmp_path, ["a", "b", "c"])
    for i, store in enumerate(old):
        write(store, STEP, f"data-0000{i}.bin", bytes([i]))
        store.close()
    new = start(tmp_path, ["c", "b"])
    for store in new:
        assert [store.open(STEP).read(f"data-0000{i}.bin") for i in (1, 2)] == [b"\1", b"\2"]
        with pytest.raises(CorruptError, match=r"on no host that can be reached: .*data-00000.bin is missing"):
            store.open(STEP).read("data-00000.bin")


def test_a_file_that_is_nowhere_is_looked_for_once(tmp_path, start, monkeypatch):
    """Not for each of its chunks: with many hosts that takes long."""
    stores = start(tmp_path, ["a", "b"])
    files = stores[0].open(STEP)
    find, asked = stores[0].find, []
    monkeypatch.setattr(stores[0], "find", lambda *place: asked.append(place) or find(*place))
    for _ in range(3):
        with pytest.raises(CorruptError, match=r"on no host that can be reached: .* is missing"):
            files.size("data-00001.bin")
    assert len(asked) == 1
    write(stores[1], STEP, "data-00001.bin", b"x")
    assert stores[0].open(STEP).size("data-00001.bin") == 1


def test_a_manifest_survives_all_hosts_but_one(tmp_path, start):
    stores = start(tmp_path, ["a", "b", "c"])
    stores[0].put(STEP, "manifest.json", manifest(1))
    for host in "ab":
        lost(tmp_path / host)
    for store in stores:
        assert steps_in(store.names()) == [1]
        assert store.open(STEP).read("manifest.json") == manifest(1)


def test_a_manifest_is_taken_from_a_host_where_it_is_whole(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    stores[0].put(STEP, "manifest.json", manifest(1))
    (tmp_path / "a" / STEP / "manifest.json").write_bytes(manifest(1)[:-1])
    assert stores[0].open(STEP).read("manifest.json") == manifest(1)
    (tmp_path / "b" / STEP / "manifest.json").write_bytes(b"x" + manifest(1)[1:])
    with pytest.raises(CorruptError, match=r"a/step-00000001/manifest.json is truncated"):
        stores[1].open(STEP).read("manifest.json")


def test_all_processes_read_the_same_manifest_after_a_commit_that_failed_halfway(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    stores[0].put(STEP, "manifest.json", manifest(1))
    (tmp_path / "b" / STEP / ".tmp-manifest.json").mkdir()  # so that b cannot make it
    with pytest.raises(OSError, match="on host b"):
        stores[0].put(STEP, "manifest.json", manifest(2))
    assert {store.open(STEP).read("manifest.json") for store in stores} == {manifest(2)}


def test_what_is_deleted_is_deleted_everywhere(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    for i, store in enumerate(stores):
        write(store, STEP, f"data-0000{i}.bin", b"x")
    stores[0].put(STEP, "manifest.json", b"{}")
    stores[0].delete(STEP, ["manifest.json"])
    assert stores[1].names() == {STEP: {"data-00000.bin", "data-00001.bin"}}
    stores[0].delete(STEP, ["data-00000.bin", "data-00001.bin", "is not there"])
    assert [path for host in "ab" for path in (tmp_path / host).glob("step-*")] == []


def test_an_empty_directory_is_deleted(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    (tmp_path / "b" / STEP).mkdir()
    assert stores[0].names() == {STEP: set()}
    stores[0].delete(STEP, [])
    assert stores[0].names() == {}


def test_a_file_is_mended_where_it_is_and_made_anew_where_its_host_lost_it(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    write(stores[1], STEP, "data-00001.bin", b"abcdef")
    stores[0].patch(STEP, "data-00001.bin", 2, b"CD")
    assert (tmp_path / "b" / STEP / "data-00001.bin").read_bytes() == b"abCDef"
    lost(tmp_path / "b")
    for store, offset in zip(stores, (0, 3), strict=True):
        store.patch("step-00000002", f"../{STEP}/data-00001.bin", offset, b"xyz")
    assert (tmp_path / "b" / STEP / "data-00001.bin").read_bytes() == b"xyzxyz"
    assert not (tmp_path / "a" / STEP).exists()


# -- one writer


def test_a_second_job_on_one_of_the_hosts_is_refused_and_told_who_writes(tmp_path, start):
    first, second = start(tmp_path, ["b", "c"]), start(tmp_path, ["a", "c"])
    first[0].acquire("mark")
    assert [store.mark() for store in first] == ["mark", "mark"]
    with pytest.raises(UserError, match=rf"/c is being written by process {os.getpid()} on host"):
        second[0].acquire("other")
    third = start(tmp_path, ["a", "d"])
    third[0].acquire()  # what the refused one had taken was given back
    third[0].release()
    first[0].release()
    second[0].acquire("other")
    assert [store.mark() for store in second] == ["other", "other"]


def test_copies_of_a_manifest_are_the_same_once_there_is_a_writer(tmp_path, start):
    """One of three hosts was away while a step was saved again, the next lost its memory."""
    stores = start(tmp_path, ["a", "b", "c"])
    write(stores[2], STEP, "data-00002-new.bin", b"x")
    for host, file in (("a", "data-00000-old.bin"), ("c", f"../{STEP}/data-00002-new.bin")):
        LocalStore(tmp_path / host).put(STEP, "manifest.json", manifest(1, file))
    stores[0].acquire()
    for host in "abc":
        there = (tmp_path / host / STEP / "manifest.json").read_bytes()
        assert there == manifest(1, f"../{STEP}/data-00002-new.bin")


def test_a_manifest_that_is_damaged_on_one_host_is_mended_and_on_all_is_left(tmp_path, start):
    stores = start(tmp_path, ["a", "b"])
    stores[0].put(STEP, "manifest.json", manifest(1))
    path = tmp_path / "a" / STEP / "manifest.json"
    path.write_bytes(b"torn")
    stores[0].acquire()
    assert path.read_bytes() == manifest(1)
    stores[0].release()
    for host in "ab":
        (tmp_path / host / STEP / "manifest.json").write_bytes(b"torn")
    stores[0].acquire()
    assert path.read_bytes() == b"torn"
    assert steps_in(stores[0].names()) == [1]


def test_the_others_do_not_release_what_the_writer_holds(tmp_path, start):
    stores, second = start(tmp_path, ["a", "b"]), start(tmp_path, ["a", "b"])
    stores[0].acquire()
    stores[1].release()
    with pytest.raises(UserError, match="is being written"):
        second[0].acquire()


@pytest.mark.parametrize("name", ["../b", ".b", "a/b"])
def test_a_host_whose_name_is_none_is_refused(tmp_path, start, name):
    with pytest.raises((UserError, PeerError), match=f"host is called '{name}', which cannot be the name of a dir"):
        start(tmp_path, ["a", name])


def test_an_address_that_is_not_this_machines_is_refused(tmp_path, start):
    with pytest.raises((UserError, PeerError), match=r"cannot listen at 192.0.2.1 .* set JAXSYS_ADDRESS"):
        start(tmp_path, ["a", "b"], address="192.0.2.1")


def test_two_machines_of_one_name_are_refused(tmp_path, start, monkeypatch):
    monkeypatch.setattr(hosts, "_place", lambda path: threading.get_ident())
    with pytest.raises(UserError, match="call their host 'a' have different directories"):
        start(tmp_path, ["a", "a"])


def test_processes_with_other_roots_are_refused(tmp_path, start):
    processes = job(2)
    with pytest.raises(UserError, match="expected the same path in all processes"):
        together(
            [
                lambda i=i: HostsStore(tmp_path / str(i), coordinator=processes[i], host="ab"[i], address="127.0.0.1")
                for i in range(2)
            ]
        )


# -- hosts that are gone


def test_a_host_that_is_gone_is_damage_to_a_reader_and_an_error_to_a_writer(tmp_path, start):
    stores = start(tmp_path, ["a", "b"], peers=True)
    write(stores[0], STEP, "data-00000.bin", b"abc")
    stores[0].put(STEP, "manifest.json", manifest(1))
    stores[1].close()
    assert stores[0].open(STEP).read("manifest.json") == manifest(1)
    assert stores[0].names() == {STEP: {"manifest.json"}}
    with pytest.raises(CorruptError, match=r"on no host that can be reached: .* host b cannot be reached"):
        stores[0].open(STEP).read_into("data-00000.bin", 0, memoryview(bytearray(3)))
    for failing in (
        lambda: write(stores[0], STEP, "data-00000-more.bin", b"x"),
        lambda: stores[0].put(STEP, "manifest.json", manifest(2)),
        lambda: stores[0].delete(STEP, ["manifest.json"]),
    ):
        with pytest.raises(OSError, match="host b cannot be reached"):
            failing()
    with pytest.raises(UserError, match="host b cannot be written"):
        stores[0].acquire()
    assert stores[0].names() == {}  # of those that are there, the manifest was deleted


# -- levels of a job


SPEC = {name: Logical(name, (64,), np.dtype(np.float32), (None,)) for name in "abcd"}


def levels(stores, processes, name="ram", keep=2):
    level = Level(name, "unused", keep=keep)
    opened = [OpenLevel(level, s, p) for s, p in zip(stores, processes, strict=True)]
    opened[0].acquire("mark")
    return opened


def save(opened, step, values):
    """Process i writes the i-th array, 256 bytes of one value."""
    specs = [SPEC[name] for name in "abcd"[: len(opened)]]

    def write(i):
        return opened[i].write(step, {}, specs, blocks_of([Piece(specs[i], (0,), np.full(64, values[i], np.float32))]))

    return together([lambda i=i: write(i) for i in range(len(opened))])


def check(reader, values):
    for name, value in zip("abcd", values, strict=False):
        np.testing.assert_array_equal(reader.read(name), np.full(64, value, np.float32))


def test_a_host_that_lost_its_memory_is_restored_from_its_peer_and_mended(tmp_path, start, caplog):
    processes = job(4)
    own = levels(start(tmp_path / "ram", "abcd", processes=processes), processes)
    peer = levels(start(tmp_path / "peer", "abcd", processes=processes, peers=True), processes, "peer")
    save(own, 1, [1, 2, 3, 4])
    together([lambda i=i: peer[i].promote(1, own[i]) for i in range(4)])
    for level in (*own, *peer):
        level.store.close()
    for root in ("ram", "peer"):
        lost(tmp_path / root / "b")

    processes = job(4)
    own = levels(start(tmp_path / "ram", "abcd", processes=processes), processes)
    peer = levels(start(tmp_path / "peer", "abcd", processes=processes, peers=True), processes, "peer")
    for i in range(4):
        assert own[i].steps() == peer[i].steps() == [1]
        reader = own[i].open(1, [peer[i].open(1)])
        check(reader, [1, 2, 3, 4])
        if i == 0:
            # b's own file came from its peer d; the file that b kept for d is there at d itself.
            nbytes = reader.read_by_place
            assert list(nbytes) == [f"hosts:{tmp_path}/ram/{STEP}", f"peers:{tmp_path}/peer/{STEP}"]
            assert [n // 256 for n in nbytes.values()] == [3 * 2, 2]  # with their tables
            assert own[i].mend(1, reader) == 1
            assert len(list((tmp_path / "ram" / "b").glob("*/data-00001*"))) == 1
        else:
            assert reader.mended == []
    assert not peer[0].open(1).verify().ok
    assert own[2].open(1).verify().ok


def test_a_levels_files_stay_while_they_are_used_and_go_when_they_are_not(tmp_path, start):
    processes = job(2)
    opened = levels(start(tmp_path, "ab", processes=processes, peers=True), processes)
    for step in (1, 2, 3, 4):
        metrics = save(opened, step, [1, step])
    assert [m.kept_bytes for m in metrics] == [256, 0]
    assert opened[1].steps() == [3, 4]
    check(opened[1].open(3), [1, 3])
    check(opened[0].open(4), [1, 4])
    where = {(p.parts[-3], p.parts[-2][-1], p.name[:10]) for p in tmp_path.glob("*/step-*/*")}
    committed = {(host, step, "manifest.j") for host in "ab" for step in "34"}
    assert where == committed | {("b", "1", "data-00000"), ("a", "3", "data-00001"), ("a", "4", "data-00001")}


def test_what_a_killed_job_left_is_removed_on_all_hosts(tmp_path, start):
    processes = job(2)
    opened = levels(start(tmp_path, "ab", processes=processes), processes)
    save(opened, 1, [1, 2])
    before = opened[0].store.names()
    for host in "ab":
        for name in (f"{STEP}/.tmp-manifest.json", "step-00000002/data-00000-x.bin"):
            path = tmp_path / host / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("torn")
    opened[0].store.release()
    opened[0].acquire("")
    assert opened[1].store.names() == before
    assert not list(tmp_path.glob("*/step-00000002"))
    check(opened[1].open(1), [1, 2])


def test_a_host_that_goes_fails_the_save_in_all_and_leaves_the_steps_before(tmp_path, start):
    processes = job(2)
    opened = levels(start(tmp_path, "ab", processes=processes, peers=True), processes)
    save(opened, 1, [1, 2])
    opened[1].store._server.close()
    with pytest.raises((OSError, RuntimeError), match="host b cannot be reached"):
        save(opened, 2, [3, 4])
    assert steps_in(LocalStore(tmp_path / "a").names()) == steps_in(LocalStore(tmp_path / "b").names()) == [1]


WORKER = """
import os, signal, sys
import jax, numpy as np
index, port, root, again = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "again"
jax.distributed.initialize("localhost:" + port, 2, index)
from checkpoint import Level
from checkpoint.hosts import HostsStore
from checkpoint.levels import OpenLevel
from checkpoint.writer import Piece, blocks_of
from parallelism.coordinator import default_coordinator
from parallelism.layout import Logical

specs = [Logical(f"x{i}", (1000,), np.dtype(np.float32), (None,)) for i in range(2)]
store = HostsStore(root, peers=True)
level = OpenLevel(Level("peer", root), store, default_coordinator())
if index == 0:
    level.acquire("mark")
default_coordinator().gather("acquired", None)
assert store.mark() == "mark"
if again:
    reader = level.open(1)
    for i in range(2):
        np.testing.assert_array_equal(reader.read(f"x{i}"), np.full(1000, i, np.float32))
else:
    level.write(1, {}, specs, blocks_of([Piece(specs[index], (0,), np.full(1000, index, np.float32))]))
print(sys.argv[4], level.steps(), flush=True)
default_coordinator().gather("done", None)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_that_are_killed_serve_what_is_left_when_they_are_started_again(tmp_path):
    """The addresses and the secret go through jax.distributed."""
    for run in ("first", "again"):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(i), str(port), str(tmp_path), run],
                env={**os.environ, "PYTHONPATH": os.getcwd(), "JAXSYS_HOST": "ab"[i], "JAX_PLATFORMS": "cpu"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for i in range(2)
        ]
        try:
            outputs = [worker.communicate(timeout=90) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        # The second, when it finds that the first is dead, may be quicker to abort than its own signal.
        assert [out for out, _ in outputs] == [f"{run} [1]\n"] * 2, outputs
        assert all(worker.returncode < 0 for worker in workers)
    assert [p.name[:10] for p in sorted((tmp_path / "a" / STEP).iterdir())] == ["data-00001", "manifest.j"]
