"""One process asks another for its files: what comes back, what is refused, and what becomes of who is gone."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_files import STEP, write

from checkpoint import remote
from checkpoint.manifest import CorruptError
from checkpoint.remote import RemoteStore, Server, UnreachableError, connect, listen
from checkpoint.storage import LocalStore
from parallelism.errors import UserError

SECRET = bytes(range(32))


@pytest.fixture
def serve(tmp_path):
    """A server of one directory, and a store that asks it."""
    local, listener = LocalStore(tmp_path / "served"), listen("127.0.0.1")
    server = Server(listener, local, SECRET, "b", 5.0)
    port = listener.getsockname()[1]
    client = RemoteStore(str(local.root), "b", ["127.0.0.1"], port, SECRET, 5.0)
    yield local, client, port, server
    client.close()
    server.close()


def test_a_large_file_is_written_in_pieces_and_read_back(serve):
    local, client, *_ = serve
    data = np.random.default_rng(0).integers(0, 256, 5 << 20, np.uint8)
    with client.create(STEP, "data") as file:
        for start in range(0, data.size, 1_234_567):
            assert file.write(data[start : start + 1_234_567].data) == min(1_234_567, data.size - start)
        assert file.write(b"") == 0
    assert (local.root / STEP / "data").read_bytes() == data.tobytes()
    assert client.open(STEP).read("data") == data.tobytes()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_range_is_that_of_the_file(once, data):
    content, client = once
    offset = data.draw(st.integers(0, len(content) + 10))
    buffer = bytearray(data.draw(st.integers(0, len(content))))
    if offset + len(buffer) <= len(content):
        client.open(STEP).read_into("data", offset, memoryview(buffer))
        assert buffer == content[offset : offset + len(buffer)]
    else:
        with pytest.raises(CorruptError, match=f"truncated: {len(content)} bytes, expected at least"):
            client.open(STEP).read_into("data", offset, memoryview(buffer))


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    local, listener = LocalStore(tmp_path_factory.mktemp("once")), listen("127.0.0.1")
    server = Server(listener, local, SECRET, "b", 5.0)
    content = os.urandom(100_000)
    local.put(STEP, "data", content)
    client = RemoteStore(str(local.root), "b", ["127.0.0.1"], listener.getsockname()[1], SECRET, 5.0)
    yield content, client
    client.close()
    server.close()


def test_threads_read_at_the_same_time(serve):
    local, client, *_ = serve
    content = os.urandom(1 << 16)
    local.put(STEP, "data", content)

    def read(seed):
        rng = np.random.default_rng(seed)
        for offset, n in rng.integers(0, 1 << 15, (30, 2)):
            buffer = bytearray(int(n))
            client.open(STEP).read_into("data", int(offset), memoryview(buffer))
            assert buffer == content[offset : offset + n]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_a_disk_that_is_full_there_is_an_error_here(serve, monkeypatch):
    local, client, *_ = serve
    create = local.create

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def full(directory, name):
        with create(directory, name):
            yield Full()

    def parts():
        for n in range(20):
            assert n < 10, "it is noticed while there is more to come"
            yield bytes(1 << 20)

    with monkeypatch.context() as m:
        m.setattr(local, "create", full)
        with pytest.raises(OSError, match=r"No space left on device \(on host b\)") as found:
            write(client, STEP, "data", parts())
        assert found.value.errno == errno.ENOSPC
    write(client, STEP, "other", b"abc")
    assert client.open(STEP).read("other") == b"abc"


def test_a_write_that_is_given_up_leaves_what_the_next_writer_removes(serve):
    _, client, *_ = serve
    with pytest.raises(KeyError), client.create(STEP, "data") as file:
        file.write(b"abc")
        raise KeyError
    assert client.open(STEP).read("data") == b"abc"  # what was written can be had (OpenLevel.salvage)
    write(client, STEP, "data2", b"abc")
    assert client.names() == {STEP: {"data", "data2"}}
    with pytest.raises(FileExistsError), client.create(STEP, "data"):
        pass


def test_a_connection_that_broke_is_made_anew(serve):
    local, client, _, server = serve
    local.put(STEP, "data", b"abc")
    for _ in range(2):
        assert client.open(STEP).read("data") == b"abc"
        for sock in list(server._connections):
            sock.shutdown(socket.SHUT_RDWR)


# -- those that are not of the job


def refused(port, *said):
    """Say these things to a server; all that it answers but its first 40 bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        heard = b""
        with contextlib.suppress(ConnectionError):
            for each in said:
                sock.sendall(each)
            while data := sock.recv(1 << 16):
                heard += data
    return heard[40:]


