"""The processes of a job find each other, or all are told in one line what is wrong: threads stand in for them."""

import json
import socket
import threading
import time

import pytest

from parallelism import rollcall
from parallelism.errors import UserError
from parallelism.rollcall import roll_call


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rollcall, "_LINGER_SECONDS", 0.5)


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def outcomes(address, *processes, seconds=20.0):
    """Of each (number of processes, index): None, or its error."""
    found = {}

    def one(at, count, index):
        try:
            found[at] = roll_call(address, count, index, seconds)
        except UserError as error:
            found[at] = str(error)

    threads = [threading.Thread(target=one, args=(at, *process)) for at, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text in found.values():
        assert text is None or "\n" not in text
    return [found[at] for at in range(len(processes))]


def hello(address, **said):
    """A connection of a process of three that has said who it is."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)), timeout=20)
        except ConnectionRefusedError:
            continue
        connection.sendall(json.dumps({"count": 3, "host": "h", "jax": rollcall.jax.__version__, **said}).encode())
        return connection


def test_all_go_on_once_all_are_there_and_the_port_is_free_again(address):
    assert outcomes(address, *((5, i) for i in range(5))) == [None] * 5
    assert outcomes(address, (1, 0)) == [None]


def test_two_with_one_number_are_named_to_all_also_to_those_that_come_late(address):
    late = threading.Event()
    threading.Timer(0.3, late.set).start()
    found = {}

    def third():
        late.wait()
        found["late"] = outcomes(address, (3, 2))

    thread = threading.Thread(target=third)
    thread.start()
    texts = outcomes(address, (3, 0), (3, 1), (3, 1))
    thread.join()
    for text in (*texts, *found["late"]):
        assert text.startswith("processes: two say that they are process 1 of 3, on hosts ")


@pytest.mark.parametrize("others", [[(3, 2), (3, 1)], [(3, 1)]])
def test_a_process_that_was_told_of_another_number_is_named(address, others):
    for text in outcomes(address, (2, 0), *others):
        assert "was told of 3 processes, process 0 of 2: give all the same --processes" in text


def test_another_version_of_jax_is_named(address):
    results = []
    thread = threading.Thread(target=lambda: results.extend(outcomes(address, (3, 0), (3, 1))))
    thread.start()
    with hello(address, process=2, jax="0.1") as connection:
        assert "has jax " in json.loads(connection.makefile().readline())["error"]
    thread.join()
    assert all("process 2 on host h has jax 0.1" in text or "has 0.1" in text for text in results)


def test_those_that_do_not_come_are_named(address):
    text, _ = outcomes(address, (12, 0), (12, 1), seconds=1)
    assert text.startswith("processes: processes 2, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 did not come within 1 s")


def test_one_that_ends_meanwhile_is_named_at_once(address):
    results = []
    thread = threading.Thread(target=lambda: results.extend(outcomes(address, (3, 0))))
    thread.start()
    hello(address, process=2).close()
    thread.join(timeout=10)
    assert "process 2 of 3, on host h, ended while the job came together" in results[0]


def test_a_stranger_is_not_listened_to(address):
    results = []
    thread = threading.Thread(target=lambda: results.extend(outcomes(address, (2, 0))))
    thread.start()
    with hello(address, process="x"), hello(address) as other:
        other.recv(1)
        assert outcomes(address, (2, 1)) == [None]
    thread.join()
    assert results == [None]


def test_a_coordinator_that_is_not_there_or_is_something_else_is_told(address, capfd):
    (text,) = outcomes(address, (2, 1), seconds=1)
    assert text.startswith(f"process 1 of 2: no coordinator at {address} within 1 s (Connection refused)")
    assert f"process 1 of 2 waits for process 0 at {address}" in capfd.readouterr().err
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as server:

        def web():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=web).start()
        (text,) = outcomes(address, (2, 1))
    assert "or something else listens there (its answer is none of ours)" in text


def test_one_that_comes_to_a_complete_job_is_told_that_it_may_be_there_already(address):
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as server:

        def job():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)

        thread = threading.Thread(target=job)
        thread.start()
        (text,) = outcomes(address, (2, 1))
        thread.join()
    assert "the job is complete, with another process 1, or process 0 ended" in text


def test_process_0_does_not_wait_at_a_name_that_does_not_resolve():
    begun = time.monotonic()
    (text,) = outcomes("nohost.invalid:7814", (2, 0), seconds=60)
    assert "the coordinator nohost.invalid:7814, where process 0 is to listen, has a name that this machine" in text
    assert time.monotonic() - begun < 30


def test_a_port_that_is_taken_is_told_at_once(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        (text,) = outcomes(address, (2, 0))
    assert "of this machine, where process 0 of" in text and "cannot be used (Address already in use)" in text
