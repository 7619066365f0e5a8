"""What lies in a place: its steps with what they take, and whether every chunk is what was written."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from checkpoint.ahead import in_order
from checkpoint.manifest import MANIFEST, Chunk, CorruptError, Manifest, resolved, without_advice
from checkpoint.places import Place, committed_directories, used_bytes
from checkpoint.reader import CheckpointReader, Progress
from checkpoint.storage import Store
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

FileName = tuple[str, str]
"""The directory and the name of a file in a store."""


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """A committed step, as far as its manifest and the sizes of its files tell.

    written: when its manifest was, in seconds since the epoch. version: of the format. nbytes: of its arrays.
    own_bytes: of files that no other step uses, which go with it. shared_bytes: its chunks in files that others use.
    files: bytes that its chunks take in each file. error: what is wrong with it; None if nothing is.
    foreign: it may be good, but this program cannot read it.
    """

    directory: str
    where: str
    step: int | None
    written: float | None
    version: int | None
    arrays: int
    nbytes: int
    own_bytes: int
    shared_bytes: int
    files: Mapping[FileName, int]
    error: str | None
    foreign: bool = False

    def to_json(self) -> dict[str, Any]:
        left_out = ("directory", "files", "foreign")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}


def list_steps(place: Place) -> list[StepInfo]:
    """The committed steps that a place means, ascending. No chunk is read: see ``verify``."""
    beside = committed_directories(place.store)
    found = [_info(place, name) for name in (beside if place.only is None or place.only in beside else [place.only])]
    users = Counter(file for info in found for file in info.files)
    sizes = _Sizes(place.store)
    chosen = []
    for info in found:
        if place.only in (None, info.directory):
            own = [file for file in info.files if users[file] == 1]
            own_bytes = sum(sizes[file] or 0 for file in [*own, (info.directory, MANIFEST)])
            shared = sum(nbytes for file, nbytes in info.files.items() if users[file] > 1)
            chosen.append(dataclasses.replace(info, own_bytes=own_bytes, shared_bytes=shared))
    return chosen


class _Sizes(dict[FileName, "int | None"]):
    """Bytes of files of a store, each asked for once; None for one that is missing."""

    def __init__(self, store: Store):
        super().__init__()
        self._store = store

    def __missing__(self, file: FileName) -> int | None:
        directory, name = file
        try:
            self[file] = self._store.open(directory).size(name)
        except CorruptError:
            self[file] = None
        return self[file]


def _info(place: Place, directory: str) -> StepInfo:
    """Without what depends on other steps."""
    files = place.store.open(directory)
    number = directory.removeprefix("step-")
    step = int(number) if number.isdecimal() else None
    info = StepInfo(directory, files.where, step, files.written(MANIFEST), None, 0, 0, 0, 0, {}, None)
    try:
        manifest = place.open(directory).manifest
    except UserError as e:
        return dataclasses.replace(info, error=str(e), foreign=not isinstance(e, CorruptError))
    return dataclasses.replace(
        info,
        step=manifest.step,
        version=json.loads(files.read(MANIFEST))["version"],
        arrays=len(manifest.arrays),
        nbytes=manifest.nbytes,
        files=used_bytes(manifest, directory),
        error=_short(place.store, manifest, directory),
    )


def _short(store: Store, manifest: Manifest, directory: str) -> str | None:
    """Which file of a step is missing or too short for its chunks, if one is; nothing is read for it."""
    needed: dict[FileName, int] = {}
    for array in manifest.arrays.values():
        for chunk in array.chunks:
            file = resolved(directory, chunk.file)
            needed[file] = max(needed.get(file, 0), chunk.offset + chunk.stored_bytes)
    for (there, name), nbytes in needed.items():
        try:
            if (size := store.open(there).size(name)) < nbytes:
                return f"file {there}/{name} is truncated: {size} bytes, expected at least {nbytes}"
        except CorruptError:
            return f"file {there}/{name} is missing"
    return None


# -- every chunk


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is damaged: a chunk of an array, or the manifest (array None). mended_from: where its bytes came from."""

    array: str | None
    message: str
    mended_from: str | None = None


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What verification of a step found; chunks and nbytes (of arrays) are those of the whole step."""

    where: str
    step: int | None
    chunks: int
    nbytes: int
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether the step is good, now."""
        return all(damage.mended_from is not None for damage in self.damage)


Location = tuple[FileName, int, str, "tuple[int, ...] | None"]
"""File, offset, digest and grid: what chunks that several steps share have in common."""


