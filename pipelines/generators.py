"""Generators of schedules: GPipe, 1F1B, interleaved 1F1B, and those that split the backward pass."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from parallelism.errors import UserError
from pipelines.schedule import Action, B, F, Placement, Table, W, from_orders, needs


def gpipe(stages: int, microbatches: int) -> Table:
    """All forwards, then all backwards (Huang et al. 2019): every microbatch is in flight."""
    _usable("gpipe", stages, microbatches)
    order = [Action(kind, m, 0) for kind in (F, B) for m in range(microbatches)]
    return from_orders(Placement(stages), microbatches, [order] * stages, "gpipe")


def one_f_one_b(stages: int, microbatches: int) -> Table:
    """1F1B (PipeDream-flush, Narayanan et al. 2021): stage s holds at most stages - s microbatches. One action a tick,
    so that where B takes longer than F stages wait for each other at every tick; under ``eager`` they do not."""
    _usable("1f1b", stages, microbatches)
    return _one_forward_one_backward(stages, microbatches, lambda stage: stages - 1 - stage, "1f1b", together=False)


def eager(stages: int, microbatches: int) -> Table:
    """1F1B with an F and a B in one tick, for executors whose stages go tick by tick: nobody waits in it, and the time
    is that of 1F1B done freely; stage s holds up to 2 (stages - s) - 1 microbatches."""
    _usable("eager", stages, microbatches)
    return _one_forward_one_backward(
        stages, microbatches, lambda stage: 2 * (stages - 1 - stage), "eager", together=True
    )


def _one_forward_one_backward(
    stages: int, microbatches: int, ahead: Callable[[int], int], name: str, *, together: bool
) -> Table:
    orders = []
    for stage in range(stages):
        first = min(ahead(stage), microbatches)
        order = [Action(F, m, 0) for m in range(first)]
        for m in range(microbatches):
            order += [Action(F, first + m, 0)] * (first + m < microbatches) + [Action(B, m, 0)]
        orders.append(order)
    return from_orders(Placement(stages), microbatches, orders, name, together=together)


def interleaved(stages: int, microbatches: int, chunks: int = 2) -> Table:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2): each stage holds ``chunks`` pieces of the model, the
    bubble is a ``chunks``-th. Microbatches go in groups of as many as there are stages."""
    name = "interleaved"
    _usable(name, stages, microbatches)
    if microbatches % stages:
        raise UserError(
            f"schedule {name!r}: {microbatches} microbatches, expected a multiple of the {stages} stages "
            f"({-(-microbatches // stages) * stages})"
        )
    if chunks < 2:
        raise UserError(f"schedule {name!r}: chunks={chunks}, expected at least 2; with one it is 1f1b")
    placement, total = Placement(stages, chunks), microbatches * chunks

    def turn(kind: int, k: int) -> Action:
        group, within = divmod(k, stages * chunks)
        chunk = within // stages
        return Action(kind, group * stages + within % stages, chunk if kind == F else chunks - 1 - chunk)

    orders = []
    for stage in range(stages):
        first = min(2 * (stages - 1 - stage) + (chunks - 1) * stages, total)
        order = [turn(F, k) for k in range(first)]
        for k in range(total):
            order += [turn(F, first + k)] * (first + k < total) + [turn(B, k)]
        orders.append(order)
    return from_orders(placement, microbatches, orders, name)


def zero_bubble(stages: int, microbatches: int) -> Table:
    """ZB-H1 (Qi et al. 2024, section 2.2): 1F1B whose backward for the weights comes ``stage`` microbatches later, so
    that what waits for a stage has less before it. No stage holds more microbatches than the first does under 1F1B."""
    _usable("zb-h1", stages, microbatches)
    orders = []
    for stage in range(stages):
        first = min(stages - stage, microbatches)
        order = [Action(F, m, 0) for m in range(first)]
        for m in range(microbatches):
            order += [Action(B, m, 0)] + [Action(W, m - stage, 0)] * (m >= stage)
            order += [Action(F, first + m, 0)] * (first + m < microbatches)
        orders.append(order + [Action(W, m, 0) for m in range(max(microbatches - stage, 0), microbatches)])
    return from_orders(Placement(stages), microbatches, orders, "zb-h1")


def zero_bubble_v(stages: int, microbatches: int) -> Table:
    """ZB-V (Qi et al. 2024, section 6): two chunks a stage, the second on the way back, so that the first stage
    computes the loss and every stage holds as much: at most 2 * stages chunks of microbatches."""
    _usable("zb-v", stages, microbatches)
    placement = Placement(stages, 2, "v")
    orders = by_priority(placement, microbatches, [2 * stages] * stages)
    return from_orders(placement, microbatches, orders, "zb-v")


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

    Later chunks' forwards come before earlier ones', as they lead to a backward sooner. costs: of F, B and W.
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
        key = min(able, key=lambda key: _rank(key, count))
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


def _rank(key: tuple[int, int, int], count: int) -> tuple[int, int, int]:
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


def _usable(name: str, stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise UserError(f"schedule {name!r}: {stages} stages, {microbatches} microbatches: expected at least 1 of each")


GENERATORS: dict[str, Callable[..., Table]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "eager": eager, "interleaved": interleaved, "zb-h1": zero_bubble,
    "zb-v": zero_bubble_v,
}  # fmt: skip
"""The schedules, by name."""


def generate(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Table:
    """A schedule of ``GENERATORS``; chunks: of a stage, for one that takes a number of them."""
    return GENERATORS[name](stages, microbatches, *([] if chunks is None else [chunks]))
