"""Tensors of files as arrays of a conversion: for formats that lay tensors one after the other in row-major order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoint.conversion import boxes
from parallelism.errors import UserError
from parallelism.layout import Logical


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor ``name`` of ``shape`` in a file: a reshape of an array, or of its slice ``number`` along the first axis.

    array: as it was chosen, in the dtype that the file's is made from.
    """

    name: str
    shape: tuple[int, ...]
    array: Logical
    number: int | None = None

    def boxes(self, rows: bool = False) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The (start, shape) in the array of parts of the tensor, one after the other as its bytes are.

        rows: cut along the tensor's first axis only.
        """
        itemsize = self.array.dtype.itemsize
        if self.number is None:
            yield from boxes(self.array.shape, itemsize, rows)
            return
        for start, shape in boxes(self.array.shape[1:], itemsize, rows):
            yield (self.number, *start), (1, *shape)


def plain(arrays: Iterable[Logical]) -> list[Tensor]:
    """Each array as a tensor of its name."""
    return [Tensor(array.name, array.shape, array) for array in arrays]


class Files(Protocol):
    """Opened files that hold arrays by name: the directories of ``checkpoint.formats``."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str, /) -> Any:
        """What has the ``shape`` and ``dtype`` of an array."""

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray: ...


class FilesSource:
    """Opened files as a source, by the names in them. They have no digests.

    identity, step, meta: as ``Source`` has them. axes: of the arrays, where somebody has written them down.
    """

    verified = False

    def __init__(
        self,
        files: Files,
        where: str,
        identity: Any,
        step: int = 0,
        meta: Mapping[str, Any] | None = None,
        axes: Mapping[str, Sequence[str | None]] | None = None,
    ):
        self._files, self.where, self.identity, self.step = files, where, identity, step
        self.meta: Mapping[str, Any] = meta or {}
        arrays = {}
        for name in files:
            shape = tuple(files[name].shape)
            own = tuple((axes or {}).get(name) or (None,) * len(shape))
            if len(own) != len(shape):
                raise UserError(f"{where}: array {name!r} has axes {own}, but shape {shape}; fetch it again")
            arrays[name] = Logical(name, shape, files[name].dtype, own)
        self.arrays: Mapping[str, Logical] = arrays

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        return self._files.read(name, box)


def identity_of(files: Iterable[str | os.PathLike[str]]) -> Any:
    """JSON that changes with files: their names, sizes and times of modification."""
    stats = [(Path(file).name, Path(file).stat()) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
