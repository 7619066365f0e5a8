"""Cells: a chunk's bytes lie cell by cell, each with a digest, so that a shard reads little more than it needs.

A chunk is cut by a grid of equal parts an axis, up to ``PARTS``, so whatever power of two a mesh divides an axis into
up to there, a shard is made of whole cells. Within a cell elements are in row-major order, and so are the cells.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash

CELL_BYTES = 4 << 10
PARTS = 16
DIGEST_BYTES = 16
HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # of memory that JAX takes on CPU as it is, without a copy

Grid = tuple[int, ...]
"""Parts along each axis of a chunk."""


def aligned(nbytes: int) -> np.ndarray:
    """Zeros that begin at a multiple of ``ALIGNMENT``, [nbytes] uint8."""
    if nbytes < HUGE_PAGE:
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        first = -raw.ctypes.data % ALIGNMENT
        return raw[first : first + nbytes]
    # Linux gives huge pages, which take a fraction of the time to come by, to what asks for them and begins at one, as
    # memory of whole ones does. Of the last, if not all is used, small pages come.
    try:
        memory = mmap.mmap(-1, -(-nbytes // HUGE_PAGE) * HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:  # which a restore would take for a file that cannot be read
        raise MemoryError(f"{nbytes} bytes: {e.strerror}") from e
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, 0, nbytes // HUGE_PAGE * HUGE_PAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def grid_of(shape: Sequence[int], whole: Sequence[int], itemsize: int) -> Grid:
    """A grid for a chunk of an array of shape ``whole``.

    The axis of which a cell holds most is halved, while one can be and cells stay at least ``CELL_BYTES``: a chunk that
    is a shard already is rather cut along the other axes.
    """
    grid, nbytes = [1] * len(shape), math.prod(shape) * itemsize
    while nbytes >= 2 * CELL_BYTES:
        halves = [d for d, n in enumerate(shape) if grid[d] < PARTS and n % (2 * grid[d]) == 0]
        if not halves:
            break
        grid[max(halves, key=lambda d: shape[d] / grid[d] / whole[d])] *= 2
        nbytes //= 2
    return tuple(grid)


def pack(data: np.ndarray, grid: Grid) -> np.ndarray:
    """The bytes of a chunk in the order of its file, [nbytes] uint8: a view of ``data`` if that order is its own."""
    parts, order = _axes(data.shape, grid)
    return np.ascontiguousarray(data.reshape(parts).transpose(order)).reshape(-1).view(np.uint8)


def pack_into(raw: np.ndarray, data: np.ndarray, grid: Grid) -> None:
    """``pack`` into memory that is there: [nbytes] uint8, aligned to the dtype. ``data`` may have any strides."""
    parts, order = _axes(data.shape, grid)
    target = raw.view(data.dtype).reshape([parts[axis] for axis in order])
    np.copyto(target, data.reshape(parts).transpose(order))


def unpack(raw: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, grid: Grid) -> np.ndarray:
    """The chunk whose file has these bytes: a view of ``raw`` if cells are whole rows."""
    parts, order = _axes(shape, grid)
    packed = raw.view(dtype).reshape([parts[axis] for axis in order])
    return packed.transpose(np.argsort(order)).reshape(shape)


def unpack_into(out: np.ndarray, raw: np.ndarray, shape: tuple[int, ...], grid: Grid, box: tuple[slice, ...]) -> bool:
    """``out[...] = unpack(raw, ...)[box]`` in one copy; False, and nothing done, where ``box`` cuts several cells."""
    parts, order = _axes(shape, grid)
    index, split = [], []
    for size, g, s in zip(shape, grid, box, strict=True):
        cell = size // g
        first, last = s.start // cell, (s.stop - 1) // cell + 1
        if s.start % cell == 0 and s.stop % cell == 0:
            index += [slice(first, last), slice(None)]
            split += [last - first, cell]
        elif last - first == 1:
            index += [slice(first, last), slice(s.start - first * cell, s.stop - first * cell)]
            split += [1, s.stop - s.start]
        else:
            return False
    packed = raw.view(out.dtype).reshape([parts[axis] for axis in order])
    np.copyto(out.reshape(split).transpose(order), packed[tuple(index[axis] for axis in order)])
    return True


def _axes(shape: Sequence[int], grid: Grid) -> tuple[list[int], list[int]]:
    """The shape of a chunk with each axis in two, parts and what is in one, and the order with all parts first."""
    parts = [n for size, g in zip(shape, grid, strict=True) for n in (g, size // g)]
    return parts, [*range(0, 2 * len(grid), 2), *range(1, 2 * len(grid), 2)]


def digests(raw: np.ndarray, grid: Grid) -> bytes:
    """The table of a chunk: xxh3_128 of each cell, in their order, ``DIGEST_BYTES`` each."""
    digest: Any = xxhash.xxh3_128_digest  # of an array too, which its type does not say
    return b"".join(map(digest, raw.reshape(math.prod(grid), -1)))


def touched(boxes: Iterable[tuple[slice, ...]], shape: Sequence[int], grid: Grid) -> np.ndarray:
    """Which cells boxes of a chunk meet, as sorted numbers. No box is empty, all are inside."""
    met = np.zeros(grid, bool)
    cuts = [n // g for n, g in zip(shape, grid, strict=True)]
    for box in boxes:
        met[tuple(slice(s.start // cut, (s.stop - 1) // cut + 1) for s, cut in zip(box, cuts, strict=True))] = True
    return np.flatnonzero(met)


def runs(cells: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """Sorted numbers of cells as (first, one past the last) of each that lie side by side."""
    numbers = np.asarray(cells)
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks) if len(run)]
