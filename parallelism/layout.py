"""The logical layout: what every state array is, apart from how this process stores it.

A *logical array* has a name (``layers.17.attention.q.kernel``), a shape and logical axis names.
A *stored array* is one leaf of the state: it may hold one logical array, or a stack of them along
a leading ``layers`` axis, and may be padded at the end of an axis so that the axis divides over a
mesh. Checkpoints, pipelines and weight maps speak logical names; padding never leaves the process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from parallelism.errors import UserError


@dataclasses.dataclass(frozen=True)
class Logical:
    """One logical array: its name, unpadded shape, dtype and one axis name (or None) a dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def box(self) -> tuple[slice, ...]:
        """The index of all of it."""
        return tuple(slice(0, n) for n in self.shape)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One leaf of the state.

    key: its key in the flat state dictionary.
    shape: stored shape, padding included; a stack has the number of parts as its first dimension.
    axes: logical axis names of the stored array, one a dimension (a stack's first is ``layers``).
    parts: the logical arrays inside, in order: exactly one, unless ``stacked``.
    rows: of a stack, the row of each part where that is not its number: another order, or rows that hold zeros.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str | None, ...]
    parts: tuple[Logical, ...]
    stacked: bool = False
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        inner = self.shape[1:] if self.stacked else self.shape
        rows = self.rows if self.rows is not None else tuple(range(self.shape[0])) if self.stacked else (0,)
        if len(self.parts) != len(rows):
            raise ValueError(f"{self.key}: {len(self.parts)} parts in a stored array of shape {self.shape}")
        if self.rows is not None and not (self.stacked and set(rows) <= set(range(self.shape[0])) and _differ(rows)):
            raise ValueError(f"{self.key}: rows {rows} of a stored array of shape {self.shape}")
        for part in self.parts:
            if len(part.shape) != len(inner) or any(p > s for p, s in zip(part.shape, inner, strict=True)):
                raise ValueError(f"{part.name}: shape {part.shape} does not fit in stored {inner} of {self.key}")

    @property
    def padded(self) -> bool:
        inner = self.shape[1:] if self.stacked else self.shape
        return any(part.shape != inner for part in self.parts) or (self.stacked and len(self.parts) < self.shape[0])

    def part(self, row: int) -> Logical | None:
        """What a row of a stack holds; None for zeros."""
        if self.rows is None:
            return self.parts[row]
        return self.parts[self.rows.index(row)] if row in self.rows else None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def regions(self, index: tuple[slice, ...]) -> Iterator[Region]:
        """The logical regions that the box ``index`` of this stored array holds (padding left out).

        index: one slice of step 1 a stored dimension, as in ``Shard.index``.
        """
        box = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        places = range(*box[0]) if self.stacked else (0,)
        inner = box[1:] if self.stacked else box
        for row, place in enumerate(places):
            part = self.part(place)
            if part is None:
                continue
            start = tuple(lo for lo, _ in inner)
            stop = tuple(min(hi, n) for (_, hi), n in zip(inner, part.shape, strict=True))
            if any(a >= b for a, b in zip(start, stop, strict=True)):
                continue
            size = tuple(b - a for a, b in zip(start, stop, strict=True))
            within = tuple(slice(0, n) for n in size)
            yield Region(part, start, size, (row, *within) if self.stacked else within)


def _differ(rows: tuple[int, ...]) -> bool:
    return len(set(rows)) == len(rows)


@dataclasses.dataclass(frozen=True)
class Region:
    """A box of one logical array, and where it lies inside the piece of the stored array that holds it.

    start, size: the box in logical coordinates, one int a dimension.
    within: index into the piece (the array with the shape of ``index``) that selects the same box.
    """

    logical: Logical
    start: tuple[int, ...]
    size: tuple[int, ...]
    within: tuple[slice | int, ...]


class Layout(Mapping[str, Stored]):
    """Every stored array of a state, by key; logical names are unique over the whole state."""

    def __init__(self, stored: Iterable[Stored]):
        self._stored = {s.key: s for s in stored}
        self.logical: dict[str, Logical] = {}
        for s in self._stored.values():
            for part in s.parts:
                if part.name in self.logical:
                    raise UserError(f"two stored arrays hold the logical array {part.name!r}")
                self.logical[part.name] = part

    def __getitem__(self, key: str) -> Stored:
        return self._stored[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __or__(self, other: Layout) -> Layout:
        return Layout([*self.values(), *other.values()])
