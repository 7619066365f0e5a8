"""What the header of any format must satisfy before it is used: a file may say anything."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

MAX_DIMENSIONS = 64  # numpy's
MAX_NAME_BYTES = 255  # of most file systems


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """What is known of an array before any of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Header = TypeVar("Header", bound=ArrayHeader)


class Headers(Mapping[str, Header]):
    """Arrays of files by name, as far as headers say; ``_arrays`` has them."""

    _arrays: dict[str, Header]

    def __getitem__(self, name: str) -> Header:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def bounded(name: str, shape: tuple[int, ...], box: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """``box`` (one slice of step 1 a dimension, as numpy understands them) with numbers in it; all, if None.

    Raises ValueError for a box of another rank or step.
    """
    box = (slice(None),) * len(shape) if box is None else box
    ranges = [s.indices(n) for s, n in zip(box, shape, strict=True)]
    if any(step != 1 for _, _, step in ranges):
        raise ValueError(f"array {name!r}: the box {box} has a step other than 1")
    return tuple(slice(start, max(start, stop)) for start, stop, _ in ranges)


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dictionary. Raises ValueError for a name given twice (json.loads takes it as a hook)."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} is there twice")
        found[name] = value
    return found


def check_shape(name: str, shape: Any, itemsize: int) -> None:
    """Raises ValueError unless ``shape`` is a sequence of sizes that an array can have, zeros too."""
    sizes = isinstance(shape, (list, tuple)) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not sizes or len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) * itemsize >= 2**63:
        raise ValueError(f"array {name!r} has the shape {shape!r:.80}")


def check_disjoint(ranges: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError if two of these byte ranges (start, stop) by array name share a byte."""
    filled = sorted((start, stop, name) for name, (start, stop) in ranges.items() if start < stop)
    for (_, stop, one), (start, _, other) in itertools.pairwise(filled):
        if start < stop:
            raise ValueError(f"arrays {one!r} and {other!r} overlap")


def is_file_name(name: Any) -> bool:
    """Whether ``name`` names a file in the directory that it is looked for in, and nowhere else, on any system."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
        return False
    return len(name.encode()) <= MAX_NAME_BYTES and not set(name) & set("/\\:")
