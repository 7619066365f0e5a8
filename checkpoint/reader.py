"""Reading a checkpoint: any box of any logical array, every chunk verified before it is used."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from checkpoint.manifest import MANIFEST, Array, Chunk, CorruptError, Manifest, digest
from checkpoint.storage import Files, LocalFiles, committed
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each chunk."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape) in elements, one int a dimension."""


def intersect(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, or None if it is empty."""
    start = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    stop = (min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
    return (start, shape) if all(n > 0 for n in shape) else None


def slices(start: tuple[int, ...], shape: tuple[int, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of the box (start, shape) in an array whose first element is at ``origin``."""
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(start, shape, origin, strict=True))


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What verification found: one line for each bad chunk in ``errors``."""

    where: str
    step: int | None
    chunks: int
    nbytes: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors


class CheckpointReader:
    """A committed checkpoint. Safe to use from several threads.

    manifest: what it holds. bytes_read: bytes of chunks read so far.
    Opening raises CorruptError if the manifest is missing or damaged, UserError if it is newer than this program.
    """

    def __init__(self, files: Files):
        self.where = files.where
        self.bytes_read = 0
        self._files = files
        self._lock = threading.Lock()
        self.manifest = Manifest.decode(files.read(MANIFEST), f"{files.where}/{MANIFEST}")

    def array(self, name: str) -> Array:
        try:
            return self.manifest.arrays[name]
        except KeyError:
            names = sorted(self.manifest.arrays)
            raise UserError(f"{self.where} holds no array {name!r}; it holds {len(names)}: {names[:3]}...") from None

    def read_chunk(self, name: str, chunk: Chunk) -> np.ndarray:
        """The box of one chunk, in an array of its own. Raises CorruptError naming the array and the file."""
        raw = np.empty(chunk.nbytes, np.uint8)
        try:
            self._files.read_into(chunk.file, chunk.offset, raw.data)
        except CorruptError as e:
            raise CorruptError(f"array {name!r}: {e}") from None
        except OSError as e:
            raise CorruptError(f"array {name!r}: cannot read {self.where}/{chunk.file}: {e.strerror}") from e
        with self._lock:
            self.bytes_read += chunk.nbytes
        found = digest(raw.data)
        if found != chunk.digest:
            raise CorruptError(
                f"array {name!r}: bytes {chunk.offset} to {chunk.offset + chunk.nbytes} of {self.where}/{chunk.file} "
                f"are damaged: digest {found}, expected {chunk.digest}; use another checkpoint"
            )
        return raw.view(self.array(name).dtype).reshape(chunk.shape)

    def read(self, name: str, box: Sequence[slice] | None = None) -> np.ndarray:
        """A logical array, or a box of it (one slice of step 1 a dimension), in the dtype of the checkpoint.

        Raises UserError for a name that it does not hold and a box that is not inside, CorruptError on damage.
        """
        array = self.array(name)
        box = [slice(None)] * len(array.shape) if box is None else box
        bounds = [(s.start or 0, n if s.stop is None else s.stop) for s, n in zip(box, array.shape, strict=False)]
        inside = all(0 <= lo <= hi <= n for (lo, hi), n in zip(bounds, array.shape, strict=False))
        if len(box) != len(array.shape) or not inside or any(s.step not in (None, 1) for s in box):
            asked = ", ".join(f"{s.start}:{s.stop}" + (f":{s.step}" if s.step else "") for s in box)
            raise UserError(
                f"{self.where}: the box [{asked}] is not inside array {name!r} of shape {array.shape}; "
                "give a start and a stop in each dimension"
            )
        start = tuple(lo for lo, _ in bounds)
        wanted: Box = start, tuple(hi - lo for lo, hi in bounds)
        out = np.empty(wanted[1], array.dtype)
        for chunk in array.chunks:
            shared = intersect(wanted, (chunk.start, chunk.shape))
            if shared is not None:
                out[slices(*shared, start)] = self.read_chunk(name, chunk)[slices(*shared, chunk.start)]
        return out

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every chunk and compare digests; damage is reported, not raised."""
        total, done, errors, count = self.manifest.nbytes, 0, [], 0
        for name, array in self.manifest.arrays.items():
            for chunk in array.chunks:
                try:
                    self.read_chunk(name, chunk)
                except CorruptError as e:
                    errors.append(str(e))
                count += 1
                done += chunk.nbytes
                if progress:
                    progress(done, total)
        return VerifyReport(self.where, self.manifest.step, count, total, tuple(errors))


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointReader:
    """Open one checkpoint directory (the one that holds ``manifest.json``)."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; check the path")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a checkpoint: it holds no {MANIFEST}; give a checkpoint or step directory")
    return CheckpointReader(LocalFiles(path))


def find_checkpoint(path: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The checkpoint directory that ``path`` means: itself, or under a run's checkpoint root the newest that verifies.

    A directory named itself is checked for a readable manifest only: its chunks are verified as they are read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; check the path")
    if (path / MANIFEST).is_file():
        open_checkpoint(path)
        return path
    found = committed(path)
    for _, candidate in reversed(found):
        try:
            report = CheckpointReader(LocalFiles(candidate)).verify(progress)
        except CorruptError as e:
            logger.warning("skipping checkpoint %s: %s", candidate, e)
            continue
        if report.ok:
            return candidate
        logger.warning("skipping checkpoint %s: %s", candidate, report.errors[0])
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {path} verifies; restore them from elsewhere")
    raise UserError(f"{path} is not a checkpoint: no {MANIFEST} and no step-* directories; check the path")
