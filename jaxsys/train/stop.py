"""Signals that ask a run to stop; a second one from whoever wants it gone ends it.

SIGINT is a person. The others are notices that the machine is about to be taken away: SIGTERM of Kubernetes, cloud
machines and ``scancel``, and those that Slurm's ``--signal`` sends ahead of it: SIGUSR1 by custom, SIGUSR2 or SIGXCPU.
"""

from __future__ import annotations

import os
import signal
import threading
import time

ENDING = (signal.SIGINT, signal.SIGTERM)
AHEAD = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
SIGNALS = (*ENDING, *AHEAD)


def is_notice(reason: str) -> bool:
    """Whether a reason to stop, which begins with a signal's name, means that the machine is about to be gone."""
    return not reason.startswith(signal.SIGINT.name)


class Stop:
    """As a context manager: the first signal sets ``asked`` to its name and ``since`` to the time (of
    ``time.monotonic``). The second of SIGINT and SIGTERM exits at once; the others come ahead of those and never do.

    A thread reads them as they arrive: while the main thread waits for a device Python would handle them late, and two
    as one. Signals come to a program's main thread; elsewhere the context does nothing.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.since: float | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._writer)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._writer, b"\0")
        self._thread.join()
        self._thread = None
        os.close(self._reader)
        os.close(self._writer)

    def _watch(self) -> None:
        ending = False
        while number := os.read(self._reader, 1)[0]:
            if number not in SIGNALS:
                continue
            if ending and number in ENDING:
                os._exit(128 + number)
            ending = ending or number in ENDING
            if self.asked is None:
                self.since = time.monotonic()
                self.asked = signal.Signals(number).name
                again = "again" if ending else "SIGTERM twice"
                text = f"{self.asked}: finishing the step, saving, then exiting; {again} to exit at once\n"
                os.write(2, text.encode())