@pytest.mark.parametrize(
    "said",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100, bytes(64), os.urandom(1 << 20), b"\xff" * 64 + bytes(1 << 16)],
    ids=["http", "zeros", "random", "ones"],
)
def test_who_does_not_know_the_secret_hears_nothing_and_changes_nothing(serve, said):
    local, client, port, _ = serve
    local.put(STEP, "data", b"abc")
    assert refused(port, said) == b""
    assert client.open(STEP).read("data") == b"abc"


def test_a_client_with_another_secret_is_refused(serve):
    local, _, port, _ = serve
    local.put(STEP, "data", b"abc")
    other = RemoteStore(str(local.root), "b", ["127.0.0.1"], port, bytes(32), 5.0)
    with pytest.raises(UnreachableError, match="host b cannot be reached"):
        other.names()
    with pytest.raises(CorruptError, match="host b cannot be reached"):
        other.open(STEP).read("data")
    with pytest.raises(OSError), other.create(STEP, "more") as file:
        file.write(b"x")
    assert os.listdir(local.root / STEP) == ["data"]


def test_a_server_with_another_secret_is_told_nothing():
    """It may be what has taken the port of a process that died."""
    listener, heard = listen("127.0.0.1"), []

    def pretend():
        for _ in range(2):
            sock, _ = listener.accept()
            with sock:
                sock.sendall(remote.MAGIC + bytes(32))
                heard.append(sock.recv(1 << 16))
                with contextlib.suppress(OSError):
                    sock.sendall(bytes(32))
                    heard.append(sock.recv(1 << 16))

    thread = threading.Thread(target=pretend)
    thread.start()
    client = RemoteStore("/x", "b", ["127.0.0.1"], listener.getsockname()[1], SECRET, 5.0)
    with pytest.raises(UnreachableError, match="does not know the secret"):
        client.put(STEP, "data", b"precious")
    thread.join()
    listener.close()
    assert [len(each) for each in heard] == [64, 0, 64, 0]


def test_a_host_is_not_taken_for_another(serve):
    """Both know the secret, but what was meant for one would go to the other."""
    local, _, port, _ = serve
    with pytest.raises(UnreachableError):
        RemoteStore(str(local.root), "a", ["127.0.0.1"], port, SECRET, 5.0).put(STEP, "data", b"abc")
    assert local.names() == {}


def test_an_address_that_leads_to_another_machine_is_passed_over(serve):
    local, _, port, _ = serve
    local.put(STEP, "data", b"abc")
    client = RemoteStore(str(local.root), "b", ["127.0.0.2", "127.0.0.1"], port, SECRET, 5.0)
    assert client.open(STEP).read("data") == b"abc"
    client.close()


class Recorder:
    """A socket that keeps what is sent on it."""

    def __init__(self, sock):
        self._sock, self.sent = sock, b""

    def sendall(self, data):
        self.sent += bytes(data)
        self._sock.sendall(data)

    def __getattr__(self, name):
        return getattr(self._sock, name)


def test_what_was_overheard_is_of_no_use(serve, monkeypatch):
    local, _, port, _ = serve
    real = socket.create_connection
    with monkeypatch.context() as m:
        m.setattr(socket, "create_connection", lambda *args, **kwargs: Recorder(real(*args, **kwargs)))
        connection = connect("127.0.0.1", port, SECRET, "b", 5.0, 5.0)
    connection.send({"op": "put", "directory": STEP, "name": "data"}, b"abc")
    assert "error" not in connection.receive()
    local.delete(STEP, ["data"])
    spoken = connection._socket.sent
    # As another connection, and once more on this one.
    assert refused(port, spoken) == b""
    connection._socket.sendall(spoken[64:])
    with pytest.raises(remote.DisconnectedError):
        connection.receive()
    connection.close()
    assert local.names() == {}


def test_a_message_that_was_changed_on_the_way_ends_the_connection(serve):
    local, _, port, _ = serve
    connection = connect("127.0.0.1", port, SECRET, "b", 5.0, 5.0)
    real, connection._socket = connection._socket, Recorder(connection._socket)
    connection._socket.sendall = lambda data: real.sendall(bytes(data).replace(b"data", b"dada"))
    connection.send({"op": "put", "directory": STEP, "name": "data"}, b"abc")
    with pytest.raises(remote.DisconnectedError):
        connection.receive()
    connection.close()
    assert local.names() == {}


def test_a_message_that_is_sent_back_is_refused(serve):
    _, _, port, _ = serve
    connection = connect("127.0.0.1", port, SECRET, "b", 5.0, 5.0)
    real, (connection._socket, other) = connection._socket, socket.socketpair()
    with real, other:
        connection.send({"op": "names"})
        other.sendall(other.recv(1 << 16))
        with pytest.raises(remote.DisconnectedError, match="not signed with the key"):
            connection.receive()
    connection.close()


