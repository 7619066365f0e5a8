"""Where a table's values lie until they are needed: the slots of each stage's buffers, and what is sent when.

A slot is taken at the tick that writes it and free after the action that last reads it. Each buffer is as deep as the
stage that needs most of it, as one program has one shape for all of them. What goes to the host and comes back has a
slot of the device twice, from F to O and from R to the last that reads it, and one of the host between.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np

from pipelines.schedule import NONE, PLACE, B, F, O, R, Table, W

Key = TypeVar("Key", bound=tuple)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Of one buffer: the slot of each action's value, [ticks, stages] int32 (NONE: none), and how many there are."""

    slot: np.ndarray
    depth: int


@dataclasses.dataclass(frozen=True)
class Channel:
    """What is sent by ``shift`` stages at the end of each tick. arrives: [ticks, stages] int32, the slot of the inbox
    in which a stage keeps what comes to it; NONE where nothing does."""

    shift: int
    arrives: np.ndarray


@dataclasses.dataclass(frozen=True)
class Buffers:
    """The buffers of a table.

    inputs: of activations that have come and wait for their F, where it reads them. gradients: of those that wait for
    their B; ``heads``, [ticks, stages], is where F of the last virtual stage puts what the loss gives. made, used: of
    residuals, which F leaves for B, and for W where it is apart: where F writes and where B reads. cotangents: what B
    leaves for W. Slots of W: ``weight_residuals`` and ``weight_cotangents``. away, back: the slots of residuals that O
    reads and R writes; host_away, host_back: those in host memory that O writes and R reads.
    forward, backward: the channels of activations and gradients.
    """

    inputs: Slots
    gradients: Slots
    heads: np.ndarray
    made: Slots
    used: Slots
    cotangents: Slots
    weight_residuals: Slots
    weight_cotangents: Slots
    away: Slots
    back: Slots
    host_away: Slots
    host_back: Slots
    forward: tuple[Channel, ...]
    backward: tuple[Channel, ...]


NAMES = "inputs", "gradients", "heads", "made", "used", "cot", "wr", "wc", "away", "back", "host_away", "host_back"


def allocate(table: Table) -> Buffers:
    """The buffers of a checked table, or of one that has its forwards only."""
    ticks, placement = table.ticks_of(), table.placement
    shape, last = (table.ticks, placement.stages), placement.count - 1
    kinds = {kind: np.full(shape, NONE, np.int32) for kind in NAMES}
    depths = {"residuals": 0, "inputs": 0, "gradients": 0, "cotangents": 0, "host": 0}
    sent: dict[tuple[int, int], np.ndarray] = {}
    for stage in range(placement.stages):
        mine = [(m, n) for n in placement.numbers(stage) for m in range(table.microbatches)]
        end = W if table.split else B
        # A value is written at the first of two moments and read last at the second; at one tick reads of an earlier
        # kind come first, so a place in the tick's order is part of a moment.
        away = [(m, n) for m, n in mine if (O, m, n) in ticks]
        back = [(m, n) for m, n in mine if (B, m, n) in ticks]
        spans = [((F, m, n), span(ticks, F, O if (O, m, n) in ticks else end, m, n)) for m, n in back]
        spans += [((R, m, n), span(ticks, R, end, m, n)) for m, n in away]
        for (kind, m, n), slot in _assigned(spans, depths, "residuals"):
            kinds["made" if kind == F else "back"][ticks[kind, m, n], stage] = slot
            if kind == F and (O, m, n) in ticks:
                kinds["away"][ticks[O, m, n], stage] = slot
                continue
            kinds["used"][ticks[B, m, n], stage] = slot
            if table.split:
                kinds["wr"][ticks[W, m, n], stage] = slot
        # Pieces come back all through a tick: nothing takes their place before its end.
        gone = [((m, n), (span(ticks, O, R, m, n)[0], _moment(ticks[R, m, n], PLACE[O]))) for m, n in away]
        for (m, n), slot in _assigned(gone, depths, "host"):
            kinds["host_away"][ticks[O, m, n], stage] = slot
            kinds["host_back"][ticks[R, m, n], stage] = slot
        if table.split:
            between = [((m, n), span(ticks, B, W, m, n)) for m, n in mine]
            for (m, n), slot in _assigned(between, depths, "cotangents"):
                kinds["cot"][ticks[B, m, n], stage] = slot
                kinds["wc"][ticks[W, m, n], stage] = slot
        for kind, name, step in ((F, "inputs", -1), (B, "gradients", 1)):
            comes = [
                ((m, n), (_moment(ticks[kind, m, n + step], ARRIVES), span(ticks, kind, kind, m, n)[1]))
                for m, n in (mine if kind == F else back)
                if 0 <= n + step <= last
            ]
            if kind == B:
                comes += [((m, n), span(ticks, F, B, m, n)) for m, n in back if n == last]
            for (m, n), slot in _assigned(comes, depths, name):
                kinds[name][ticks[kind, m, n], stage] = slot
                if n + step > last:
                    kinds["heads"][ticks[F, m, n], stage] = slot
                    continue
                further = (stage - placement.stage(n + step)) % placement.stages
                shift = further if further <= 1 else further - placement.stages
                arrives = sent.setdefault((kind, shift), np.full(shape, NONE, np.int32))
                arrives[ticks[kind, m, n + step], stage] = slot
    residual, cotangent, host = (depths[name] for name in ("residuals", "cotangents", "host"))
    channels = {k: [Channel(shift, sent[k, shift]) for shift in (-1, 0, 1) if (k, shift) in sent] for k in (F, B)}
    return Buffers(
        Slots(kinds["inputs"], depths["inputs"]),
        Slots(kinds["gradients"], depths["gradients"]),
        kinds["heads"],
        Slots(kinds["made"], residual),
        Slots(kinds["used"], residual),
        Slots(kinds["cot"], cotangent),
        Slots(kinds["wr"], residual),
        Slots(kinds["wc"], cotangent),
        Slots(kinds["away"], residual),
        Slots(kinds["back"], residual),
        Slots(kinds["host_away"], host),
        Slots(kinds["host_back"], host),
        tuple(channels[F]),
        tuple(channels[B]),
    )


ARRIVES = 5  # the place in a tick of what comes from others: after all actions


def _moment(tick: int, place: int) -> int:
    return (ARRIVES + 1) * tick + place


def span(ticks: Mapping[tuple[int, int, int], int], begin: int, end: int, m: int, n: int) -> tuple[int, int]:
    """From one action of a microbatch at a virtual stage to another."""
    return _moment(ticks[begin, m, n], PLACE[begin]), _moment(ticks[end, m, n], PLACE[end])


def _assigned(spans: Iterable[tuple[Key, tuple[int, int]]], depths: dict[str, int], name: str) -> list[tuple[Key, int]]:
    """A slot for each (key, (begin, end)), the fewest there can be: the lowest that is free, as they begin."""
    free: list[int] = []
    taken: list[tuple[int, int]] = []
    found, count = [], 0
    for key, (begin, end) in sorted(spans, key=lambda span: (span[1], span[0])):
        while taken and taken[0][0] < begin:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, count = count, count + 1
        heapq.heappush(taken, (end, slot))
        found.append((key, slot))
    depths[name] = max(depths[name], count)
    return found
