"""Nobody waits for ever: every process of a job says what it does, and the job ends when one is dead or hangs.

A collective waits for all, so one process that is gone or loops stops the others without a word. Here each has a
thread that writes a report to the job's key-value store once an interval: what the main thread is doing, how long it
has been, whether a signal asked to stop. Process 0 reads them all, judges, and writes a verdict that the others
read: go on, stop all at the same step, or end and why. Whoever hangs is the one that is furthest behind: all run
through the same phases in the same order. One that launches something else than process 0 (``launches``) ends the job
too. Nothing here launches a device program or compares clocks of two hosts.

What makes sure that the thing itself cannot hang: a thread that only looks at its own clock ends a process that hears
nothing from process 0, the interpreter's watchdog ends one whose threads cannot run at all, and where JAX aborts this
process because process 0 is gone, a handler says so first.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax

from parallelism.coordinator import PeerError
from parallelism.errors import UserError
from parallelism.launches import Launches, Window
from parallelism.multihost import Processes, store

EXIT_CODE = 3
"""Of every process of a job that ended because one of them is dead, hangs, or failed."""

_PREFIX = "jaxsys/liveness/"
_FRAMES, _CHARACTERS = 12, 8000  # of stacks that are sent: a value of the store is small


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds after which a job of several processes ends.

    dead: without a sign of life of one of them. stuck: without progress in the loop. setup: without progress where
    something is done once or takes its time: tokenising, loading, compiling, finishing a save.
    Raises UserError for a limit that is not a number above 0.
    """

    dead: float = 60.0
    stuck: float = 600.0
    setup: float = 3600.0

    def __post_init__(self) -> None:
        for name, seconds in dataclasses.asdict(self).items():
            if not 0 < seconds < float("inf"):
                raise UserError(f"liveness.{name}: found {seconds}, expected a number of seconds above 0")


@dataclasses.dataclass
class Report:
    """What a process says of itself.

    phase, step: what its main thread does; step 0 outside the loop. sequence: how many phases it has begun.
    idle, limit: seconds since it last made progress, and what is allowed; stacks: of its threads, once idle is over it.
    asked: the signal that it got. passed: the last step after which it went on, once it knows of a signal.
    ended: "done", or why not; symptom: it failed in a way in which the death of another shows.
    launched: how many programs. differs: what it launched where process 0 launched something else.
    """

    beat: int = 0
    phase: str = "starting"
    step: int = 0
    sequence: int = 0
    idle: float = 0.0
    limit: float = 0.0
    stacks: str = ""
    asked: str = ""
    passed: int | None = None
    ended: str = ""
    symptom: bool = False
    launched: int = 0
    differs: str = ""

    @property
    def where(self) -> str:
        return f"{self.phase} (step {self.step})" if self.step else self.phase


@dataclasses.dataclass
class Verdict:
    """What process 0 says to all.

    where: what it does itself. asked: who got which signal, once somebody did. stop_at: the step after which all stop.
    end: why the job ends now. finished: all are done. launches: what process 0 launched, about where the one stands
    that has launched least.
    """

    beat: int = 0
    where: str = "starting"
    asked: str = ""
    stop_at: int | None = None
    end: str = ""
    finished: bool = False
    launches: Window = (1, ())


def judge(reports: Sequence[Report], silent: Sequence[float], limits: Limits) -> str:
    """Why the job must end, or "". silent: for each process the seconds since its report last changed."""
    for i, report in enumerate(reports):
        if report.ended not in ("", "done") and not report.symptom:
            return f"process {i} of {len(reports)} failed in {report.where}: {report.ended}"
    for i, report in enumerate(reports):
        if report.differs:
            return f"process {i} of {len(reports)} {report.differs}: all must launch the same programs in one order"
    for i, (report, seconds) in enumerate(zip(reports, silent, strict=True)):
        if seconds > limits.dead and report.ended != "done":
            return (
                f"process {i} of {len(reports)} is dead or stopped: no sign of life for {seconds:.0f} s (allowed: "
                f"{limits.dead:g}); it was in {report.where}"
            )
    working = {i: report for i, report in enumerate(reports) if not report.ended}
    behind = min((report.sequence for report in working.values()), default=0)
    last = {i: report for i, report in working.items() if report.sequence == behind}
    if not last or any(report.idle <= report.limit for report in last.values()):
        return ""
    some = next(iter(last.values()))
    who = f"process {', '.join(map(str, last))} of {len(reports)}" if len(last) < len(reports) else "every process"
    waiting = sorted({r.where for i, r in working.items() if i not in last})
    others = f" while others wait in {', '.join(waiting)}" if waiting else ""
    stacks = "".join(f"\nprocess {i}:\n{report.stacks}" for i, report in list(last.items())[:4])
    return f"{who} hangs in {some.where}: no progress for {some.idle:.0f} s (allowed: {some.limit:g}){others}{stacks}"


