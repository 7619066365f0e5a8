"""Runs a table on toy arithmetic, in numpy: the reference for what its buffers and channels mean.

A virtual stage k is y = x * x + a_k x + b_k, in integers modulo a prime, so that a value in the wrong order, of the
wrong microbatch or out of a slot that was written over gives another result. Slots that hold nothing hold ``POISON``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from parallelism.errors import UserError
from pipelines.buffers import Buffers, allocate
from pipelines.schedule import NONE, B, F, O, R, Table

PRIME = 1_000_003
POISON = -1


@dataclasses.dataclass(frozen=True)
class Toy:
    """A model of integers: a, b [virtual stages], x [microbatches], and the gradient of each output, [microbatches]."""

    a: np.ndarray
    b: np.ndarray
    x: np.ndarray
    gradient: np.ndarray

    @staticmethod
    def random(table: Table, seed: int = 0) -> Toy:
        rng = np.random.default_rng(seed)
        n, m = table.placement.count, table.microbatches
        return Toy(*(rng.integers(1, PRIME, size) for size in (n, n, m, m)))

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Outputs [microbatches], and the gradients of a and b, without a pipeline."""
        x, inputs = self.x, []
        for a, b in zip(self.a, self.b, strict=True):
            inputs.append(x)
            x = (x * x + a * x + b) % PRIME
        da, db, g = np.zeros_like(self.a), np.zeros_like(self.b), self.gradient
        for k in reversed(range(len(self.a))):
            da[k], db[k] = (g * inputs[k] % PRIME).sum() % PRIME, g.sum() % PRIME
            g = g * (2 * inputs[k] + self.a[k]) % PRIME
        return x, da, db


def interpret(table: Table, toy: Toy, buffers: Buffers | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``Toy.expected`` gives, by the table. Raises UserError where it reads a slot that holds nothing or writes to
    one that still holds something."""
    buffers, placement = buffers or allocate(table), table.placement
    stages, last = placement.stages, placement.count - 1

    def memory(depth: int) -> np.ndarray:
        return np.full((stages, depth), POISON, np.int64)

    inputs, gradients = memory(buffers.inputs.depth), memory(buffers.gradients.depth)
    residuals, cotangents = memory(buffers.made.depth), memory(buffers.cotangents.depth)
    host = memory(buffers.host_away.depth)
    out, da, db = np.zeros_like(toy.x), np.zeros_like(toy.a), np.zeros_like(toy.b)
    for tick in range(table.ticks):
        sends = {F: np.full(stages, POISON, np.int64), B: np.full(stages, POISON, np.int64)}

        def read(what: np.ndarray, slot: np.ndarray, stage: int, at: int = tick, free: bool = True) -> int:
            value = int(what[stage, slot[at, stage]]) if slot[at, stage] != NONE else POISON
            if value == POISON:
                raise UserError(f"tick {at}, stage {stage}: reads a slot that holds nothing")
            if free:
                what[stage, slot[at, stage]] = POISON
            return value

        def write(what: np.ndarray, slot: np.ndarray, stage: int, value: int, at: int = tick) -> None:
            if what[stage, slot[at, stage]] != POISON:
                raise UserError(f"tick {at}, stage {stage}: writes to a slot that is in use")
            what[stage, slot[at, stage]] = value

        for stage in range(stages):
            for kind, m, chunk in table.at(tick, stage):
                k = placement.number(stage, chunk)
                if kind == O:
                    write(host, buffers.host_away.slot, stage, read(residuals, buffers.away.slot, stage))
                    continue
                if kind == R:
                    write(residuals, buffers.back.slot, stage, read(host, buffers.host_back.slot, stage))
                    continue
                a, b = int(toy.a[k]), int(toy.b[k])
                if kind == F:
                    x = int(toy.x[m]) if k == 0 else read(inputs, buffers.inputs.slot, stage)
                    write(residuals, buffers.made.slot, stage, x)
                    y = (x * x + a * x + b) % PRIME
                    if k == last:
                        out[m] = y
                        write(gradients, buffers.heads, stage, int(toy.gradient[m]))
                    else:
                        sends[F][stage] = y
                elif kind == B:
                    g = read(gradients, buffers.gradients.slot, stage)
                    x = read(residuals, buffers.used.slot, stage, free=not table.split)
                    if k:
                        sends[B][stage] = g * (2 * x + a) % PRIME
                    if table.split:
                        write(cotangents, buffers.cotangents.slot, stage, g)
                    else:
                        da[k], db[k] = (da[k] + g * x) % PRIME, (db[k] + g) % PRIME
                else:
                    x = read(residuals, buffers.weight_residuals.slot, stage)
                    g = read(cotangents, buffers.weight_cotangents.slot, stage)
                    da[k], db[k] = (da[k] + g * x) % PRIME, (db[k] + g) % PRIME
        for kind, what, channels in ((F, inputs, buffers.forward), (B, gradients, buffers.backward)):
            for channel in channels:
                come = np.roll(sends[kind], channel.shift)
                for stage in range(stages):
                    if channel.arrives[tick, stage] != NONE:
                        write(what, channel.arrives, stage, int(come[stage]))
    return out, da, db
