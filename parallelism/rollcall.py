"""Who is there: the processes of a job find each other before JAX connects them.

Where a process is missing, there twice, or told of another job, JAX waits for minutes, then aborts with a stack of C++.
So each process first says who it is, over a plain connection to process 0 on the port that JAX uses afterwards; process
0 waits for all, and tells all the same: go on, or in one line what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from typing import Any

import jax

from parallelism.errors import UserError

_SAY_SECONDS = 15.0
"""Of waiting in silence, after which a process says for whom."""

_LINGER_SECONDS = 10.0
"""How long process 0 goes on telling those that come late why the job ends."""

_MOST_BYTES = 4096


def roll_call(coordinator: str, count: int, index: int, seconds: float) -> None:
    """Returns once all ``count`` processes are there; blocks for ``seconds`` at most.

    coordinator: ``host:port``, where process 0 can be reached; ``JAX_COORDINATOR_BIND_ADDRESS`` is where it listens, if
    that is not the same.
    Raises UserError, the same in all processes that can be told: the port is taken, a process does not come, ends, has
    the number of another, was told of another number of processes, or has another version of JAX.
    """
    hello = {"process": index, "count": count, "host": socket.gethostname(), "jax": jax.__version__}
    lead = None
    if index == 0:
        _resolve(coordinator)
        lead = threading.Thread(target=_Lead(count, _listen(coordinator), seconds).run, name="roll call", daemon=True)
        lead.start()
    error = _answer(coordinator, f"process {index} of {count}", hello, seconds)
    if lead is not None:
        lead.join()  # JAX is to find the port free, and those that come late an answer
    if error:
        raise UserError(error)


def _resolve(coordinator: str) -> None:
    """Raises UserError where process 0 cannot tell its own address: the others may know the name later, it must now."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"processes: the coordinator {coordinator}, where process 0 is to listen, has a name that this machine "
            f"does not know ({error.strerror or error}): give a name or an address of this machine"
        ) from error


def _listen(coordinator: str) -> socket.socket:
    """The socket of process 0. The coordinator's own server would share a port with another job's without a word."""
    host, _, port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f":{coordinator.rpartition(':')[2]}").rpartition(":")
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("" if host in ("", "[::]", "0.0.0.0") else host.strip("[]"), int(port)),
            family=socket.AF_INET6 if both else socket.AF_INET, backlog=1024, dualstack_ipv6=both,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"processes: port {port} of this machine, where process 0 of {coordinator} is to listen, cannot be used "
            f"({os.strerror(error.errno or 0)}): it is another job's, or there are two processes 0; give another with "
            "--coordinator or JAX_COORDINATOR_PORT"
        ) from error


def _answer(coordinator: str, who: str, hello: dict[str, Any], seconds: float) -> str:
    """What process 0 says to this one: why the job ends, or ""."""
    host, _, port = coordinator.rpartition(":")
    begun, said = time.monotonic(), False
    while True:
        left = max(begun + seconds - time.monotonic(), 0.1)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5.0)) as connection:
                connection.settimeout(left + _LINGER_SECONDS)
                connection.sendall(json.dumps(hello).encode() + b"\n")
                if reply := connection.makefile("rb").readline(_MOST_BYTES):
                    return json.loads(reply)["error"]
            why, final = "it closed the connection", True
        except (ValueError, TypeError, KeyError):
            why, final = "its answer is none of ours", True
        except OSError as error:  # most likely not there yet
            why, final = error.strerror or str(error), isinstance(error, ConnectionResetError)
        if final:
            raise UserError(
                f"{who}: at {coordinator} nobody waits for processes any more: the job is complete, with another "
                f"{who.partition(' of ')[0]}, or process 0 ended, or something else listens there ({why}): see what "
                "process 0 said, or give another --process or port"
            )
        if time.monotonic() > begun + seconds:
            raise UserError(
                f"{who}: no coordinator at {coordinator} within {seconds:.0f} s ({why}): check that process 0 was "
                "started, and that its host and port can be reached from here"
            )
        if not said and time.monotonic() > begun + min(_SAY_SECONDS, seconds / 2):
            said = True
            _say(f"{who} waits for process 0 at {coordinator} ({why})")
        threading.Event().wait(0.2)


class _Lead:
    """Process 0's part: hears all, itself too, and tells all the same."""

    def __init__(self, count: int, listener: socket.socket, seconds: float):
        self._count, self._listener, self._seconds = count, listener, seconds
        self._there: dict[int, dict[str, Any]] = {}
        self._most = count  # that any was told of: they are to hear why the job ends
        self._error = ""

    def run(self) -> None:
        begun, said = time.monotonic(), False
        deadline = begun + self._seconds
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while self._missing() and time.monotonic() < deadline:
                had = self._error
                for key, _ in selector.select(0.2):
                    if key.fileobj is self._listener:
                        connection, _address = self._listener.accept()
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ, {})
                    else:
                        self._hear(selector, key)
                if self._error:
                    self._tell(selector)
                    deadline = deadline if had else time.monotonic() + _LINGER_SECONDS
                elif not said and time.monotonic() > begun + min(_SAY_SECONDS, self._seconds / 2):
                    said = True
                    _say(f"process 0 of {self._count} waits for {self._named()}")
            if self._missing() and not self._error:
                self._error = (
                    f"processes: {self._named()} of {self._count} did not come within {self._seconds:.0f} s: check "
                    "that all were started with this coordinator, and what they said"
                )
            self._tell(selector)

    def _hear(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        """Bytes, or the end, of one connection."""
        connection, hello = key.fileobj, key.data
        assert isinstance(connection, socket.socket)
        try:
            data = connection.recv(_MOST_BYTES)
            if data and not hello:
                hello |= json.loads(data)
                self._check(hello)
                return
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):  # nobody of ours, unless it said hello
            data = b""
        if not data:
            selector.unregister(connection)
            connection.close()
            if hello.get("process") in self._there:
                self._error = self._error or (
                    f"processes: process {hello['process']} of {self._count}, on host {hello['host']}, ended while the "
                    "job came together: see what it said"
                )

    def _check(self, hello: dict[str, Any]) -> None:
        index, host, lead = int(hello["process"]), str(hello["host"]), next(iter(self._there.values()), hello)
        if hello["count"] != self._count:
            self._most = max(self._most, int(hello["count"]))
            self._error = self._error or (
                f"processes: process {index} on host {host} was told of {hello['count']} processes, process 0 of "
                f"{self._count}: give all the same --processes"
            )
        elif index in self._there:
            self._error = self._error or (
                f"processes: two say that they are process {index} of {self._count}, on hosts "
                f"{self._there[index]['host']} and {host}: give each a --process of its own"
            )
        elif hello["jax"] != lead["jax"]:
            self._error = self._error or (
                f"processes: process {index} on host {host} has jax {hello['jax']}, process {lead['process']} has "
                f"{lead['jax']}: expected the same"
            )
        self._there[index] = hello

    def _tell(self, selector: selectors.BaseSelector) -> None:
        """The outcome, to all that have said hello."""
        for key in list(selector.get_map().values()):
            if key.data:
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                selector.unregister(connection)
                with connection, contextlib.suppress(OSError):  # it may have gone
                    connection.sendall(json.dumps({"error": self._error}).encode() + b"\n")

    def _missing(self) -> list[int]:
        return [i for i in range(self._most) if i not in self._there]

    def _named(self) -> str:
        missing = self._missing()
        shown = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return f"process{'es' if len(missing) > 1 else ''} {shown}"


def _say(text: str) -> None:
    os.write(2, f"jaxsys: {text}\n".encode())