def test_a_header_that_says_it_is_huge_is_refused_before_it_comes(serve):
    _, _, port, _ = serve
    connection = connect("127.0.0.1", port, SECRET, "b", 2.0, 5.0)
    connection._socket.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(remote.DisconnectedError) as found:
        connection.receive()
    assert not found.value.silent  # it did not wait for the rest
    connection.close()


def test_strangers_that_say_nothing_do_not_keep_others_out(serve, monkeypatch):
    monkeypatch.setattr(remote, "STRANGERS", 5)
    local, client, port, server = serve
    local.put(STEP, "data", b"abc")
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(30)]
        assert client.open(STEP).read("data") == b"abc"
        assert len(server._strangers) <= 5
        # The first have been dropped: the greeting, then the end.
        silent[0].settimeout(10)
        assert len(silent[0].recv(100)) == 40 and silent[0].recv(100) == b""


def test_a_stranger_that_says_nothing_is_dropped_in_time(serve, monkeypatch):
    monkeypatch.setattr(remote, "HANDSHAKE_SECONDS", 0.2)
    _, _, port, server = serve
    assert refused(port, b"a") == b""
    assert not server._strangers


@pytest.mark.parametrize(
    "directory, name",
    [
        ("..", "secret"),
        (".", "secret"),
        ("", "secret"),
        ("step-00000001/../..", "secret"),
        ("step-00000001\n", "data"),
        ("step-1", "data"),
        (STEP, "../secret"),
        (STEP, "../../secret"),
        (STEP, "../step-00000001/../secret"),
        (STEP, "/etc/passwd"),
        (STEP, ".."),
        (STEP, "a/b"),
        (STEP, "a\0b"),
        (STEP, ""),
        (STEP, 7),
        (None, "data"),
    ],
)
def test_nothing_outside_of_the_directory_is_served(serve, directory, name):
    local, client, *_ = serve
    (local.root / "secret").write_text("secret")
    (local.root.parent / "secret").write_text("secret")
    write(local, STEP, "data", b"abc")
    before = sorted(local.root.parent.rglob("*"))
    place = {"directory": directory, "name": name}
    asks = [
        lambda: client.request("size", **place),
        lambda: client.request("read", offset=0, count=None, **place),
        lambda: client.request("create", **place),
        lambda: client.request("put", b"x", **place),
        lambda: client.request("patch", b"x", offset=0, **place),
        lambda: client.request("delete", json.dumps([name]).encode(), directory=directory),
    ]
    for ask in asks:
        with pytest.raises(UserError, match=r"is not (a file of a checkpoint|the directory of a step)"):
            ask()
    assert sorted(local.root.parent.rglob("*")) == before
    assert (local.root / "secret").read_text() == "secret"


def test_a_file_of_another_step_is_read_but_not_made(serve):
    local, client, *_ = serve
    write(local, STEP, "data", b"abc")
    assert client.open("step-00000002").read(f"../{STEP}/data") == b"abc"
    client.patch("step-00000002", f"../{STEP}/data", 1, b"B")
    assert client.open(STEP).read("data") == b"aBc"
    with pytest.raises(UserError, match="is not a file of a checkpoint"), client.create(STEP, "../step-00000002/data"):
        pass
    assert client.names() == {STEP: {"data"}}


@pytest.mark.parametrize("fields", [{}, {"op": "no"}, {"op": "read", "directory": STEP, "name": "data"}])
def test_a_request_that_makes_no_sense_harms_nobody(serve, fields):
    local, client, port, _ = serve
    write(local, STEP, "data", b"abc")
    connection = connect("127.0.0.1", port, SECRET, "b", 5.0, 5.0)
    connection.send(fields)
    with contextlib.suppress(remote.DisconnectedError):
        assert "error" in connection.receive()
    connection.close()
    assert client.open(STEP).read("data") == b"abc"


def test_a_host_that_does_not_answer_is_given_up_and_not_asked_again_at_once(monkeypatch):
    """A machine that hangs still takes connections."""
    tried = []
    monkeypatch.setattr(remote, "connect", lambda *args: tried.append(args) or connect(*args))
    with listen("127.0.0.1") as listener:
        client = RemoteStore("/x", "b", ["127.0.0.1"], listener.getsockname()[1], SECRET, 0.3)
        for _ in range(3):
            with pytest.raises(UnreachableError, match="no answer in time"):
                client.names()
        assert len(tried) == 1
        monkeypatch.setattr(remote.time, "monotonic", lambda now=time.monotonic: now() + 1)
        with pytest.raises(UnreachableError, match="no answer in time"):
            client.names()
        assert len(tried) == 2


def test_a_server_that_dies_while_it_is_written_to_is_an_error(serve):
    _, client, _, server = serve
    with pytest.raises(UnreachableError), client.create(STEP, "data") as file:
        file.write(b"x")
        server.close()
        for _ in range(100):
            file.write(bytes(1 << 16))
