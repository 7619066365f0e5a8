"""Steps from one place to another, chunk by chunk as they are: what they share stays shared."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from checkpoint.ahead import in_order
from checkpoint.collect import collect_locked
from checkpoint.inspect import FileName, list_steps
from checkpoint.levels import IN_USE
from checkpoint.manifest import MANIFEST, Chunk, CorruptError, Manifest, called, digest, resolved
from checkpoint.places import Place, same_place, used_bytes
from checkpoint.reader import CheckpointReader, Progress
from checkpoint.storage import Store, directory_of
from checkpoint.writer import data_file
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

FILE_BYTES = 64 << 20
"""Of a chunk file, about: an interruption loses that much at most."""

Key = tuple[str, tuple[int, ...], tuple[int, ...], str, "tuple[int, ...] | None"]
"""Array, start, shape, digest and grid of a chunk: where they are the same, so are its bytes."""


def _key(name: str, chunk: Chunk) -> Key:
    return name, chunk.start, chunk.shape, chunk.digest, chunk.grid


@dataclasses.dataclass(frozen=True)
class Copied:
    """steps: what the target has now, whole and verified. nbytes: of chunks, written; kept_bytes: of those that were
    there already. damaged: by place, why a step was not copied."""

    steps: tuple[int, ...]
    nbytes: int
    kept_bytes: int
    damaged: Mapping[str, str]


def copy_steps(source: Place, target: Store, every: bool = False, progress: Progress | None = None) -> Copied:
    """Copy the newest good step, or every good one, into a root of checkpoints, whose only writer this is.

    Bytes are verified as they are read, and again as they were written; then the manifest is put. What the target has
    already and verifies is not written again, be it of another step or of a copy that was interrupted.
    A damaged step is logged, and the one before it taken; one that is named itself raises CorruptError.
    Raises UserError if no step is good, the target is the source, or it has another checkpoint of a step.
    """
    if same_place(source.store, target):
        raise UserError(f"{target.where} is where these checkpoints are already; give another directory")
    directories = source.some_directories()
    done: list[int] = []
    damaged: dict[str, str] = {}
    with Place(target).writing():
        copier = _Copier(target, progress, sum(sum(info.files.values()) for info in list_steps(source)) if every else 0)
        for directory in directories if every else reversed(directories):
            try:
                reader = source.open(directory)
                copier.copy(directory, reader)
            except CorruptError as e:
                if source.only:
                    raise
                damaged[directory] = str(e)
                logger.warning("not copied: %s", e)
                continue
            done.append(reader.manifest.step)
            if not every:
                break
        if done:
            collect_locked(target)  # what is left of copies that were interrupted, or met damage
    if not done:
        raise UserError(f"none of the {len(damaged)} steps in {source.where} is good; restore one from elsewhere")
    return Copied(tuple(done), copier.nbytes, copier.kept_bytes, damaged)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A chunk of the array ``name``, and the file in which the target has it, or is to have it."""

    name: str
    chunk: Chunk
    file: FileName


