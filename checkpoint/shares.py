"""The write plan: every byte is written once, by the process of those that hold it which has least to write."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import jax

from checkpoint.cells import Grid, grid_of
from checkpoint.manifest import split
from checkpoint.reader import slices
from parallelism.layout import Layout, Logical

WHOLE_BOX = 1 / 8
"""A box of at most this part of what a process writes is not divided: off a device it comes whole anyway."""

Bounds = tuple[tuple[int, int], ...]
"""The box of a stored array that a device holds: (start, stop) in each dimension."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A chunk that a process writes: of logical array ``logical``, whose box of this shape begins at ``start``.

    within: the index that selects it from the shard which holds it. grid: of its cells.
    """

    logical: Logical
    start: tuple[int, ...]
    shape: tuple[int, ...]
    within: tuple[slice | int, ...]
    grid: Grid

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.logical.dtype.itemsize


Holders = Mapping[str, Mapping[Bounds, Iterable[int]]]
"""By key of a stored array, each distinct box of it, and the processes that hold that."""


def holders_of(layout: Layout, shardings: Mapping[str, jax.sharding.Sharding]) -> Holders:
    """Who holds what, from the shardings alone: the same in every process."""
    found: dict[str, dict[Bounds, tuple[int, ...]]] = {}
    same: dict[tuple[tuple[int, ...], jax.sharding.Sharding], dict[Bounds, tuple[int, ...]]] = {}
    for key, stored in layout.items():
        sharding = shardings[key]
        if (stored.shape, sharding) not in same:
            boxes: dict[Bounds, set[int]] = defaultdict(set)
            for device, index in sharding.devices_indices_map(stored.shape).items():
                boxes[bounds_of(index, stored.shape)].add(device.process_index)  # type: ignore[attr-defined]
            same[stored.shape, sharding] = {box: tuple(sorted(processes)) for box, processes in boxes.items()}
        found[key] = same[stored.shape, sharding]
    return found


def bounds_of(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Bounds:
    assert index is not None
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def shares_of(
    layout: Layout, holders: Holders, process: int, chunk_bytes: int
) -> dict[str, list[tuple[Bounds, list[Share]]]]:
    """What ``process`` writes: by key, in the layout's order, boxes that it holds and the chunks of them that are its.

    Pure. Over all processes every element is in one chunk, padding in none. Of what several hold the largest box goes
    first, each to the one with least bytes so far; one that is much of a process's share is divided by its chunks.
    """
    boxes = [
        (key, box, tuple(held), _chunks(layout, key, box, chunk_bytes))
        for key in layout
        for box, held in holders[key].items()
    ]
    sizes = [sum(share.nbytes for share in chunks) for *_, chunks in boxes]
    processes = {p for _, _, held, _ in boxes for p in held}
    loads = dict.fromkeys(sorted(processes), 0)
    limit = WHOLE_BOX * sum(sizes) / max(1, len(loads))
    mine: dict[int, list[Share]] = {}

    def give(number: int, chunks: list[Share], held: tuple[int, ...]) -> None:
        to = min(held, key=loads.__getitem__)
        loads[to] += sum(share.nbytes for share in chunks)
        if to == process and chunks:
            mine.setdefault(number, []).extend(chunks)

    for number in sorted(range(len(boxes)), key=lambda n: (len(boxes[n][2]) > 1, -sizes[n])):
        _, _, held, chunks = boxes[number]
        if len(held) > 1 and sizes[number] > limit:
            for share in chunks:
                give(number, [share], held)
        else:
            give(number, chunks, held)
    found: dict[str, list[tuple[Bounds, list[Share]]]] = {key: [] for key in layout}
    for number, (key, box, _, _) in enumerate(boxes):
        if number in mine:
            found[key].append((box, mine[number]))
    return found


def _chunks(layout: Layout, key: str, box: Bounds, chunk_bytes: int) -> list[Share]:
    """The chunks of one box of a stored array."""
    stored, found = layout[key], []
    for region in stored.regions(tuple(slice(lo, hi) for lo, hi in box)):
        logical = dataclasses.replace(region.logical, dtype=stored.dtype)
        for start, shape in split(region.size, stored.dtype.itemsize, chunk_bytes):
            inner = slices(start, shape, (0,) * len(start))
            within = (*region.within[:1], *inner) if stored.stacked else inner
            grid = grid_of(shape, logical.shape, logical.dtype.itemsize)
            found.append(
                Share(logical, tuple(a + b for a, b in zip(region.start, start, strict=True)), shape, within, grid)
            )
    return found


def stored_specs(layout: Layout) -> list[Logical]:
    """The logical arrays of a layout with the dtype of the stored array: what a checkpoint of it holds."""
    return [dataclasses.replace(part, dtype=stored.dtype) for stored in layout.values() for part in stored.parts]
