"""Reading a checkpoint: any box of any logical array, every chunk verified before it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from checkpoint.cells import DIGEST_BYTES, digests, runs, touched, unpack
from checkpoint.compression import decompress
from checkpoint.manifest import MANIFEST, Array, Chunk, CorruptError, Manifest, digest, without_advice
from checkpoint.storage import Files, MissingError, committed, files_of, place_of
from checkpoint.writer import Block
from parallelism.errors import UserError
from parallelism.layout import Logical

logger = logging.getLogger(__name__)

MENDED_BYTES = 1 << 30
"""Of chunks that were damaged so much is kept at most to mend them; the next save writes the rest again."""
WHOLE = 0.96  # from this share of a chunk's cells on it is read in one go
AGAIN = 3  # times that steps which are replaced meanwhile are listed anew

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each chunk."""

Part = tuple[int, int, Callable[[np.ndarray], bool] | None]
"""Bytes of a file from one place to another; where they are at hand, what fills memory with them (False: it failed)."""

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


def worth_reading(chunk: Chunk, boxes: Sequence[tuple[slice, ...]]) -> np.ndarray | None:
    """The cells of a chunk that these boxes of it meet; None where reading it whole is as good, or the only way."""
    if chunk.grid is None or chunk.zstd is not None:
        return None
    if sum(math.prod([s.stop - s.start for s in box]) for box in boxes) > WHOLE * math.prod(chunk.shape):
        return None
    cells = touched(boxes, chunk.shape, chunk.grid)
    return None if len(cells) > WHOLE * math.prod(chunk.grid) else cells


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

    others: of the same step elsewhere; a chunk that is damaged here is read there, if one has it with the same digest.
    step: the one that it should be, where that is known: the manifest of another is damage. manifest: of chunks that
    are not committed; read from the files if not given. bytes_read: bytes of chunks read so far, here. mended: the
    chunks that were damaged here, with what they should be. at_hand: divides a range of a file into what is at hand
    and what is to be read.
    Opening raises CorruptError if the manifest is missing or damaged, UserError if it is newer than this program.
    """

    def __init__(
        self,
        files: Files,
        others: Sequence[CheckpointReader] = (),
        step: int | None = None,
        manifest: Manifest | None = None,
    ):
        self.where = files.where
        self.bytes_read = 0
        self.mended: list[tuple[Chunk, np.ndarray]] = []
        self.at_hand: Callable[[str, int, int], Iterable[Part]] | None = None
        self._files, self._others = files, others
        self._lock = threading.Lock()
        self.manifest = manifest or Manifest.decode(files.read(MANIFEST), f"{files.where}/{MANIFEST}")
        if step not in (None, self.manifest.step):
            raise CorruptError(f"{self.where} holds step {self.manifest.step}, expected {step}; use another step")

    @functools.cached_property
    def _boxes(self) -> dict[tuple[str, tuple[int, ...], tuple[int, ...]], Chunk]:
        return {(name, c.start, c.shape): c for name, array in self.manifest.arrays.items() for c in array.chunks}

    @property
    def read_by_place(self) -> dict[str, int]:
        """Bytes of chunks read so far, here and elsewhere."""
        return {reader.where: reader.bytes_read for reader in (self, *self._others) if reader.bytes_read}

    def array(self, name: str) -> Array:
        try:
            return self.manifest.arrays[name]
        except KeyError:
            names = sorted(self.manifest.arrays)
            raise UserError(f"{self.where} holds no array {name!r}; it holds {len(names)}: {names[:3]}...") from None

    def read_chunk(
        self, name: str, chunk: Chunk, cells: np.ndarray | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """The box of one chunk; given ``cells`` (sorted numbers), the rest is left undefined.

        memory: [at least ``whole_bytes``] uint8, aligned, of which the result may be a view; else it is of its own.
        Raises CorruptError naming the array and the file, if no other has the chunk either.
        """
        raw = self.read_packed(name, chunk, cells, memory)
        return unpack(raw, chunk.shape, self.array(name).dtype, chunk.grid or (1,) * len(chunk.shape))

    def read_packed(
        self, name: str, chunk: Chunk, cells: np.ndarray | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """``read_chunk`` in the order of the file, [nbytes] uint8 (``checkpoint.cells``)."""
        return self._stored(name, chunk, cells, memory)[: chunk.nbytes]

    def block(self, logical: Logical, chunk: Chunk, memory: np.ndarray | None = None) -> Block:
        """A chunk as another file is to have it. memory, and what is raised: as for ``read_chunk``."""
        raw = self._stored(logical.name, chunk, None, memory)
        grid = chunk.grid or (1,) * len(chunk.shape)
        return Block(logical, chunk.start, chunk.shape, grid, raw[: chunk.nbytes], raw[chunk.nbytes :].tobytes())

    def room(self, chunks: Iterable[Chunk]) -> np.ndarray:
        """Memory for any of these chunks."""
        return np.empty(max((chunk.whole_bytes for chunk in chunks), default=0), np.uint8)

    def _stored(
        self, name: str, chunk: Chunk, cells: np.ndarray | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """A chunk and its table, [whole_bytes] uint8, verified: here, or at another place of the step."""
        raw = np.empty(chunk.whole_bytes, np.uint8) if memory is None else memory[: chunk.whole_bytes]
        try:
            return self._verified(name, chunk, cells, raw)
        except CorruptError as damage:
            for other in self._others:
                if (twin := other.twin(name, chunk)) is not None:
                    with contextlib.suppress(CorruptError):
                        raw = other._verified(name, twin, None, np.empty(chunk.whole_bytes, np.uint8))
                        with self._lock:
                            first = all(chunk.file != before.file for before, _ in self.mended)
                            if sum(len(kept) for _, kept in self.mended) + len(raw) <= MENDED_BYTES:
                                self.mended.append((chunk, raw))
                        if first:  # of a file that is lost there would be a line a chunk
                            logger.warning("%s; it is read from %s", without_advice(str(damage)), other.where)
                        return raw
            raise

    def twin(self, name: str, chunk: Chunk) -> Chunk | None:
        """The chunk here that has the bytes of ``chunk``, of the same box of array ``name`` elsewhere; None without."""
        own = self._boxes.get((name, chunk.start, chunk.shape))
        return own if own is not None and (own.digest, own.grid) == (chunk.digest, chunk.grid) else None

    def stored(self, name: str, chunk: Chunk) -> np.ndarray:
        """What the file here has of a chunk, [stored_bytes] uint8, verified: a frame as such, if it is compressed."""
        if chunk.zstd is None:
            return self.whole(name, chunk)
        frame = np.empty(chunk.stored_bytes, np.uint8)
        self._read(name, chunk, 0, frame)
        self._check(name, chunk, 0, chunk.stored_bytes, digest(frame.data), chunk.zstd[1])
        return frame

    def whole(self, name: str, chunk: Chunk) -> np.ndarray:
        """A chunk here and its table, [whole_bytes] uint8, verified."""
        return self._verified(name, chunk, None, np.empty(chunk.whole_bytes, np.uint8))

    def damage(self, name: str, chunk: Chunk, memory: np.ndarray | None = None) -> str | None:
        """What is wrong with a chunk here; None if it is good. memory: as for ``read_chunk``."""
        raw = np.empty(chunk.whole_bytes, np.uint8) if memory is None else memory[: chunk.whole_bytes]
        try:
            self._verified(name, chunk, None, raw)
        except CorruptError as e:
            return str(e)
        return None

    def _verified(self, name: str, chunk: Chunk, cells: np.ndarray | None, raw: np.ndarray) -> np.ndarray:
        """``raw`` with the chunk's bytes in it, the table too; of cells these only. Raises CorruptError."""
        if chunk.zstd is not None:
            frame, cells = self.stored(name, chunk), None
            if wrong := decompress(frame, raw):
                raise CorruptError(f"array {name!r}: a chunk of {self.where} is no zstd frame of its size: {wrong}")
        elif chunk.grid is None:
            self._read(name, chunk, 0, raw)
        if chunk.grid is None:
            self._check(name, chunk, 0, chunk.nbytes, digest(raw.data), chunk.digest)
            return raw
        count = math.prod(chunk.grid)
        cell, table = chunk.nbytes // count, raw[chunk.nbytes :]
        spans = [(0, count)] if cells is None else runs(cells)
        if cells is None and chunk.zstd is None:
            self._read(name, chunk, 0, raw)
        elif cells is not None:
            self._read(name, chunk, chunk.nbytes, table)
            for first, last in spans:
                self._read(name, chunk, first * cell, raw[first * cell : last * cell])
        self._check(name, chunk, chunk.nbytes, chunk.whole_bytes, digest(table.data), chunk.digest)
        for first, last in spans:
            found = digests(raw[first * cell : last * cell], (last - first,))
            if found != (expected := table[first * DIGEST_BYTES : last * DIGEST_BYTES].tobytes()):
                at = next(at for at in range(0, len(found), DIGEST_BYTES) if found[at:][:16] != expected[at:][:16])
                bad = first + at // DIGEST_BYTES
                self._check(name, chunk, bad * cell, (bad + 1) * cell, found[at:][:16].hex(), expected[at:][:16].hex())
        return raw

    def _read(self, name: str, chunk: Chunk, offset: int, raw: np.ndarray) -> None:
        """Fill ``raw`` with bytes of a chunk from ``offset`` within it on."""
        begin = chunk.offset + offset
        whole: list[Part] = [(begin, begin + len(raw), None)]
        try:
            for start, stop, fill in self.at_hand(chunk.file, *whole[0][:2]) if self.at_hand is not None else whole:
                part = raw[start - begin : stop - begin]
                if fill is None or not fill(part):
                    self.fetch(chunk.file, start, part)
        except CorruptError as e:
            raise CorruptError(f"array {name!r}: {e}") from None
        except OSError as e:
            why = e.strerror or e
            raise CorruptError(
                f"array {name!r}: cannot read {self.where}/{chunk.file}: {why}; use another checkpoint"
            ) from e

    def fetch(self, file: str, start: int, raw: np.ndarray) -> None:
        """Fill ``raw`` with the bytes of a file from ``start`` on, as they are. Raises CorruptError, OSError."""
        self._files.read_into(file, start, raw.data)
        with self._lock:
            self.bytes_read += len(raw)

    def _check(self, name: str, chunk: Chunk, start: int, stop: int, found: str, expected: str) -> None:
        if found != expected:
            raise CorruptError(
                f"array {name!r}: bytes {chunk.offset + start} to {chunk.offset + stop} of {self.where}/{chunk.file} "
                f"are damaged: digest {found}, expected {expected}; use another checkpoint"
            )

    def read(self, name: str, box: Sequence[slice] | None = None) -> np.ndarray:
        """A logical array, or a box of it (one slice of step 1 a dimension), in the dtype of the checkpoint.

        Raises UserError for a name that it does not hold and a box that is not inside, CorruptError on damage.
        """
        array = self.array(name)
        box = [slice(None)] * len(array.shape) if box is None else box
        if not isinstance(box, Sequence) or not all(isinstance(s, slice) for s in box):
            raise UserError(
                f"{self.where}: the box {box!r} of array {name!r}: expected a slice for each dimension, such as "
                "slice(0, 1) for 0"
            )
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
                inner = slices(*shared, chunk.start)
                out[slices(*shared, start)] = self.read_chunk(name, chunk, worth_reading(chunk, [inner]))[inner]
        return out

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every chunk and compare digests; damage is reported, not raised."""
        total, done, errors, count = self.manifest.nbytes, 0, [], 0
        memory = self.room(chunk for array in self.manifest.arrays.values() for chunk in array.chunks)
        for name, array in self.manifest.arrays.items():
            for chunk in array.chunks:
                try:
                    self._stored(name, chunk, None, memory)
                except CorruptError as e:
                    errors.append(str(e))
                count += 1
                done += chunk.nbytes
                if progress:
                    progress(done, total)
        return VerifyReport(self.where, self.manifest.step, count, total, tuple(errors))


def open_checkpoint(place: str | os.PathLike[str]) -> CheckpointReader:
    """Open one checkpoint: the directory, or the URL in an object store, that holds ``manifest.json``."""
    try:
        return _open_existing(place)
    except MissingError:
        raise UserError(
            f"{place} is not a checkpoint: it holds no {MANIFEST}; give a checkpoint or step directory"
        ) from None


def find_checkpoint(place: str | os.PathLike[str], progress: Progress | None = None) -> Path | str:
    """The checkpoint that a directory or URL means: itself, or under a run's checkpoint root the newest that verifies.

    One that is named itself is checked for a readable manifest only: its chunks are verified as they are read.
    Where none verifies and a run has replaced them meanwhile, those that it has now are looked at, up to AGAIN times.
    """
    place = place_of(place)
    with contextlib.suppress(MissingError):
        _open_existing(place)
        return place
    found = committed(place)
    for _ in range(1 + AGAIN):
        for step, candidate in reversed(found):
            try:
                report = CheckpointReader(files_of(candidate), step=step).verify(progress)
            except CorruptError as e:
                logger.warning("skipping checkpoint %s: %s", candidate, e)
                continue
            if report.ok:
                return candidate
            logger.warning("skipping checkpoint %s: %s", candidate, report.errors[0])
        before, found = found, committed(place)
        if found == before:
            break
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {place} verifies; restore them from elsewhere")
    raise UserError(f"{place} is not a checkpoint: no {MANIFEST} and no step-* directories; check the path")


def _open_existing(place: str | os.PathLike[str]) -> CheckpointReader:
    """Raises MissingError if there is no manifest, UserError if there is not even a directory."""
    place = place_of(place)
    if isinstance(place, Path) and not place.exists():
        raise UserError(f"checkpoint {place} does not exist; check the path")
    return CheckpointReader(files_of(place))
