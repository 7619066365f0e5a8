"""Runs a front on a port, and ends it gently."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.concurrency import run_in_threadpool

from jaxsys.serve.http import Front
from parallelism.errors import UserError


class Server(uvicorn.Server):
    """At the first SIGTERM or SIGINT no request is taken any more, /ready says 503, and what runs is finished, for
    ``drain_seconds`` at most; at the second it ends at once.

    begun: called with the address when it listens.
    """

    def __init__(self, front: Front, listening: socket.socket, drain_seconds: float, begun: Callable[[str], None]):
        super().__init__(
            uvicorn.Config(front, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        )
        self._front, self._socket, self._seconds, self._begun = front, listening, drain_seconds, begun
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn's handler of signals."""
        self._until = time.monotonic() + (self._seconds if self._until is None else 0)
        self._front.draining = True

    def drain(self) -> None:
        """What a signal does; from any thread."""
        self.handle_exit(signal.SIGTERM, None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's beginning. Raises UserError where another has begun to listen there meanwhile."""
        host, port = self._socket.getsockname()[:2]
        try:
            self._socket.listen(self.config.backlog)
        except OSError as error:
            raise _cannot_listen(host, port, error) from error
        await super().startup(sockets)
        if self.started:
            self._begun(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's clock, ten times a second; whether to end."""
        if self._until is not None and not self.should_exit:
            late = time.monotonic() > self._until
            if late:  # whoever still waits is told why nothing more comes; who does not read is left a second later
                await run_in_threadpool(self._front.close)
            self.should_exit = late or not self._front.calls
        return await super().on_tick(counter)

    def run_until_ended(self) -> None:
        """Serves until it is told to end; then nothing of the front runs any more."""
        try:
            self.run([self._socket])
        finally:
            self._front.close()
            self._socket.close()


def reserve(host: str, port: int) -> socket.socket:
    """A socket of its own on a port, which does not listen yet, so that nobody who asks has to wait; port 0 takes a
    free one. Raises UserError where that cannot be."""
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reserved.family == socket.AF_INET6:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        reserved.bind((host, port))
    except (OSError, OverflowError) as error:
        reserved.close()
        raise _cannot_listen(host, port, error) from error
    return reserved


def _cannot_listen(host: str, port: int, error: Exception) -> UserError:
    reason = str(getattr(error, "strerror", None) or error).rstrip(".")
    return UserError(f"cannot listen on host {host} port {port}: {reason}; name others with --host, --port")
