"""Requests of the service, seen from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from jaxsys.serve.answers import State
from jaxsys.serve.request import Request
from jaxsys.serve.service import Closed, Service


class Watch:
    """Some requests, from when they are queued until they are finished or nobody wants them any more.

    However slow the reader, it holds no more than how far each request is. each: wake up at each piece, not only at
    the end of a request.
    """

    def __init__(self, service: Service, requests: Sequence[Request], each: bool):
        self._service, self._requests, self._each = service, requests, each
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        # Its keys never change, so that two threads may use it at once.
        self._states = {request: State() for request in requests}

    def submit(self) -> None:
        """Queues the requests. Raises Busy where too many wait, Closed where none is taken any more."""
        self._service.submit(self._requests, self._progress)

    def cancel(self) -> None:
        """Drops what is not finished."""
        for request in self._requests:
            if request.finish_reason is None:
                self._service.cancel(request)

    async def states(self) -> AsyncIterator[list[State]]:
        """How far each request is, whenever that changed; the last time all are finished.

        Raises Closed if a request was cancelled from within: the service ends, or the engine failed.
        """
        done = False
        while not done:
            await self._changed.wait()
            self._changed.clear()
            states = [self._states[request] for request in self._requests]
            if any(state.finish_reason == "cancelled" for state in states):
                raise Closed(self._service.reason)
            done = all(state.finish_reason is not None for state in states)
            yield states

    async def finished(self) -> None:
        """Returns when all requests are finished; raises as ``states`` does."""
        async for _ in self.states():
            pass

    def _progress(self, request: Request) -> None:
        """On the engine's thread."""
        sure = len(request.text.sure) if request.text is not None else 0
        state = State(request.made, sure, request.finish_reason)
        if state == self._states[request]:
            return
        self._states[request] = state
        if self._each or request.finish_reason is not None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it who would have heard
                self._loop.call_soon_threadsafe(self._changed.set)
