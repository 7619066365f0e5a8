"""The save of a host that is about to be taken away: the fastest level that outlives the host first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from checkpoint import Level, SaveHandle
from jaxsys.train.saves import Saves
from parallelism.coordinator import Coordinator

PATIENCE_SECONDS = 60.0


def order(levels: Sequence[Level], estimate: Callable[[str], float]) -> list[str]:
    """The levels by name: those that survive the host before the others, each kind by how long a save there takes."""
    return [level.name for level in sorted(levels, key=lambda x: (not x.survives_host, estimate(x.name)))]


def _patience(left: float, others: int, estimate: float) -> float:
    """Seconds to wait for a level before ``others`` are tried: twice what it takes, or its part of those that are left.

    What that is of a level that was never measured, when no time is left, is PATIENCE_SECONDS.
    """
    known = 2 * estimate if estimate != float("inf") else 0.0 if left > 0 else PATIENCE_SECONDS
    return max(left / (others + 1), known)


def save_within(
    seconds: float,
    since: float,
    levels: Sequence[Level],
    saves: Saves,
    coordinator: Coordinator,
    save: Callable[[str], SaveHandle],
    say: Callable[[str], None],
) -> bool:
    """Saves to one level after the other while time is left; returns whether one has the step.

    seconds: of grace, from ``since`` (of ``time.monotonic``) on. save: begins a save to a level. say: is told what
    became of it, of each level that has it at once. Until one has it every next one is tried, however late it is
    (there is nothing to lose), and one that hangs leaves the others their part of the time. Processes do what process
    0 finds.
    """
    done = False
    not_done: list[str] = []
    slowest = 0.0
    names = coordinator.gather("order of the last save", order(levels, saves.estimate))[0]
    for others, name in zip(reversed(range(len(names))), names, strict=True):
        left = since + seconds - time.monotonic()
        expected = saves.estimate(name)
        if expected == float("inf"):  # never measured: not faster than those before it, and worth a try
            expected = slowest
        slowest = max(slowest, expected)
        if not coordinator.gather("time for the last save", not done or left > expected)[0]:
            not_done.append(f"{name} (no time: {max(left, 0.0):.0f} s left)")
            continue
        began = time.monotonic()
        handle = save(name)
        try:
            handle.wait(max(left, 0.0) if done else _patience(left, others, saves.estimate(name)))
        except TimeoutError:
            handle.give_up()  # the others need the memory
            not_done.append(f"{name} (not done in time)")
            continue
        except Exception:  # the manager has logged it and keeps it
            not_done.append(f"{name} (it failed)")
            continue
        done, now = True, time.monotonic()
        say(f"saved to {name} in {now - began:.1f} s, {now - since:.1f} s after the notice (allowed: {seconds:g})")
    if not_done:
        say(f"not saved to {', '.join(not_done)}")
    return done
