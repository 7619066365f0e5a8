"""The best schedule for given costs and memory: every generator's, and orders by priority under many limits."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from parallelism.errors import UserError
from parallelism.text import decimal
from pipelines.buffers import allocate
from pipelines.generators import GENERATORS
from pipelines.offload import offload
from pipelines.schedule import Action, B, F, Placement, Table, W, from_orders, needs
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
    if all(timeline.peak.max() > limit for timeline in timelines):
        timelines += [
            _under(line.table, line.costs, limit, how) for line in timelines if math.isfinite(line.costs.link)
        ]
    able = [timeline for timeline in timelines if timeline.peak.max() <= limit]
    if not able:
        least = min(timelines, key=lambda timeline: timeline.peak.max())
        raise UserError(
            f"{stages} stages, {microbatches} microbatches: no schedule keeps to {decimal(limit)} a stage: expected "
            f"at least {decimal(least.peak.max())}, which {least.table.name!r} needs; or keep less of a layer (remat)"
            + ("" if math.isfinite(least.costs.link) else ", or give a link to the host")
        )
    best = min(
        able, key=lambda timeline: (float(f"{timeline.makespan:.9g}"), timeline.peak.max(), timeline.table.ticks)
    )
    return Found(best, len(timelines))


def _under(table: Table, costs: Costs, limit: float, how: Literal["ideal", "executed"]) -> Timeline:
    """With as many residuals on the host as the limit asks for, or as can be."""
    found = simulate(table, costs, how)
    for slots in range(allocate(table).made.depth - 1, 0, -1):
        if found.peak.max() <= limit:
            break
        try:
            found = simulate(offload(table, costs, slots).table, costs, how)
        except UserError:
            break
    return found


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


def by_priority(
    placement: Placement,
    microbatches: int,
    limits: Sequence[int],
    costs: tuple[float, float, float] = (1.0, 1.0, 1.0),
    transfer: float = 0.0,
    split: bool = True,
) -> list[list[Action]]:
    """Orders in which a stage that is free does a B if there is one, else an F if it holds fewer than its limit of
    (microbatch, chunk), else a W; and where it holds its limit a W before it waits.

    Later chunks' forwards come before earlier ones', as they lead to a backward sooner. costs: of F, B and W, and
    transfer: from a stage to the next, in one unit of time. split: whether W is apart.
    Raises UserError for limits under which no microbatch comes through.
    """
    count, ready_at = placement.count, {(F, m, 0): 0.0 for m in range(microbatches)}
    free = [0.0] * placement.stages
    held = [0] * placement.stages
    waiting: list[set[tuple[int, int, int]]] = [set() for _ in range(placement.stages)]
    for key in ready_at:
        waiting[placement.stage(0)].add(key)
    done: dict[tuple[int, int, int], float] = {}
    orders: list[list[Action]] = [[] for _ in range(placement.stages)]
    total = (3 if split else 2) * microbatches * count
    events: list[tuple[float, int]] = [(0.0, stage) for stage in range(placement.stages)]
    heapq.heapify(events)
    while len(done) < total:
        if not events:
            raise UserError(f"a limit of {list(limits)} microbatches a stage holds too few: expected more")
        now, stage = heapq.heappop(events)
        if free[stage] > now:
            continue
        room = limits[stage] - held[stage]
        able = [key for key in waiting[stage] if ready_at[key] <= now and _fits(key, placement, room)]
        if not able:
            continue
        key = min(able, key=_rank)
        kind, microbatch, number = key
        waiting[stage].discard(key)
        end = now + costs[kind] + (0.0 if split or kind != B else costs[W])
        done[key], free[stage] = end, end
        orders[stage].append(Action(kind, microbatch, number // placement.stages))
        if kind == F:
            held[stage] += 1
        elif kind == W or not split:
            held[stage] -= 1
        heapq.heappush(events, (end, stage))
        for following in _followers(key, count, split):
            if all(need in done for need in needs(following, placement)):
                there = placement.stage(following[2])
                ready_at[following] = max(
                    done[need] + (0.0 if placement.stage(need[2]) == there else transfer)
                    for need in needs(following, placement)
                )
                waiting[there].add(following)
                heapq.heappush(events, (max(ready_at[following], free[there]), there))
    return orders


def _rank(key: tuple[int, int, int]) -> tuple[int, int, int]:
    kind, microbatch, number = key
    return ((1, 0, 2)[kind], -number if kind == F else microbatch, microbatch)


def _fits(key: tuple[int, int, int], placement: Placement, room: int) -> bool:
    """Whether a forward leaves room for those chunks of its microbatch that this stage still has to do."""
    kind, _, number = key
    if kind != F:
        return True
    later = sum(other > number for other in placement.numbers(placement.stage(number)))
    return later < room


def _followers(key: tuple[int, int, int], count: int, split: bool) -> list[tuple[int, int, int]]:
    kind, microbatch, number = key
    if kind == F:
        return [(F, microbatch, number + 1)] if number + 1 < count else [(B, microbatch, number)]
    if kind == W:
        return []
    return [(W, microbatch, number)] * split + [(B, microbatch, number - 1)] * (number > 0)


def _limits(placement: Placement, microbatches: int) -> Iterator[list[int]]:
    """Residuals that each stage may hold: fewer the later a stage is, as under 1F1B, or as many on each."""
    stages, chunks = placement.stages, placement.chunks
    for times in (1, 2):
        yield [min(times * (stages - 1 - s) + 1, microbatches) + chunks - 1 for s in range(stages)]
    for times in (1, 2, 3):
        yield [min(times * stages, microbatches) + chunks - 1] * stages
