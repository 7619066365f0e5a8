"""What differs between two checkpoints: which arrays, where and by how much, box by box."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from checkpoint.ahead import in_order
from checkpoint.formats.native import CheckpointSource
from checkpoint.manifest import CHUNK_BYTES, split
from checkpoint.reader import Box, Progress, slices
from checkpoint.rules import matches
from parallelism.errors import UserError
from parallelism.layout import Logical

ELEMENTS = 1 << 17
"""Compared at once: what that takes in float64, some times over, is little beside two boxes, and stays in caches."""


class Source(Protocol):
    """Arrays by name, to be read by boxes, by several threads at once. where: names it in messages."""

    where: str
    arrays: Mapping[str, Logical]

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """A box (a slice of step 1 a dimension) in the array's dtype. Raises CorruptError on damage."""


@dataclasses.dataclass(frozen=True)
class ArrayDiff:
    """How an array differs. Those of the two sides are pairs, None where a side has no such array.

    different: how many elements differ, of which ``nans`` are NaN on one side only. Of the others, largest_difference
    is the largest |a - b|, largest_relative the largest |a - b| / max(|a|, |b|) (inf where one is infinite). where: the
    index of the largest difference, or of a NaN if there are only those; None if no element differs, or if shapes do
    and none is compared.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    different: int = 0
    nans: int = 0
    largest_difference: float = 0.0
    largest_relative: float = 0.0
    where: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class DiffReport:
    """differing: arrays that differ, in the order of their names. arrays: how many there are on either side.
    compared_bytes: of both sides together; skipped_bytes: of one, not read, as the same digest says the same bytes."""

    a: str
    b: str
    differing: tuple[ArrayDiff, ...]
    arrays: int
    compared_bytes: int
    skipped_bytes: int

    @property
    def same(self) -> bool:
        return not self.differing


def diff(
    a: Source,
    b: Source,
    select: Sequence[str] = (),
    tolerance: float | None = None,
    full: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare the arrays whose names match one of ``select``, or all of them.

    tolerance: None means that dtypes and every bit are to be the same (of integers: every value). With one, values are
    compared, whatever their dtype: those are the same with |a - b| <= tolerance * max(|a|, |b|), and NaN is as NaN.
    full: read also chunks whose digests on both sides are the same.
    Holds a few boxes of 16 MiB in memory; a chunk that another program made larger, and without a grid, is one box.
    Raises UserError for a tolerance below 0 and a pattern that no name matches, CorruptError for damage in what it
    reads.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance {tolerance}: expected a number from 0 on")
    names = matching(select, {**a.arrays, **b.arrays}, f"{a.where} and {b.where}")
    differing: dict[str, ArrayDiff] = {}
    work: list[tuple[str, Box]] = []
    skipped = done = 0
    for name in names:
        found = _described(a, b, name)
        if None in found.shapes or found.shapes[0] != found.shapes[1]:
            differing[name] = found
            continue
        if tolerance is None and found.dtypes[0] != found.dtypes[1]:
            differing[name] = found
        boxes, same_bytes = _boxes(a, b, name, full)
        work += [(name, box) for box in boxes]
        skipped += same_bytes
    nbytes_of = {name: a.arrays[name].dtype.itemsize + b.arrays[name].dtype.itemsize for name, _ in work}
    total = sum(math.prod(shape) * nbytes_of[name] for name, (_, shape) in work)

    def compare(at: tuple[str, Box]) -> _Difference:
        name, (start, shape) = at
        index = slices(start, shape, (0,) * len(start))
        x, y = a.read(name, index), b.read(name, index)
        return _compare(x, y, start, tolerance)

    for (name, (_, shape)), difference in zip(work, in_order(compare, work), strict=True):
        if difference.different:
            differing[name] = _with(differing.get(name) or _described(a, b, name), difference)
        done += math.prod(shape) * nbytes_of[name]
        if progress:
            progress(done, total)
    found_differing = tuple(differing[name] for name in names if name in differing)
    return DiffReport(a.where, b.where, found_differing, len(names), done, skipped)


def _described(a: Source, b: Source, name: str) -> ArrayDiff:
    """Before any element is compared."""
    one, two = a.arrays.get(name), b.arrays.get(name)
    return ArrayDiff(
        name,
        (one.shape if one else None, two.shape if two else None),
        (one.dtype.name if one else None, two.dtype.name if two else None),
    )


def _boxes(a: Source, b: Source, name: str, full: bool) -> tuple[list[Box], int]:
    """Boxes of an array that are to be compared, and the bytes of those that need not be."""
    array = a.arrays[name]
    native = [x.reader for x in (a, b) if isinstance(x, CheckpointSource)]
    if not native:
        return list(split(array.shape, 8, CHUNK_BYTES)), 0
    twins = native[1] if not full and len(native) == 2 and b.arrays[name].dtype == array.dtype else None
    boxes: list[Box] = []
    skipped = 0
    for chunk in native[0].array(name).chunks:
        if twins is not None and twins.twin(name, chunk) is not None:
            skipped += chunk.nbytes
        elif chunk.grid is None:  # is read whole, however little of it is wanted
            boxes.append((chunk.start, chunk.shape))
        else:
            for start, shape in split(chunk.shape, native[0].array(name).dtype.itemsize, CHUNK_BYTES):
                boxes.append((tuple(i + j for i, j in zip(chunk.start, start, strict=True)), shape))
    return boxes, skipped


@dataclasses.dataclass(frozen=True)
class _Difference:
    """Of two boxes; the members are as in ``ArrayDiff``."""

    different: int = 0
    nans: int = 0
    largest_difference: float = 0.0
    largest_relative: float = 0.0
    where: tuple[int, ...] | None = None


def _with(array: ArrayDiff, more: _Difference) -> ArrayDiff:
    """The first of several largest differences stays."""
    larger = array.where is None or more.largest_difference > array.largest_difference
    return dataclasses.replace(
        array,
        different=array.different + more.different,
        nans=array.nans + more.nans,
        largest_difference=max(array.largest_difference, more.largest_difference),
        largest_relative=max(array.largest_relative, more.largest_relative),
        where=more.where if larger else array.where,
    )


def _compare(x: np.ndarray, y: np.ndarray, start: tuple[int, ...], tolerance: float | None) -> _Difference:
    """Two boxes of the same shape whose first element has the index ``start``."""
    total = ArrayDiff("", (None, None), (None, None))
    flat = x.reshape(-1), y.reshape(-1)
    for first in range(0, x.size, ELEMENTS):
        p, q = (side[first : first + ELEMENTS] for side in flat)
        if tolerance is None and p.dtype == q.dtype:
            unequal = np.flatnonzero(_bits_differ(p, q))
            u, v = _values(p[unequal], q[unequal])
        else:
            u, v = _values(p, q)
            nan = np.isnan(u) & np.isnan(v)
            near = _difference(u, v) <= tolerance * _larger(u, v) if tolerance else False
            unequal = np.flatnonzero(~((u == v) | nan | near))
            u, v = u[unequal], v[unequal]
        if len(unequal):
            one_nan = np.isnan(u) != np.isnan(v)
            difference, larger = _difference(u, v), _larger(u, v)
            with np.errstate(invalid="ignore", divide="ignore"):
                relative = np.where(difference == 0, 0.0, np.where(np.isinf(difference), np.inf, difference / larger))
            numbers = ~one_nan
            at = int(np.argmax(np.where(one_nan, -1.0, difference)))
            index = np.unravel_index(first + int(unequal[at]), x.shape)
            found = _Difference(
                len(unequal),
                int(one_nan.sum()),
                float(difference.max(where=numbers, initial=0.0)),
                float(relative.max(where=numbers, initial=0.0)),
                tuple(int(i) + s for i, s in zip(index, start, strict=True)),
            )
            total = _with(total, found)
    return _Difference(total.different, total.nans, total.largest_difference, total.largest_relative, total.where)


def _bits_differ(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which elements of two arrays of one dtype are not the same: of floats every bit counts, also of NaN and zero."""
    if not ("float" in x.dtype.name or "complex" in x.dtype.name):
        return x != y
    word = np.dtype(f"u{min(x.dtype.itemsize, 8)}")
    differ = x.view(word) != y.view(word)
    return differ.reshape(len(x), -1).any(axis=1)


