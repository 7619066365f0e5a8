"""The best schedule for given costs and memory: every generator's, and orders by priority under many limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

from parallelism.errors import UserError
from parallelism.text import decimal
from pipelines.generators import GENERATORS, by_priority
from pipelines.offload import offload
from pipelines.schedule import Placement, Table, from_orders
from pipelines.simulate import Costs, Timeline, simulate

CHUNKS = 2  # of a stage, where a schedule has several


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A table and its timeline, of so many that were tried."""

    timeline: Timeline
    tried: int

    @property
    def table(self) -> Table:
        return self.timeline.table


def search(
    stages: int,
    microbatches: int,
    costs: Callable[[Placement], Costs],
    limit: float = math.inf,
    how: Literal["ideal", "executed"] = "executed",
) -> Found:
    """The table that ends first of those that keep to a limit of bytes a stage; of equals the one that holds least.

    costs: of the virtual stages of a placement. Residuals are offloaded where nothing else meets the limit, and their
    ``link`` is finite.
    Raises UserError, with the smallest limit that would do, where none meets it.
    """
    timelines = [simulate(table, costs(table.placement), how) for table in _candidates(stages, microbatches, costs)]
    able = [timeline for timeline in timelines if timeline.peak.max() <= limit]
    if not able:
        moved = [
            simulate(found, timeline.costs, how)
            for timeline in timelines
            if math.isfinite(timeline.costs.link)
            if (found := _under(timeline.table, timeline.costs, limit, how)) is not None
        ]
        able = [timeline for timeline in moved if timeline.peak.max() <= limit]
        timelines += moved
    if not able:
        least = min(timelines, key=lambda timeline: timeline.peak.max())
        raise UserError(
            f"{stages} stages, {microbatches} microbatches: no schedule keeps to {decimal(limit)} a stage: expected "
            f"at least {decimal(least.peak.max())}, which {least.table.name!r} needs; or keep less of a layer (remat)"
        )
    best = min(able, key=lambda timeline: (round(timeline.makespan, 9), timeline.peak.max(), timeline.table.ticks))
    return Found(best, len(timelines))


def _under(table: Table, costs: Costs, limit: float, how: Literal["ideal", "executed"]) -> Table | None:
    """The table with as many residuals on the host as the limit asks for, or None."""
    most = math.floor(limit / costs.residual)
    for slots in range(most, 0, -1):
        try:
            found = offload(table, costs, slots).table
        except UserError:
            return None
        if simulate(found, costs, how).peak.max() <= limit:
            return found
    return None


def _candidates(stages: int, microbatches: int, costs: Callable[[Placement], Costs]) -> Iterator[Table]:
    for generate in GENERATORS.values():
        try:
            yield generate(stages, microbatches)
        except UserError:  # a number of microbatches that it cannot use
            continue
    placements = [Placement(stages), Placement(stages, CHUNKS), Placement(stages, CHUNKS, "v")]
    for placement in placements:
        each = costs(placement)
        for split in (True, False):
            mean = [
                sum(each.of(kind, n, split) for n in range(placement.count)) / placement.count
                for kind in range(3 if split else 2)
            ]
            work = (mean[0], mean[1], mean[2] if split else 0.0)
            for limits in _limits(placement, microbatches):
                orders = by_priority(placement, microbatches, limits, work, each.transfer, split)
                for together in (False, True):
                    name = f"priority, {max(limits)} held" + (", in one tick" if together else "")
                    yield from_orders(placement, microbatches, orders, name, together=together)


def _limits(placement: Placement, microbatches: int) -> Iterator[list[int]]:
    """Residuals that each stage may hold: fewer the later a stage is, as under 1F1B, or as many on each."""
    stages, chunks = placement.stages, placement.chunks
    for times in (1, 2):
        yield [min(times * (stages - 1 - s) + 1, microbatches) + chunks - 1 for s in range(stages)]
    for times in (1, 2, 3):
        yield [min(times * stages, microbatches) + chunks - 1] * stages