class _Copier:
    """Copies steps into a store, in which nobody else writes. total: bytes of all chunks to come; 0: of each step."""

    def __init__(self, target: Store, progress: Progress | None, total: int):
        self.nbytes = self.kept_bytes = 0
        self._target, self._progress, self._total, self._done = target, progress, total, 0
        self._manifests = {}
        self._known: dict[Key, _Part] = {}
        for directory in Place(target).directories():
            try:
                manifest = Place(target).open(directory).manifest
            except CorruptError as e:
                logger.warning("passed over: %s", e)
                continue
            self._manifests[directory] = manifest
            used = used_bytes(manifest, directory)
            enough = {file for file, nbytes in used.items() if nbytes >= IN_USE * self._size(file)}
            places = _places(manifest, directory)
            self._known.update((key, part) for key, part in places.items() if part.file in enough)

    def _size(self, file: FileName) -> float:
        try:
            return self._target.open(file[0]).size(file[1])
        except CorruptError:
            return float("inf")

    def copy(self, directory: str, reader: CheckpointReader) -> None:
        manifest = reader.manifest
        into, there = directory_of(manifest.step), None
        if into in self._manifests and _content(there := self._manifests[into]) != _content(manifest):
            raise UserError(f"{self._target.where} has another step {manifest.step}; give another directory")
        own = _places(there, into) if there is not None else {}
        chunks = [(name, chunk) for name, array in manifest.arrays.items() for chunk in array.chunks]
        total = self._total or self._done + sum(chunk.stored_bytes for _, chunk in chunks)

        def tell(nbytes: int) -> None:
            self._done += nbytes
            if self._progress:
                self._progress(self._done, total)

        def find(at: tuple[str, Chunk]) -> _Part | None:
            """Where the target has a chunk already, and good."""
            parts = [known[key] for known in (own, self._known) if (key := _key(*at)) in known]
            return next((part for part in parts if self._good(manifest, part)), None)

        places: dict[Key, _Part] = {}
        missing: list[tuple[str, Chunk]] = []
        for (name, chunk), part in zip(chunks, in_order(find, chunks), strict=True):
            if part is None:
                missing.append((name, chunk))
            else:
                places[_key(name, chunk)] = part
                self.kept_bytes += chunk.stored_bytes
                tell(chunk.stored_bytes)
        for sources, parts in _new_files(into, missing, min(FILE_BYTES, self._target.file_bytes or FILE_BYTES)):
            for nbytes in self._write(reader, sources, parts):
                tell(nbytes)
            places.update((_key(part.name, part.chunk), part) for part in parts)
        copied = _moved(manifest, places, into)
        if there != copied:
            self._target.put(into, MANIFEST, copied.encode())
        self._manifests[into] = copied
        self._known.update(places)

    def _good(self, manifest: Manifest, part: _Part) -> bool:
        """Whether the target has the bytes of a chunk where they are to be."""
        reader = CheckpointReader(self._target.open(part.file[0]), manifest=manifest)
        return reader.damage(part.name, dataclasses.replace(part.chunk, file=part.file[1])) is None

    def _write(self, reader: CheckpointReader, sources: list[Chunk], parts: list[_Part]) -> Iterator[int]:
        """Writes one file, unless it is there and good; yields bytes done. Raises CorruptError for a bad source."""
        directory, name = parts[0].file
        nbytes = sum(chunk.stored_bytes for chunk in sources)
        if name in self._target.names().get(directory, ()):
            if self._all_good(reader.manifest, parts):
                self.kept_bytes += nbytes
                yield nbytes
                return
            self._target.delete(directory, [name])
        named = [(part.name, chunk) for part, chunk in zip(parts, sources, strict=True)]
        with self._target.create(directory, name) as out:
            for raw in in_order(lambda at: reader.stored(*at), named):
                out.write(raw.data)
                yield len(raw)
        self.nbytes += nbytes
        if not self._all_good(reader.manifest, parts):
            raise UserError(f"{self._target.where}/{directory}/{name} is not what was written; check the disk")

    def _all_good(self, manifest: Manifest, parts: list[_Part]) -> bool:
        return all(in_order(lambda part: self._good(manifest, part), parts))


def _content(manifest: Manifest) -> Any:
    """What a checkpoint says, wherever its bytes are."""
    arrays = {
        name: (array.dtype, array.shape, array.axes, {_key(name, chunk) for chunk in array.chunks})
        for name, array in manifest.arrays.items()
    }
    return manifest.step, manifest.meta, arrays


def _places(manifest: Manifest, directory: str) -> dict[Key, _Part]:
    return {
        _key(name, chunk): _Part(name, chunk, resolved(directory, chunk.file))
        for name, array in manifest.arrays.items()
        for chunk in array.chunks
    }


def _new_files(
    directory: str, chunks: list[tuple[str, Chunk]], nbytes: int
) -> Iterator[tuple[list[Chunk], list[_Part]]]:
    """Chunks of the source in files of about ``nbytes``, and what they are there.

    A file is named after what is in it: so a copy that was interrupted finds those that it had written.
    """
    groups: list[list[tuple[str, Chunk]]] = []
    room = 0
    for name, chunk in chunks:
        if not groups or chunk.stored_bytes > room:
            groups.append([])
            room = nbytes
        groups[-1].append((name, chunk))
        room -= chunk.stored_bytes
    for number, group in enumerate(groups):
        file = data_file(number, digest("".join(chunk.digest for _, chunk in group).encode())[:16])
        parts: list[_Part] = []
        offset = 0
        for name, chunk in group:
            parts.append(_Part(name, dataclasses.replace(chunk, offset=offset), (directory, file)))
            offset += chunk.stored_bytes
        yield [chunk for _, chunk in group], parts


def _moved(manifest: Manifest, places: Mapping[Key, _Part], directory: str) -> Manifest:
    """The manifest of a step in ``directory`` whose chunks lie elsewhere."""

    def moved(name: str, chunk: Chunk) -> Chunk:
        part = places[_key(name, chunk)]
        return dataclasses.replace(part.chunk, file=called(directory, *part.file))

    arrays = {
        name: dataclasses.replace(array, chunks=tuple(moved(name, chunk) for chunk in array.chunks))
        for name, array in manifest.arrays.items()
    }
    return Manifest(manifest.step, manifest.meta, arrays)
