"""Where a table's values lie until they are needed: the slots of each stage's buffers, and what is sent when.

A slot is taken at the tick that writes it and free after the action that last reads it. Each buffer is as deep as the
stage that needs most of it, as one program has one shape for all of them.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable

import numpy as np

from pipelines.schedule import NONE, B, F, Table, W


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
    leaves for W. Slots of W: ``weight_residuals`` and ``weight_cotangents``.
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
    forward: tuple[Channel, ...]
    backward: tuple[Channel, ...]


NAMES = "inputs", "gradients", "heads", "made", "used", "cot", "wr", "wc"


def allocate(table: Table) -> Buffers:
    """The buffers of a checked table, for a latency of one tick."""
    ticks, placement = table.ticks_of(), table.placement
    shape, last = (table.ticks, placement.stages), placement.count - 1
    kinds = {kind: np.full(shape, NONE, np.int32) for kind in NAMES}
    depths = {"residuals": 0, "inputs": 0, "gradients": 0, "cotangents": 0}
    sent: dict[tuple[int, int], np.ndarray] = {}
    for stage in range(placement.stages):
        mine = [(m, n) for n in placement.numbers(stage) for m in range(table.microbatches)]
        end = W if table.split else B
        # (begin, end, key): a value is written at ``begin`` and read last at ``end``; at one tick reads of an earlier
        # kind come first, so a place in the tick's order is part of the time.
        residuals = {(m, n): (_time(ticks[F, m, n], F), _time(ticks[end, m, n], end)) for m, n in mine}
        for key, slot in _assigned(residuals.items(), depths, "residuals"):
            kinds["made"][ticks[F, *key], stage] = slot
            kinds["used"][ticks[B, *key], stage] = slot
            if table.split:
                kinds["wr"][ticks[W, *key], stage] = slot
        if table.split:
            between = {(m, n): (_time(ticks[B, m, n], B), _time(ticks[W, m, n], W)) for m, n in mine}
            for key, slot in _assigned(between.items(), depths, "cotangents"):
                kinds["cot"][ticks[B, *key], stage] = slot
                kinds["wc"][ticks[W, *key], stage] = slot
        for kind, name, step in ((F, "inputs", -1), (B, "gradients", 1)):
            comes = {
                (m, n): (_time(ticks[kind, m, n + step], 3), _time(ticks[kind, m, n], kind))
                for m, n in mine
                if 0 <= n + step <= last
            }
            if kind == B:
                comes |= {(m, n): (_time(ticks[F, m, n], F), _time(ticks[B, m, n], B)) for m, n in mine if n == last}
            for (m, n), slot in _assigned(comes.items(), depths, name):
                kinds[name][ticks[kind, m, n], stage] = slot
                if n + step > last:
                    kinds["heads"][ticks[F, m, n], stage] = slot
                    continue
                away = (stage - placement.stage(n + step)) % placement.stages
                shift = away if away <= 1 else away - placement.stages
                arrives = sent.setdefault((kind, shift), np.full(shape, NONE, np.int32))
                arrives[ticks[kind, m, n + step], stage] = slot
    residual, cotangent = depths["residuals"], depths["cotangents"]
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
        tuple(channels[F]),
        tuple(channels[B]),
    )


def _time(tick: int, place: int) -> int:
    """A moment: kinds of a tick come after one another, what arrives after all of them."""
    return 4 * tick + place


def _assigned(
    spans: Iterable[tuple[tuple[int, int], tuple[int, int]]], depths: dict[str, int], name: str
) -> list[tuple[tuple[int, int], int]]:
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
