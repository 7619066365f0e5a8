"""Timing that can be trusted: every contestant in a process of its own, alternating rounds, medians, and a refusal
while something else uses the cores.

A process each, because in one they disturb each other: the threads of torch's OpenMP go on spinning after a step, and
two allocators' habits meet in one heap (jaxsys' bfloat16 step of the 25M model: 2,500 tokens/s alone, 1,500 with torch
in the same process).
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

ALLOWED = 0.08
"""Share of all cores that others may use before a measurement is refused."""
ANSWER = "answer "
"""How a worker's line begins that is meant for whoever asked."""


def _ticks() -> tuple[float, float]:
    """(busy, total) seconds of all cores since boot."""
    fields = [float(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / hertz, sum(fields) / hertz


class Ended(SystemExit):
    """A worker ended before its time."""


class Worker:
    """One contestant: a program that answers each line it is sent, with a measurement.

    log: gets what it says to stderr, whose last line then tells why it ended.
    """

    def __init__(self, name: str, command: Sequence[str], log: IO[str] | None = None):
        self._name, self._log = name, log
        # Workers live at once, and JAX would take most of an accelerator's memory for the first.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def ask(self, question: str = "") -> str:
        """The answer to a line. Raises Ended if none comes any more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER).strip()
        reason = f"the worker of {self._name} ended with exit code {self._process.wait()}"
        if self._log is not None:
            self._log.seek(0)
            said = [line.strip() for line in self._log if line.strip()]
            reason += f": {said[-1]}" if said else ""
        raise Ended(reason)

    def measure(self) -> float | None:
        """The next rate, or None if the worker said that it has nothing to measure with (torch is missing)."""
        rate = self.ask()
        return None if rate == "none" else float(rate)

    @property
    def cpu_seconds(self) -> float:
        path = Path(f"/proc/{self._process.pid}/stat")
        fields = path.read_text().rpartition(")")[2].split() if path.exists() else []
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def answer(reply: Callable[[str], object]) -> None:
    """The worker's side: one answer a line of input."""
    for line in sys.stdin:
        print(f"{ANSWER}{reply(line)}", flush=True)


def serve(run: Callable[[], float] | None) -> None:
    """The side of a worker that measures one rate."""
    answer(lambda _: "none" if run is None else run())


def interleaved(
    names: Sequence[str], rounds: int, others: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[float]]:
    """The rates of every contestant, one a round in turn; a round before that is not counted.

    A contestant is this script again with ``--worker NAME``, or the command that ``others`` has for its name. Exits
    with 1 if other programs used the cores meanwhile.
    """
    commands = {name: [sys.executable, *sys.argv, "--worker", name] for name in names} | dict(others or {})
    workers = {name: Worker(name, command) for name, command in commands.items()}
    for name, worker in list(workers.items()):
        if worker.measure() is None:
            workers.pop(name).close()
            print(f"{name}: not measured, torch or transformers is not installed", file=sys.stderr)
    found: dict[str, list[float]] = {name: [] for name in workers}
    with Quiet(list(workers.values())):
        for _ in range(rounds):
            for name, worker in workers.items():
                rate = worker.measure()
                assert rate is not None
                found[name].append(rate)
    for worker in workers.values():
        worker.close()
    return found


class Quiet:
    """Watches what programs other than this and its workers use: ``with Quiet(): ...`` exits with 1 if too much."""

    def __init__(self, workers: Sequence[Worker] = ()):
        self._workers = workers

    def __enter__(self) -> Quiet:
        if Path("/proc/stat").exists():
            busy, total = _ticks()
            time.sleep(1.0)
            later, end = _ticks()
            self._refuse((later - busy) / (end - total), "before the measurement")
            self._start = (*_ticks(), self._own())
        return self

    def __exit__(self, kind, *_):
        if kind is None and Path("/proc/stat").exists():
            busy, total = _ticks()
            others = busy - self._start[0] - (self._own() - self._start[2])
            self._refuse(others / (total - self._start[1]), "during the measurement")

    def _own(self) -> float:
        times = os.times()
        ours = times.user + times.system + times.children_user + times.children_system  # of children that have ended
        return ours + sum(worker.cpu_seconds for worker in self._workers)

    @staticmethod
    def _refuse(share: float, when: str) -> None:
        if share > ALLOWED:
            sys.exit(
                f"refused: other programs used {share:.0%} of the cores {when}, at most {ALLOWED:.0%} is allowed: "
                "stop them and run again"
            )


def table(found: dict[str, list[float]], peers: dict[str, str], unit: str) -> str:
    """Median, minimum and maximum of each, and the median of its ratio to its peer, round by round."""
    lines = [f"{'':34}{unit:>14}{'min':>10}{'max':>10}{'ratio to peer':>20}"]
    for name, values in found.items():
        ratio = ""
        if (peer := peers.get(name)) in found:
            ratio = f"{statistics.median(a / b for a, b in zip(values, found[peer], strict=True)):.2f}x {peer}"
        middle = statistics.median(values)
        lines.append(f"{name:34}{middle:14,.1f}{min(values):10,.1f}{max(values):10,.1f}  {ratio}")
    return "\n".join(lines)


def machine() -> str:
    """The machine in one line."""
    cpu = next(
        (l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().split("\n") if l.startswith("model name")),
        platform.processor(),
    )
    import jax

    device = jax.devices()[0]
    return f"{cpu}, {os.cpu_count()} cores, jax {jax.__version__}, {device.platform} {device.device_kind}"