def verify(
    place: Place, every: bool = False, repair: Sequence[Place] = (), progress: Progress | None = None
) -> list[StepReport]:
    """Read every chunk of the newest step, or of every one, and compare digests, in threads; each chunk once.

    repair: places with the same chunks, which are put where they are damaged; the writer's lock of ``place`` is taken
    for that. A damaged manifest cannot be mended, only written anew (``copy_steps``).
    Raises UserError if the place has no step, one is newer than this program, or a run is writing what is to be mended.
    """
    directories = place.some_directories()
    readers: dict[str, CheckpointReader] = {}
    lost: dict[str, str] = {}
    for directory in directories if every else directories[-1:]:
        try:
            readers[directory] = place.open(directory)
        except CorruptError as e:
            lost[directory] = str(e)
    found = _damaged(readers, progress)
    mended = _mend(place, readers, found, repair) if repair and found else {}
    reports = []
    for directory in sorted({**readers, **lost}, key=directories.index):
        if directory in lost:
            where = place.store.open(directory).where
            reports.append(StepReport(where, None, 0, 0, (Damage(None, lost[directory]),)))
            continue
        manifest = readers[directory].manifest
        keys = [(name, key) for name, _, key in _chunks(manifest, directory)]
        damage = tuple(_seen(name, found[key], mended.get(key)) for name, key in keys if key in found)
        reports.append(StepReport(readers[directory].where, manifest.step, len(keys), manifest.nbytes, damage))
    return reports


def _seen(name: str, message: str, mended_from: str | None) -> Damage:
    """What to do about it is said only where it still is."""
    return Damage(name, without_advice(message) if mended_from else message, mended_from)


def _chunks(manifest: Manifest, directory: str) -> Iterator[tuple[str, Chunk, Location]]:
    for name, array in manifest.arrays.items():
        for chunk in array.chunks:
            yield name, chunk, (resolved(directory, chunk.file), chunk.offset, chunk.digest, chunk.grid)


def _damaged(readers: Mapping[str, CheckpointReader], progress: Progress | None) -> dict[Location, str]:
    """What is wrong with each damaged chunk of these steps."""
    work: dict[Location, tuple[CheckpointReader, str, Chunk]] = {}
    for directory, reader in readers.items():
        for name, chunk, key in _chunks(reader.manifest, directory):
            work.setdefault(key, (reader, name, chunk))
    own = threading.local()  # of each thread, memory to read into

    def look(at: tuple[CheckpointReader, str, Chunk]) -> str | None:
        reader, name, chunk = at
        if len(getattr(own, "memory", ())) < chunk.whole_bytes:
            own.memory = np.empty(chunk.whole_bytes, np.uint8)
        return reader.damage(name, chunk, own.memory)

    total, done, found = sum(chunk.stored_bytes for _, _, chunk in work.values()), 0, {}
    for (key, (_, _, chunk)), message in zip(work.items(), in_order(look, work.values()), strict=True):
        if message is not None:
            found[key] = message
        done += chunk.stored_bytes
        if progress:
            progress(done, total)
    return found


def _mend(
    place: Place, readers: Mapping[str, CheckpointReader], damaged: Mapping[Location, str], repair: Sequence[Place]
) -> dict[Location, str]:
    """Put good bytes where chunks are damaged; returns from where, of those that are good now."""
    mended: dict[Location, str] = {}
    others = [reader for other in repair for reader in other.newest_first()]
    with place.writing():
        for directory, reader in readers.items():
            # The same step has most of the same chunks.
            nearest = sorted(others, key=lambda other: other.manifest.step != reader.manifest.step)
            for name, chunk, key in _chunks(reader.manifest, directory):
                if key in damaged and key not in mended:
                    source = _mend_chunk(place.store, directory, reader, name, chunk, nearest)
                    if source is not None:
                        mended[key] = source
    return mended


def _mend_chunk(
    store: Store,
    directory: str,
    reader: CheckpointReader,
    name: str,
    chunk: Chunk,
    others: Sequence[CheckpointReader],
) -> str | None:
    for other in others:
        # A frame is not made again: another zstd may make another.
        twin = other.twin(name, chunk)
        if twin is not None and (chunk.zstd is None or twin.zstd == chunk.zstd):
            try:
                raw = other.stored(name, twin) if twin.zstd == chunk.zstd else other.whole(name, twin)
            except CorruptError as e:
                logger.warning("%s", e)
                continue
            there, file = resolved(directory, chunk.file)
            store.patch(there, file, chunk.offset, raw.tobytes())
            if (still := reader.damage(name, chunk)) is None:
                return other.where
            logger.warning("not mended: %s", still)
    return None
