"""What the server refuses, how it ends, and what it does when others fail: nothing is left behind."""

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from http_server import SECONDS, Gate, running

from jaxsys.serve import http as front_module
from jaxsys.serve.access import read_keys
from jaxsys.serve.server import Server, reserve
from parallelism.errors import UserError

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}
LONG = {**BODY, "max_tokens": 100, "ignore_eos": True}


def post(server, body=BODY, **options):
    return httpx.post(f"{server.address}/v1/completions", json=body, timeout=SECONDS, **options)


def in_thread(call):
    """The call's result, in a list that is filled when the thread, which is the other, ends."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return results, thread


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Reader:
    """A stream that is read line by line."""

    def __init__(self, server, body=LONG):
        self._stack = contextlib.ExitStack()
        http = self._stack.enter_context(httpx.Client(base_url=server.address, timeout=SECONDS))
        self.answer = self._stack.enter_context(http.stream("POST", "/v1/completions", json={**body, "stream": True}))
        self._lines = (line for line in self.answer.iter_lines() if line)

    def next(self):
        line = next(self._lines).removeprefix("data: ")
        return line if line == "[DONE]" else json.loads(line)

    def rest(self):
        """What is still to come, as far as it does."""
        found = []
        with contextlib.suppress(httpx.TransportError, StopIteration):
            while True:
                found.append(self.next())
        return found

    def close(self):
        self._stack.close()


def test_without_a_valid_key_nothing_is_answered(llm):
    with running(llm, keys=["first", "sécond"]) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize")):
                answer = httpx.request(method, server.address + path, headers=headers, json=BODY)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert httpx.get(server.address + path).status_code == 200
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="first") as client:
            assert client.completions.create(**BODY).choices[0].text
        assert post(server, headers={"Authorization": "Bearer sécond".encode()}).status_code == 200
        wrong = openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_who_is_served_fairly_is_the_user_or_else_the_key(llm, monkeypatch):
    with running(llm, keys=["first", "second"]) as server:
        seen, submit = [], server.front.service.submit
        monkeypatch.setattr(server.front.service, "submit", lambda r, p: (seen.append(r[0].client), submit(r, p)))
        for key, body in (("first", BODY), ("second", BODY), ("second", {**BODY, "user": "somebody"})):
            assert post(server, body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert seen == ["key 0/", "key 1/", "key 1/somebody"]


def test_a_body_too_large_is_refused(llm):
    with running(llm, max_body=1000) as server:
        large = {**BODY, "user": "x" * 1000}
        answer = post(server, large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        chunks = (b"x" * 100 for _ in range(20))  # of a length that is not said before
        assert httpx.post(f"{server.address}/v1/completions", content=chunks).status_code == 413
        assert post(server).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(llm, monkeypatch):
    monkeypatch.setattr(front_module, "BODY_SECONDS", 0.2)
    with running(llm) as server, socket.create_connection(server.server._socket.getsockname()) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in line.recv(100)


def test_who_leaves_in_the_middle_of_a_body_is_forgotten(llm):
    with running(llm) as server:
        with socket.create_connection(server.server._socket.getsockname()) as line:
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            until(lambda: server.front.calls == 1)
        until(lambda: server.front.calls == 0)
        assert 'path="/v1/completions",status="499"' in httpx.get(f"{server.address}/metrics").text


def test_too_many_requests_are_told_when_to_come_again(llm, monkeypatch):
    gate = Gate(llm.engine, monkeypatch)
    with running(llm, max_queue=3) as server:
        first, one = in_thread(lambda: post(server))
        assert gate.reached.wait(SECONDS)
        second, two = in_thread(lambda: post(server, {**BODY, "n": 2}))
        until(lambda: server.front.service.queued == 3)  # the first was not let in yet either
        answer = post(server)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="x", max_retries=0)
        with client, pytest.raises(openai.RateLimitError, match="3 requests wait already"):
            client.completions.create(**BODY)
        gate.open.set()
        for thread in (one, two):
            thread.join(SECONDS)
        assert (first[0].status_code, second[0].status_code) == (200, 200)
        answer = post(server, {**BODY, "n": 4})  # would never fit
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


def test_an_engine_that_fails_is_told_to_all(llm, monkeypatch):
    with running(llm) as server:
        gate = Gate(llm.engine, monkeypatch)
        reader = Reader(server)
        results, thread = in_thread(lambda: post(server, LONG))
        assert gate.reached.wait(SECONDS)
        until(lambda: server.front.service.active == 2)

        def fails(max_steps=None):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(llm.engine, "launch", fails)
        gate.open.set()
        thread.join(SECONDS)
        assert results[0].status_code == 503
        assert results[0].json()["error"]["message"] == "the engine failed: the device is gone"
        *_, last = reader.rest()
        assert last["error"]["type"] == "server_error"
        reader.close()
        for path in ("/health", "/ready"):
            assert httpx.get(server.address + path).status_code == 503
        assert post(server).status_code == 503


def test_a_defect_is_an_error_of_the_same_shape(llm, monkeypatch):
    with running(llm) as server:
        monkeypatch.setattr(server.front, "_prepare", lambda *_: 1 / 0)
        answer = post(server)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "division" not in answer.text
        until(lambda: server.defects)
        assert "division by zero" in str(server.defects.pop().exc_info[1])


def signalled(server, monkeypatch):
    """A reader of a stream that has begun, and the gate that holds the engine back; then a signal comes."""
    gate = Gate(server.front.llm.engine, monkeypatch, after=2)
    reader = Reader(server)
    reader.next()
    assert gate.reached.wait(SECONDS)
    server.server.handle_exit(15, None)
    return reader, gate


def test_the_first_signal_lets_what_runs_finish(llm, monkeypatch):
    with running(llm) as server:
        reader, gate = signalled(server, monkeypatch)
        ready = httpx.get(f"{server.address}/ready")
        assert (ready.status_code, ready.json()["error"]["message"]) == (503, "the server is shutting down")
        assert httpx.get(f"{server.address}/health").status_code == 200
        refused = post(server)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        gate.open.set()
        *_, last, done = reader.rest()
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
        server.wait()
        reader.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.address}/health")


def test_the_second_signal_ends_at_once(llm, monkeypatch):
    with running(llm) as server:
        reader, gate = signalled(server, monkeypatch)
        server.server.handle_exit(15, None)
        threading.Timer(0.2, gate.open.set).start()
        server.wait()
        assert "[DONE]" not in reader.rest()
        reader.close()


def test_who_is_not_finished_in_time_is_told(llm, monkeypatch):
    with running(llm, drain_seconds=0.3) as server:
        gate = Gate(llm.engine, monkeypatch, after=2)
        reader = Reader(server)
        reader.next()
        assert gate.reached.wait(SECONDS)
        server.server.handle_exit(15, None)
        threading.Timer(0.5, gate.open.set).start()
        *_, last = reader.rest()
        assert last["error"]["message"] == "the server is shutting down"
        server.wait()
        reader.close()


@contextlib.contextmanager
def who_does_not_read(server):
    """Asks for much, and reads nothing of it."""
    body = json.dumps({**LONG, "n": 8, "stream": True, "logprobs": 20, "prompt": ["x" * 20] * 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    server.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it too
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(server.server._socket.getsockname())
        line.sendall(head + body)
        until(lambda: server.front.service.active > 0)
        yield


def test_who_does_not_read_holds_nobody_up(llm):
    with running(llm) as server:
        with who_does_not_read(server):
            assert post(server).status_code == 200
            until(lambda: not server.front.service.active)  # its requests end, though nobody reads
            assert server.front.calls == 1
        server.idle()


def test_who_does_not_read_does_not_keep_the_server_from_ending(llm):
    with running(llm, drain_seconds=0.1) as server, who_does_not_read(server):
        server.server.handle_exit(15, None)
        server.wait()
        assert server.front.calls == 0


def test_a_file_of_keys_may_have_remarks_and_empty_lines(tmp_path):
    (tmp_path / "keys").write_text("# of the team\none\n\n  two  \n #three\n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]


def test_until_it_serves_connections_are_refused_and_not_left_waiting():
    with reserve("127.0.0.1", 0) as reserved, pytest.raises(ConnectionRefusedError):
        socket.create_connection(reserved.getsockname(), timeout=9)


def test_a_port_that_another_took_meanwhile_is_said_in_a_line():
    with reserve("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with reserve("127.0.0.1", port) as other:
            other.listen()
            front = SimpleNamespace(close=lambda: None)
            with pytest.raises(UserError, match=f"cannot listen on host 127.0.0.1 port {port}: Address already in use"):
                Server(front, reserved, 1.0, print).run_until_ended()
