"""What a table costs: a timeline, the bubble, what each stage holds.

Two ways to run it. ``ideal``: a stage does its actions in order, each as soon as what it needs has come, whatever ticks
say. ``executed``: as the executor does, tick by tick: at the end of a tick stages exchange what they send, so each
waits for those that it exchanges with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipelines.buffers import allocate
from pipelines.schedule import B, F, Table, W, needs


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) of F, B (for the input) and W of one microbatch at one virtual stage: one number, or one a
    virtual stage. transfer: of what one stage sends another. Bytes that one microbatch keeps at a virtual stage:
    residual, from F to the end of its backward pass; cotangent, from B to W where it is apart."""

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 1.0
    weight: float | Sequence[float] = 1.0
    transfer: float = 0.0
    residual: float = 1.0
    cotangent: float = 0.0

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

    start, end: by (kind, microbatch, virtual stage). makespan: until the last ends. busy: [stages], time at work.
    peak: [stages], the most bytes a stage holds of what waits; live: [stages], the most microbatches (of a chunk)
    whose residuals it holds.
    """

    table: Table
    costs: Costs
    start: dict[tuple[int, int, int], float]
    end: dict[tuple[int, int, int], float]
    makespan: float
    busy: np.ndarray
    peak: np.ndarray
    live: np.ndarray

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they wait."""
        return 1.0 - float(self.busy.sum()) / (self.makespan * len(self.busy))


def simulate(table: Table, costs: Costs | None = None, how: Literal["ideal", "executed"] = "ideal") -> Timeline:
    """The timeline of a checked table."""
    costs = costs or Costs()
    start, end = (_ideal if how == "ideal" else _executed)(table, costs)
    placement = table.placement
    busy = np.zeros(placement.stages)
    for kind, _, number in end:
        busy[placement.stage(number)] += costs.of(kind, number, table.split)
    peak, live = _held(table, costs, start, end)
    return Timeline(table, costs, start, end, max(end.values()), busy, peak, live)


def _ideal(table: Table, costs: Costs) -> tuple[dict, dict]:
    placement = table.placement
    start: dict[tuple[int, int, int], float] = {}
    end: dict[tuple[int, int, int], float] = {}
    free = [0.0] * placement.stages
    for _, stage, action in table.walk():  # ticks are an order in which what is needed comes first
        key = action.kind, action.microbatch, placement.number(stage, action.chunk)
        there = [
            end[need] + (costs.transfer if placement.stage(need[2]) != stage else 0.0) for need in needs(key, placement)
        ]
        start[key] = max([free[stage], *there])
        end[key] = free[stage] = start[key] + costs.of(key[0], key[2], table.split)
    return start, end


def _executed(table: Table, costs: Costs) -> tuple[dict, dict]:
    placement, buffers = table.placement, allocate(table)
    start: dict[tuple[int, int, int], float] = {}
    end: dict[tuple[int, int, int], float] = {}
    shifts = sorted({channel.shift for channel in (*buffers.forward, *buffers.backward)} - {0})
    now = np.zeros(placement.stages)
    for tick in range(table.ticks):
        for stage in range(placement.stages):
            for action in table.at(tick, stage):
                key = action.kind, action.microbatch, placement.number(stage, action.chunk)
                start[key] = now[stage]
                now[stage] += costs.of(key[0], key[2], table.split)
                end[key] = now[stage]
        others = [np.roll(now, by) + costs.transfer for shift in shifts for by in (shift, -shift)]
        now = np.max([now, *others], axis=0)
    return start, end


def _held(table: Table, costs: Costs, start: dict, end: dict) -> tuple[np.ndarray, np.ndarray]:
    placement = table.placement
    last = W if table.split else B
    peak, live = np.zeros(placement.stages), np.zeros(placement.stages, int)
    for stage in range(placement.stages):
        moments: list[tuple[float, int, float, int]] = []
        for number in placement.numbers(stage):
            for m in range(table.microbatches):
                moments += [(start[F, m, number], 1, costs.residual, 1), (end[last, m, number], 0, -costs.residual, -1)]
                if table.split:
                    begin = start[B, m, number], 1, costs.cotangent, 0
                    moments += [begin, (end[W, m, number], 0, -costs.cotangent, 0)]
        held, count = 0.0, 0
        for _, _, nbytes, one in sorted(moments):
            held, count = held + nbytes, count + one
            peak[stage], live[stage] = max(peak[stage], held), max(live[stage], count)
    return peak, live
