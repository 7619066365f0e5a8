"""Which layers each stage has, and their parameters as stacks in that order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from parallelism.errors import UserError
from pipelines.schedule import Placement

Tree = Any


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A model's layers, dealt out. counts: how many each virtual stage has, at least one."""

    placement: Placement
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != self.placement.count or min(self.counts) < 1:
            raise UserError(
                f"layers dealt out as {list(self.counts)}: expected at least one for each of the "
                f"{self.placement.count} virtual stages"
            )

    @staticmethod
    def even(layers: int, placement: Placement, head: float = 0.0) -> Pieces:
        """So that the stage with most work has as little as can be. head: the layers whose work the model's head has,
        which is done where the last virtual stage is; of equals the first ones get more.

        Raises UserError for fewer layers than virtual stages.
        """
        if layers < placement.count:
            raise UserError(
                f"found {layers} layers for {placement.stages} stages of {placement.chunks} chunks, expected at least "
                f"{placement.count}, one for each"
            )
        counts, work = [1] * placement.count, [float(placement.chunks)] * placement.stages
        work[placement.stage(placement.count - 1)] += head
        for _ in range(layers - placement.count):
            n = min(range(placement.count), key=lambda n: (work[placement.stage(n)], counts[n], n))
            counts[n] += 1
            work[placement.stage(n)] += 1
        return Pieces(placement, tuple(counts))

    @property
    def layers(self) -> int:
        return sum(self.counts)

    @property
    def most(self) -> int:
        """Layers of the virtual stage that has most: rows of a chunk in a stack."""
        return max(self.counts)

    @property
    def firsts(self) -> list[int]:
        """The first layer of each virtual stage."""
        return [0, *itertools.accumulate(self.counts)][:-1]

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Where each layer is: its stage, the chunk of that, and its place there."""
        return [
            (self.placement.stage(number), number // self.placement.stages, i)
            for number, count in enumerate(self.counts)
            for i in range(count)
        ]

    def stack(self, params: Sequence[Tree]) -> Tree:
        """Layers' parameters as leaves [stages, chunks, rows of a chunk, ...], zeros where a chunk has fewer.

        Raises UserError for another number of layers.
        """
        if len(params) != self.layers:
            raise UserError(f"{len(params)} layers: expected {self.layers}, which the pieces are of")
        placement, empty = self.placement, jax.tree.map(jnp.zeros_like, params[0])

        def chunk(stage: int, chunk: int) -> Tree:
            number = placement.number(stage, chunk)
            first, count = self.firsts[number], self.counts[number]
            rows = [*params[first : first + count], *[empty] * (self.most - count)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

        stages = [[chunk(s, c) for c in range(placement.chunks)] for s in range(placement.stages)]
        each = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *chunks) for chunks in stages)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def unstack(self, stacked: Tree) -> list[Tree]:
        """The other way: a list of layers."""
        return [jax.tree.map(lambda a, place=place: a[place], stacked) for place in self.places]
