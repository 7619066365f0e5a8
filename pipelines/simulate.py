"""What a table costs: a timeline, the bubble, what each stage holds on the device and on the host.

Two ways to run it. ``ideal``: a stage does its actions in order, each as soon as what it needs has come, whatever ticks
say; what goes to the host and back does so beside that, one thing at a time each way. ``executed``: as the executor
does, tick by tick: at the end of a tick stages exchange what they send, so each waits for those that it exchanges with,
and what goes to the host or comes back within a tick has to be there at its end.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from pipelines.buffers import allocate
from pipelines.schedule import Action, B, F, O, R, Table, W, needs

COMPUTED = (F, B, W)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) of F, B (for the input) and W of one microbatch at one virtual stage: one number, or one a
    virtual stage. transfer: of what one stage sends another. Bytes that one microbatch keeps at a virtual stage:
    residual, from F to the end of its backward pass; cotangent, from B to W where it is apart.

    link: bytes/s to the host, and as many back; ``shared`` neighbours have one link together. pieces: how many go one
    after the other (a layer each): of what is made or used in the same tick, the last piece cannot go before it is
    made, nor the first be used before it has come."""

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 1.0
    weight: float | Sequence[float] = 1.0
    transfer: float = 0.0
    residual: float = 1.0
    cotangent: float = 0.0
    link: float = math.inf
    shared: int = 1
    pieces: int = 1

    @property
    def move(self) -> float:
        """Seconds to the host, or back, of what one microbatch keeps at a virtual stage."""
        return self.residual / self.link

    def of(self, kind: int, number: int, split: bool) -> float:
        """Of an action at a virtual stage. A B that is not split does W's work too."""

        def one(value: float | Sequence[float]) -> float:
            return float(value) if isinstance(value, (int, float)) else float(value[number])

        if kind == B and not split:
            return one(self.backward) + one(self.weight)
        return one((self.forward, self.backward, self.weight)[kind])


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """When a table's actions run.

    start, end: by (kind, microbatch, virtual stage). makespan: until the last F, B or W ends. busy: [stages], time at
    work. peak: [stages], the most bytes a stage holds of what waits on the device; host: [stages], in host memory;
    live: [stages], the most microbatches (of a chunk) whose residuals it holds on the device. links: [stages, 2], the
    share of the makespan in which a stage sends to the host, and brings back.
    """

    table: Table
    costs: Costs
    start: dict[tuple[int, int, int], float]
    end: dict[tuple[int, int, int], float]
    makespan: float
    busy: np.ndarray
    peak: np.ndarray
    host: np.ndarray
    live: np.ndarray
    links: np.ndarray

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they wait."""
        return 1.0 - float(self.busy.sum()) / (self.makespan * len(self.busy))


def simulate(table: Table, costs: Costs | None = None, how: Literal["ideal", "executed"] = "ideal") -> Timeline:
    """The timeline of a checked table."""
    costs = costs or Costs()
    start, end = (_ideal if how == "ideal" else _executed)(table, costs)
    placement = table.placement
    makespan = max(time for (kind, *_), time in end.items() if kind in COMPUTED)
    busy, links = np.zeros(placement.stages), np.zeros((placement.stages, 2))
    for kind, _, number in end:
        if kind in COMPUTED:
            busy[placement.stage(number)] += costs.of(kind, number, table.split)
        else:
            links[placement.stage(number), kind == R] += costs.move / makespan
    return Timeline(table, costs, start, end, makespan, busy, *_held(table, costs, start, end), links)


def _ideal(table: Table, costs: Costs) -> tuple[dict, dict]:
    placement = table.placement
    start: dict[tuple[int, int, int], float] = {}
    end: dict[tuple[int, int, int], float] = {}
    free = [0.0] * placement.stages
    links: dict[tuple[int, int], float] = {}
    for _, stage, action in table.walk():  # ticks are an order in which what is needed comes first
        key = action.kind, action.microbatch, placement.number(stage, action.chunk)
        there = [
            end[need] + (costs.transfer if placement.stage(need[2]) != stage else 0.0) for need in needs(key, placement)
        ]
        if key[0] not in COMPUTED:
            link = key[0], stage // costs.shared
            start[key] = max([links.get(link, 0.0), *there, *[free[stage]] * (key[0] == R)])
            end[key] = links[link] = start[key] + costs.move
            continue
        if key[0] == B and (back := end.get((R, *key[1:]))) is not None:
            there.append(back)
        start[key] = max([free[stage], *there])
        end[key] = free[stage] = start[key] + costs.of(key[0], key[2], table.split)
    return start, end


def _executed(table: Table, costs: Costs) -> tuple[dict, dict]:
    start: dict[tuple[int, int, int], float] = {}
    end: dict[tuple[int, int, int], float] = {}
    for tick, begin, then in _ticks(table, costs):
        for stage in range(table.placement.stages):
            now = begin[stage]
            for action in table.at(tick, stage):
                key = action.kind, action.microbatch, table.placement.number(stage, action.chunk)
                if key[0] in COMPUTED:
                    start[key], now = now, now + costs.of(key[0], key[2], table.split)
                    end[key] = now
                else:  # its slots are taken all through the tick
                    start[key], end[key] = begin[stage], then[stage]
    return start, end


def windows(table: Table, costs: Costs) -> np.ndarray:
    """Seconds that a stage may take for each tick so that nobody waits longer than anyway, [ticks, stages]."""
    shifts = _shifts(table)
    found = []
    for _, now, then in _ticks(table, costs):
        waiting = [np.roll(then, by) - costs.transfer for shift in shifts for by in (shift, -shift)]
        found.append(np.min([then, *waiting], axis=0) - now)
    return np.array(found)


def _shifts(table: Table) -> list[int]:
    """By how many stages what is sent moves on, at the end of every tick."""
    buffers = allocate(table)
    return sorted({channel.shift for channel in (*buffers.forward, *buffers.backward)} - {0})


def _ticks(table: Table, costs: Costs) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(tick, when each stage begins it, when each has ended it)."""
    placement, shifts = table.placement, _shifts(table)
    now = np.zeros(placement.stages)
    for tick in range(table.ticks):
        ends = now.copy()
        links: Counter[tuple[int, int]] = Counter()
        for stage in range(placement.stages):
            actions = table.at(tick, stage)
            for kind in (O, R):
                links[kind, stage // costs.shared] += sum(a.kind == kind for a in actions)
            ahead = max((links[a.kind, stage // costs.shared] for a in actions if a.kind in (O, R)), default=0)
            ends[stage] += length(table, costs, stage, actions, ahead)
        others = [np.roll(ends, by) + costs.transfer for shift in shifts for by in (shift, -shift)]
        then = np.max([ends, *others], axis=0)
        yield tick, now.copy(), then
        now = then


def length(table: Table, costs: Costs, stage: int, actions: Sequence[Action], ahead: int = 0) -> float:
    """Seconds that a stage's actions of one tick take. ahead: transfers that its link does until its own are done.

    Transfers run beside the first F, B or W, one after the other: both ways they go through the same memory.
    """
    computed = [a for a in actions if a.kind in COMPUTED]
    moved = [a for a in actions if a.kind not in COMPUTED]
    works = [costs.of(a.kind, table.placement.number(stage, a.chunk), table.split) for a in computed]
    move = costs.move * max(len(moved), ahead) if moved else 0.0
    if not works:
        return move
    first, *others = works
    # What the first makes goes a piece later than it is made, what it uses comes a piece before.
    own = any(computed[0] == (F if a.kind == O else B, *a[1:]) for a in moved)
    together = max(first + move / costs.pieces, move + first / costs.pieces) if own else max(first, move)
    return together + sum(others)


def _held(table: Table, costs: Costs, start: dict, end: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    placement = table.placement
    last = W if table.split else B
    peak, host, live = (np.zeros(placement.stages, kind) for kind in (float, float, int))
    for stage in range(placement.stages):
        mine = [(m, n) for n in placement.numbers(stage) for m in range(table.microbatches)]
        away = [key for key in mine if (O, *key) in end]
        kept = [(start[F, *key], end[O if (O, *key) in end else last, *key]) for key in mine]
        kept += [(start[R, *key], end[last, *key]) for key in away]
        between = [(start[B, *key], end[W, *key]) for key in mine if table.split]
        live[stage] = _most([(*one, 1) for one in kept])
        peak[stage] = _most([*((*one, costs.residual) for one in kept), *((*one, costs.cotangent) for one in between)])
        host[stage] = _most([(start[O, *key], end[R, *key], costs.residual) for key in away])
    return peak, host, live


def _most(spans: list[tuple[float, float, float]]) -> float:
    """The most that is there at once of (begin, end, how much). One that ends makes room for one that begins then, to a
    trillionth of all the time: sums of the same costs in another order differ by rounding."""
    moment = 1e-12 * max((end for _, end, _ in spans), default=1.0)
    changes = sorted(
        [(round(end / moment), 0, -size) for _, end, size in spans]
        + [(round(begin / moment), 1, size) for begin, _, size in spans]
    )
    return max(itertools.accumulate(size for *_, size in changes), default=0.0)
