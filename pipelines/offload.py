"""PipeOffload (Wan et al. 2025): residuals that wait in host memory, as a pass over any table.

A stage holds many residuals only because their backwards come late. The pass spills them as a compiler spills registers
(Belady 1966): where a stage would hold more than it has slots for, the one whose backward is furthest away leaves, as
early as the link allows, and comes back as late as it may. Under schedules with chunks these are the longest-lived, so
that the peak falls faster than the share that moves grows (section 3.2 there).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

from parallelism.errors import UserError
from parallelism.text import decimal
from pipelines.buffers import allocate, span
from pipelines.schedule import NONE, Action, B, F, O, R, Table, W
from pipelines.simulate import Costs, length, simulate, windows

Key = tuple[int, int]  # microbatch, virtual stage
How = Literal["fitting", "either", "tight"]
"""Where transfers may be: only where nobody waits for them; there if it can be; as near to F and B as can be."""


@dataclasses.dataclass(frozen=True, eq=False)
class Offloaded:
    """A table with its transfers. slots, before: residuals that a stage holds at most with and without them. moved: the
    share of all residuals that goes to the host. because: what was decided and why, in a few lines."""

    table: Table
    slots: int
    before: int
    moved: float
    because: str


def offload(table: Table, costs: Costs, slots: int | None = None) -> Offloaded:
    """Transfers such that no stage holds more than ``slots`` residuals; None: the fewest for which nobody waits.

    A given number is kept to even where transfers make stages wait; ``because`` says how long.
    Raises UserError where it is too few for what a stage uses in one tick.
    """
    before = allocate(table).made.depth
    if slots is not None and slots >= before:
        because = f"nothing moves: a stage holds at most {before}, and so many may stay ({slots} slots)"
        return Offloaded(table, before, before, 0.0, because)
    if slots is not None:
        tried = (_spilled(table, costs, slots, how) for how in ("fitting", "either", "tight"))
        found = next((spilled for spilled in tried if spilled is not None), None)
        if found is None:
            enough = (n for n in range(slots + 1, before + 1) if _spilled(table, costs, n, "tight") is not None)
            raise UserError(
                f"schedule {table.name!r}: slots={slots} are too few for what a stage uses in one tick: expected at "
                f"least {next(enough, before)}"
            )
    else:
        fewer = ((n, _spilled(table, costs, n, "fitting")) for n in range(1, before))
        slots, found = next(((n, spilled) for n, spilled in fewer if spilled is not None), (before, table))
    moved = float((found.microbatch[..., O] != NONE).sum() / (found.microbatch[..., F] != NONE).sum())
    return Offloaded(found, slots, before, moved, _because(table, found, costs, slots, before, moved))


def lightest(
    table: Table, kept: Mapping[str, Costs], slots: int | None = None, within: float = 0.05
) -> tuple[str, Offloaded]:
    """``offload`` under several costs, by the name of what a layer keeps under them, the plain one first: that which
    leaves the fewest bytes on the device, of those whose step is at most ``within`` longer than the shortest.

    Cheap operations that are computed again take time, and shrink what has to move (section 3.3 there).
    """
    found = {name: offload(table, costs, slots) for name, costs in kept.items()}
    lines = {name: simulate(each.table, kept[name], "executed") for name, each in found.items()}
    shortest = min(line.makespan for line in lines.values())
    able = [name for name, line in lines.items() if line.makespan <= shortest * (1 + within)]
    best = min(able, key=lambda name: (lines[name].peak.max(), lines[name].makespan))
    compared = "; ".join(f"{name} {line.makespan:.4g} s and {decimal(line.peak.max())}" for name, line in lines.items())
    because = f"{found[best].because}\nof {compared}: {best}, the least on a device within {within:.0%} of the time"
    return best, dataclasses.replace(found[best], because=because if len(kept) > 1 else found[best].because)


def _because(table: Table, found: Table, costs: Costs, slots: int, before: int, moved: float) -> str:
    every = [costs.of(kind, n, table.split) for kind in table.kinds for n in range(table.placement.count)]
    lines = [
        f"a residual of {decimal(costs.residual)} takes {costs.move:.3g} s each way"
        + (f", on a link that {costs.shared} stages share" if costs.shared > 1 else "")
        + f"; an action takes {min(every):.3g} to {max(every):.3g} s"
    ]
    if not moved:
        why = f"nothing moves: no stage can hold fewer than {before} and not wait; keep less of a layer (remat)"
        return f"{lines[0]}\n{why}"
    plain, timeline = (simulate(each, costs, "executed") for each in (table, found))
    lines.append(
        f"{moved:.0%} of the residuals move, those furthest from their backward first: {slots} slots instead of "
        f"{before}, at most {decimal(timeline.peak.max())} on a device instead of {decimal(plain.peak.max())}, and "
        f"{decimal(timeline.host.max())} on a host"
    )
    longer = timeline.makespan / plain.makespan - 1
    lines.append(f"transfers make the step {longer:.1%} longer" if longer > 1e-9 else "nobody waits for a transfer")
    return "\n".join(lines)


def _spilled(table: Table, costs: Costs, slots: int, how: How) -> Table | None:
    """The table with transfers such that no stage holds more than ``slots``, or None."""
    plan = _Plan(table, costs, how)
    for stage in range(table.placement.stages):
        if not plan.relieve(stage, slots):
            return None
    return plan.table


class _Plan:
    """A table to which transfers are added one by one."""

    def __init__(self, table: Table, costs: Costs, how: How):
        self.table = dataclasses.replace(table, microbatch=table.microbatch.copy(), chunk=table.chunk.copy())
        self._ticks, self._costs, self._how = table.ticks_of(), costs, how
        self._windows = windows(table, costs)

    def relieve(self, stage: int, slots: int) -> bool:
        """Moves residuals of a stage until it holds no more than so many; False if that cannot be."""
        placement, last = self.table.placement, W if self.table.split else B
        lives = {
            (m, n): span(self._ticks, F, last, m, n)
            for n in placement.numbers(stage)
            for m in range(self.table.microbatches)
        }
        spans: dict[tuple[int, int, int], tuple[int, int]] = {(F, *key): life for key, life in lives.items()}
        there = set(lives)
        while (moment := _over(spans, slots)) is not None:
            # Of those that only wait then, the one whose backward is furthest away, if there is a way for it.
            waiting = [key for key in there if spans[F, *key][0] < moment < spans[F, *key][1]]
            for key in sorted(waiting, key=lambda key: (-self._ticks[B, *key], key)):
                if (way := self._way(stage, key, moment)) is not None:
                    break
            else:
                return False
            there.discard(key)
            for kind, tick in zip((O, R), way, strict=True):
                self._ticks[kind, *key] = tick
                self.table.microbatch[tick, stage, kind] = key[0]
                self.table.chunk[tick, stage, kind] = key[1] // placement.stages
            spans[F, *key], spans[R, *key] = span(self._ticks, F, O, *key), span(self._ticks, R, last, *key)
        return True

    def _way(self, stage: int, key: Key, moment: int) -> tuple[int, int] | None:
        """The ticks at which a residual may leave, so that it is gone at a moment, and come back after it."""
        made, used = self._ticks[F, *key], self._ticks[B, *key]
        leaves = self._free(stage, key, O, range(made, used))
        comes = self._free(stage, key, R, range(used, made, -1))
        for first, last in itertools.product(leaves, comes):
            ticks = {(O, *key): first, (R, *key): last}
            gone, back = span(ticks, O, R, *key)
            if first < last and gone < moment < back:
                return first, last
        return None

    def _free(self, stage: int, key: Key, kind: int, ticks: range) -> list[int]:
        """The first of some ticks at which a transfer makes nobody wait, and the first of all, as far as allowed."""
        free = [tick for tick in ticks if self.table.microbatch[tick, stage, kind] == NONE]
        action = Action(kind, key[0], key[1] // self.table.placement.stages)
        fitting = [] if self._how == "tight" else [tick for tick in free if self._fits(stage, action, tick)]
        return [*fitting[:1], *(free[:1] if self._how != "fitting" else [])]

    def _fits(self, stage: int, action: Action, tick: int) -> bool:
        """Whether all stages of the link are done with their ticks in time with one more transfer."""
        costs, first = self._costs, stage // self._costs.shared * self._costs.shared
        group = range(first, min(first + costs.shared, self.table.placement.stages))
        used = (self.table.microbatch[tick, group.start : group.stop] != NONE).sum(0)
        used[action.kind] += 1
        for each in group:
            actions = self.table.at(tick, each) + [action] * (each == stage)
            ahead = max((int(used[a.kind]) for a in actions if a.kind in (O, R)), default=0)
            if length(self.table, costs, each, actions, ahead) > self._windows[tick, each] * (1 + 1e-9):
                return False
        return True


def _over(spans: Mapping[tuple[int, int, int], tuple[int, int]], slots: int) -> int | None:
    """The first moment at which there is more than so many at once."""
    changes = sorted([(end, 1, -1) for _, end in spans.values()] + [(begin, 0, 1) for begin, _ in spans.values()])
    count = 0
    for moment, _, change in changes:
        count += change
        if count > slots:
            return moment
    return None