def stop_step(reports: Sequence[Report]) -> int | None:
    """The step after which all can stop, once all have said which they passed: the next that none has passed."""
    passed = [report.passed for report in reports if report.ended != "done"]
    known = [step for step in passed if step is not None]
    return max(known) + 1 if known and len(known) == len(passed) else None


class Watch:
    """The liveness of this process, as a context manager around all that a job does together.

    ``phase`` and ``tick`` say that the main thread makes progress; ``launches`` is what this process has launched, to
    be the same in all; ``stops`` says, the same in all processes, whether to stop after a step. For one process no
    thread is started: nobody waits for it.

    On leaving without an error it waits until all have left. With one, the others hear of it and end; if it may
    come of another's death, the context first waits until that is known. A process that is ended prints why on stderr
    and exits with ``EXIT_CODE``, whatever its other threads do.
    """

    def __init__(self, processes: Processes, limits: Limits):
        self.processes, self.limits = processes, limits
        self.launches = Launches()
        self.asked: str | None = None
        self._report = Report(limit=limits.setup)
        self._verdict = Verdict()
        self._interval = min(1.0, limits.dead / 20)
        self._progress = self._heard = time.monotonic()
        self._lock = threading.Lock()  # between going on after a step and being asked to stop
        self._step = 0
        self._agreed = threading.Event()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------------------------------------ the main thread's part

    def phase(self, name: str, step: int = 0, *, setup: bool = False) -> None:
        """The main thread begins something: all processes the same, in the same order."""
        report = self._report
        report.phase, report.step, report.sequence = name, step, report.sequence + 1
        report.limit = self.limits.setup if setup else self.limits.stuck
        self._progress = time.monotonic()

    def tick(self) -> None:
        """Progress inside a phase, which other processes need not make."""
        self._progress = time.monotonic()

    def ask(self, signal: str) -> None:
        """This process got a signal: all are to stop. From any thread."""
        self.asked = self.asked or signal

    def stops(self, step: int) -> bool:
        """Whether to stop after ``step`` (ascending) is done. Where a signal came it waits for all, a second or two."""
        if self.processes.count == 1:
            return self.asked is not None
        with self._lock:
            if self._report.passed is None:
                self._step = step
                return False
        self._agreed.wait()
        stop_at = self._verdict.stop_at
        assert stop_at is not None
        return step >= stop_at

    @property
    def reason(self) -> str:
        """Who got which signal: of the job."""
        return self._verdict.asked or self.asked or ""

    def __enter__(self) -> Watch:
        if self.processes.count > 1:
            self._heard = time.monotonic()
            for work in (self._talk, self._guard):
                self._threads.append(threading.Thread(target=work, name=f"liveness{work.__name__}", daemon=True))
                self._threads[-1].start()
            # In C, as the thread that aborts is one of JAX's and no handler of Python's would run.
            self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._threads:
            return
        if error is None:
            self._report.ended = "done"
            self._threads[0].join()
        else:
            text = " ".join(str(error).split())[:500]
            self._report.symptom = isinstance(error, (jax.errors.JaxRuntimeError, PeerError))
            self._report.ended = f"{type(error).__name__}: {text}".removesuffix(": ")
            if self._report.symptom:
                self._wait(self.limits.dead + 4 * self._interval)  # the verdict on the other ends this process
                self._report.symptom = False
            # Others are to hear of it before the store, or this process, is gone.
            self._wait(4 * self._interval)
        _, guard = self._threads
        self._threads = []
        guard.join()
        faulthandler.cancel_dump_traceback_later()
        ctypes.CDLL(None).signal(int(signal.SIGABRT), None)

    def _wait(self, seconds: float) -> None:
        threading.Event().wait(seconds)

    # ------------------------------------------------------------------------------------------------------- threads

    def _talk(self) -> None:
        """Reports, and reads or writes the verdict, once an interval."""
        client, me, lead = store(), self.processes.index, self.processes.index == 0
        reports = [Report() for _ in range(self.processes.count)]
        changed = [time.monotonic()] * self.processes.count
        while True:
            try:
                self._update()
                client.key_value_set(f"{_PREFIX}{me}", json.dumps(dataclasses.asdict(self._report)), True)
                if lead:
                    for key, value in client.key_value_dir_get(_PREFIX):
                        if (name := key.rpartition("/")[2]).isdecimal():
                            report = Report(**json.loads(value))
                            if report.beat != reports[int(name)].beat:
                                reports[int(name)], changed[int(name)] = report, time.monotonic()
                    now = time.monotonic()
                    verdict = self._decide(reports, [now - then for then in changed])
                    client.key_value_set(f"{_PREFIX}verdict", json.dumps(dataclasses.asdict(verdict)), True)
                else:
                    verdict = Verdict(**json.loads(client.key_value_try_get(f"{_PREFIX}verdict")))
                if verdict.beat != self._verdict.beat:
                    self._heard = time.monotonic()
                self._obey(verdict)
                if verdict.finished:
                    return
            except jax.errors.JaxRuntimeError:
                pass  # nothing there yet, or process 0 does not answer: the guard counts the seconds
            self._wait(self._interval)

    def _update(self) -> None:
        report = self._report
        report.beat += 1
        report.idle = time.monotonic() - self._progress
        report.stacks = _stacks() if report.idle > report.limit else ""
        report.asked = self.asked or ""
        report.launched = self.launches.count
        report.differs = report.differs or self.launches.difference(self._verdict.launches)

    def _decide(self, reports: Sequence[Report], silent: Sequence[float]) -> Verdict:
        """Process 0's verdict from all reports."""
        verdict = dataclasses.replace(self._verdict, beat=self._verdict.beat + 1, where=self._report.where)
        if not verdict.asked:
            asked = [(i, report.asked) for i, report in enumerate(reports) if report.asked]
            verdict.asked = f"{asked[0][1]} (process {asked[0][0]})" if asked else ""
        if verdict.stop_at is None:
            verdict.stop_at = stop_step(reports)
        verdict.launches = self.launches.window(min(report.launched for report in reports))
        verdict.end = judge(reports, silent, self.limits)
        verdict.finished = all(report.ended == "done" for report in reports)
        return verdict

    def _obey(self, verdict: Verdict) -> None:
        self._verdict = verdict
        if verdict.asked:
            with self._lock:
                if self._report.passed is None:
                    self._report.passed = self._step
        if verdict.stop_at is not None:
            self._agreed.set()
        # Whoever has failed prints its own error and exits by itself.
        if verdict.end and (not self._report.ended or self._report.symptom):
            self._end(verdict.end)

    def _guard(self) -> None:
        """Ends this process when process 0 is not heard of: the thread that asks may be waiting for it."""
        while self._threads:
            # If this thread does not come round again, something holds the interpreter: stacks and exit without it, a
            # little before the others end for want of a sign of life, and this process with them.
            faulthandler.dump_traceback_later(0.8 * self.limits.dead, exit=True)
            self._wait(self._interval)
            silent = time.monotonic() - self._heard
            if silent > self.limits.dead + 2 * self._interval and not self._verdict.finished:
                count, where = self.processes.count, self._verdict.where
                self._end(
                    f"process 0 of {count}, the coordinator, is dead or stopped: no sign of life for {silent:.0f} s "
                    f"(allowed: {self.limits.dead:g}); it was in {where}"
                )

    def _aborted(self, number: int) -> None:
        """JAX aborts at once when its connection to process 0 breaks. Any other abort takes its course."""
        host, _, port = (self.processes.coordinator or "").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port or 0)), timeout=1).close()
        except OSError:
            self._end(
                f"process 0 of {self.processes.count}, the coordinator, is gone: its port is closed; it was in "
                f"{self._verdict.where}"
            )

    def _end(self, why: str) -> None:
        first, _, stacks = why.partition("\n")
        text = f"jaxsys: process {self.processes.index} ends: {first}; the same command resumes\n"
        if stacks and self.processes.index == 0:
            text += stacks + "\n"
        os.write(2, text.encode())
        if self.processes.index == 0:
            self._wait(4 * self._interval)  # the store is in this process: others are to read the verdict first
        os._exit(EXIT_CODE)


def _stacks() -> str:
    """What every Python thread of this process but those of this module does: the innermost frames."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, str(ident))
        if not name.startswith("liveness"):
            parts.append(f"  thread {name}\n" + "".join(traceback.format_stack(frame)[-_FRAMES:]))
    parts.sort(key=lambda part: not part.startswith("  thread MainThread"))
    return "".join(parts)[:_CHARACTERS]
