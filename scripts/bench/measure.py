"""Timing that can be trusted: alternating rounds, medians, and a refusal while something else uses the cores."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ALLOWED = 0.08
"""Share of all cores that others may use before a measurement is refused."""


def _ticks() -> tuple[float, float]:
    """(busy, total) seconds of all cores since boot."""
    fields = [float(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    hertz = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / hertz, sum(fields) / hertz


class Quiet:
    """Watches what other processes use: ``with Quiet(): ...`` exits with 1 if that was too much."""

    def __enter__(self) -> Quiet:
        if Path("/proc/stat").exists():
            busy, total = _ticks()
            time.sleep(1.0)
            later, end = _ticks()
            self._refuse((later - busy) / (end - total), "before the measurement")
            self._start = (*_ticks(), _own())
        return self

    def __exit__(self, kind, *_):
        if kind is None and Path("/proc/stat").exists():
            busy, total = _ticks()
            others = busy - self._start[0] - (_own() - self._start[2])
            self._refuse(others / (total - self._start[1]), "during the measurement")

    @staticmethod
    def _refuse(share: float, when: str) -> None:
        if share > ALLOWED:
            sys.exit(
                f"refused: other programs used {share:.0%} of the cores {when}, at most {ALLOWED:.0%} is allowed: "
                "stop them and run again"
            )


def _own() -> float:
    times = os.times()
    return times.user + times.system


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each run once a round, in turn; what they return (a rate), by name. One round before that is not counted."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    with Quiet():
        for _ in range(rounds):
            for name, run in runs.items():
                found[name].append(run())
    return found


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
