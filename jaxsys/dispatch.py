"""The one thread that launches.

Two threads that launch multi-device programs can interleave their collectives differently on different
devices: the sums come out wrong, silently, or the process dies. So every compiled graph of a process is
launched by one thread, in one order; other threads hand it work and wait. Server, snapshot and evaluation
threads touch host memory and device-to-host copies only.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from parallelism.launches import Launches

Result = TypeVar("Result")


class Dispatcher:
    """A first-in first-out queue of launches, worked off by one daemon thread.

    With several processes each must submit the same work in the same order; a training loop that is a
    function of its configuration does. launches: what was launched, for ``parallelism.liveness`` to compare.
    """

    def __init__(self) -> None:
        self.launches = Launches()
        self._closed = False
        self._lock = threading.Lock()  # between a submission and the end of the queue
        self._queue: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="jaxsys-dispatch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, work: Callable[..., Result], *args: Any) -> Future[Result]:
        """Queues ``work(*args)`` for the launching thread. Raises RuntimeError after ``close``."""
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the dispatcher is closed: nothing can be launched any more")
            self._queue.put((future, work, args))
        return future

    def call(self, work: Callable[..., Result], *args: Any) -> Result:
        """Runs ``work(*args)`` on the launching thread and returns its result; inline when already there.

        What must not be separated, such as taking a lease and launching with it, goes in one call.
        """
        if self.current():
            return work(*args)
        return self.submit(work, *args).result()

    def launch(self, name: str, program: Callable[..., Result], *args: Any) -> Result:
        """Runs a program on the launching thread and returns its result, as ``call`` does. name: for ``launches``."""
        return self.call(self._launch, name, program, *args)

    def _launch(self, name: str, program: Callable[..., Result], *args: Any) -> Result:
        self.launches.add(name)
        return program(*args)

    def current(self) -> bool:
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Finishes what is queued and ends the thread. Nothing can be submitted afterwards."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if not self.current():
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work, args = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*args))
                except BaseException as error:
                    future.set_exception(error)
            # Arguments die here and not at the next item: a kept reference would keep device memory.
            del item, future, work, args


_lock = threading.Lock()
_dispatcher: Dispatcher | None = None


def dispatcher() -> Dispatcher:
    """The process's only dispatcher."""
    global _dispatcher
    with _lock:
        if _dispatcher is None:
            _dispatcher = Dispatcher()
        return _dispatcher
