"""Generators of schedules: GPipe, 1F1B, interleaved 1F1B, and those that split the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from parallelism.errors import UserError, unknown_name
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
    """ZB-H1 (Qi et al. 2024, section 2.2): 1F1B with the backward for the weights where a stage would wait. No stage
    holds more microbatches than the first does under 1F1B."""
    _usable("zb-h1", stages, microbatches)
    placement, orders = Placement(stages), []
    for stage in range(stages):
        first = min(stages - stage, microbatches)
        order = [Action(F, m, 0) for m in range(first)]
        for m in range(microbatches):
            order += [Action(B, m, 0)] + [Action(F, first + m, 0)] * (first + m < microbatches)
        orders.append(order)
    return from_orders(placement, microbatches, _with_weights(placement, orders, stages), "zb-h1")


def zero_bubble_v(stages: int, microbatches: int) -> Table:
    """ZB-V (Qi et al. 2024, section 6): two chunks a stage, the second on the way back, so that the first stage
    computes the loss and every stage holds as much: at most 2 * stages chunks of microbatches, the bytes of 1F1B.

    Of no fewer microbatches m than stages p, and F, B and W that take equally long, it takes 6 m + p - 1, the least
    that there can be: the last stage begins at p - 1 and has 6 m to do. A stage fills up with forwards until its first
    backward comes; then backwards and forwards take turns, backwards of the second chunk alone until one of the first
    is there, and of both in turn from then on.
    """
    _usable("zb-v", stages, microbatches)
    placement, orders = Placement(stages, 2, "v"), []
    for stage in range(stages):
        alone = stages - stage  # backwards of the second chunk before one of the first comes
        full = [0] * (2 * alone - 1) + [1] + [0, 1] * stage
        forwards = [1] * (alone - 1) + [0, 1] * microbatches
        backwards = [1] * alone + [0, 1] * microbatches
        turns = itertools.zip_longest([(B, c) for c in backwards], [(F, c) for c in forwards])
        kinds = [(F, c) for c in full] + [each for turn in turns for each in turn if each is not None]
        number = {(kind, c): itertools.count() for kind in (F, B) for c in (0, 1)}
        order = [Action(kind, next(number[kind, c]), c) for kind, c in kinds]
        orders.append([action for action in order if action.microbatch < microbatches])
    return from_orders(placement, microbatches, _with_weights(placement, orders, 2 * stages), "zb-v")


def _with_weights(placement: Placement, orders: Sequence[Sequence[Action]], held: int) -> list[list[Action]]:
    """Orders of F and B with W where a stage would wait, if each took a tick: for what its next action needs; before an
    F, with ``held`` residuals, for room; before a B while as many W as there are stages are due."""
    found: list[list[Action]] = [[] for _ in orders]
    due: list[list[Action]] = [[] for _ in orders]
    done: set[tuple[int, int, int]] = set()
    place, residuals = ([0] * placement.stages for _ in range(2))
    while any(due) or any(place[stage] < len(order) for stage, order in enumerate(orders)):
        now: list[tuple[int, int, int]] = []
        for stage, order in enumerate(orders):
            action = order[place[stage]] if place[stage] < len(order) else None
            if action is not None:
                key = action.kind, action.microbatch, placement.number(stage, action.chunk)
                room = residuals[stage] < held if action.kind == F else len(due[stage]) < placement.stages
                if room and done.issuperset(needs(key, placement)):
                    now.append(key)
                    found[stage].append(action)
                    place[stage] += 1
                    if action.kind == F:
                        residuals[stage] += 1
                    else:
                        due[stage].append(action._replace(kind=W))
                    continue
            if due[stage]:
                found[stage].append(due[stage].pop(0))
                residuals[stage] -= 1
        done.update(now)
    return found


def _usable(name: str, stages: int, microbatches: int) -> None:
    if stages < 1 or microbatches < 1:
        raise UserError(f"schedule {name!r}: {stages} stages, {microbatches} microbatches: expected at least 1 of each")


GENERATORS: dict[str, Callable[..., Table]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "eager": eager, "interleaved": interleaved, "zb-h1": zero_bubble,
    "zb-v": zero_bubble_v,
}  # fmt: skip
"""The schedules, by name."""


def generate(name: str, stages: int, microbatches: int, chunks: int | None = None) -> Table:
    """A schedule of ``GENERATORS``; chunks: of a stage, under interleaved. Raises UserError for what there is not."""
    if name not in GENERATORS:
        raise unknown_name("schedule", name, GENERATORS)
    if chunks is not None and name != "interleaved":
        raise UserError(f"schedule {name!r}: chunks={chunks} are interleaved's, leave them out")
    return GENERATORS[name](stages, microbatches, *([] if chunks is None else [chunks]))