def _values(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in one dtype that holds them: int64 or uint64, else complex128 or float64 (which rounds 64-bit integers)."""
    wide = {_wide(x.dtype), _wide(y.dtype)}
    common = wide.pop() if len(wide) == 1 else np.complex128 if np.complex128 in wide else np.float64
    return x.astype(common), y.astype(common)


def _wide(dtype: np.dtype) -> type:
    if "complex" in dtype.name:
        return np.complex128
    if "float" in dtype.name:
        return np.float64
    return np.uint64 if dtype == np.uint64 else np.int64


def _difference(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """|u - v| in float64; of integers it is exact before it is rounded. 0 where either is NaN."""
    if u.dtype.kind in "iu":
        # Modulo 2^64 the larger less the smaller is right, also where it does not fit into int64.
        return (np.maximum(u, v).view(np.uint64) - np.minimum(u, v).view(np.uint64)).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.where(u == v, 0.0, np.abs(u - v))
    found[np.isnan(found)] = np.inf  # infinities of which one is complex
    found[np.isnan(u) | np.isnan(v)] = 0.0
    return found


def _larger(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """max(|u|, |v|) in float64."""
    if u.dtype.kind in "iu":
        u, v = u.astype(np.float64), v.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.maximum(np.abs(u), np.abs(v))


def matching(patterns: Sequence[str], names: Iterable[str], where: str) -> list[str]:
    """The names, sorted, that match one of these patterns as a shell has them (``*`` goes over dots); all without any.

    Raises UserError, naming what is near, for a pattern that no name matches; ``where`` has the names.
    """
    known = sorted(names)
    return [name for name, met in matches(patterns, known, "select", where).items() if met] if patterns else known
