"""From any format to any other, in parts of bounded size: read, cast, written, read back.

A source gives boxes of logical arrays. A sink says beforehand which part of which file each box of its arrays becomes,
so parts can be made by several threads, and a conversion that was interrupted goes on after the last part that is
there. Parts are written in their order; the journal has the digest of each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoint.ahead import in_order
from checkpoint.manifest import CHUNK_BYTES, CorruptError, digest, split
from checkpoint.reader import slices
from checkpoint.reshard import narrow
from checkpoint.rules import Chosen
from checkpoint.storage import LocalDraft, refuse_existing, sole_writer, write_at
from parallelism.errors import UserError
from parallelism.layout import Logical

JOURNAL = ".journal"


class Source(Protocol):
    """Arrays by logical name, to be read by boxes, by several threads at once.

    where: names it in messages. step, meta: as a manifest has them. arrays: what it holds, in the order to write it.
    identity: JSON that is another when the bytes are. verified: whether each byte that is read is held against a
    digest.
    """

    where: str
    step: int
    meta: Mapping[str, Any]
    arrays: Mapping[str, Logical]
    identity: Any
    verified: bool

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """A box (a slice of step 1 a dimension) in the array's dtype. Raises CorruptError on damage."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of a result, and the box of one of its arrays that they are made from."""

    array: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def box(self) -> tuple[slice, ...]:
        return slices(self.start, self.shape, (0,) * len(self.start))


class Sink(Protocol):
    """A format to write, made for the arrays that are to be written.

    format: its name. only_file: the name of the file that is the result, where it is not a directory. parts: all bytes
    of arrays, in the order of the files.
    """

    format: str
    only_file: str | None
    parts: Sequence[Part]

    def encode(self, part: Part, data: np.ndarray) -> np.ndarray:
        """The ``part.nbytes`` bytes, [nbytes] uint8, of a box in the dtype that was chosen. By several threads."""

    def finish(self, directory: Path, digests: Sequence[str]) -> None:
        """Write all but the parts (whose digests these are) and open what is there now as a reader does."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a conversion tells while it works.

    bytes_done: called with the phase ("resume": what is there already, "write", "verify"), bytes done, bytes in all.
    line: called with what a user should read.
    """

    bytes_done: Callable[[str, int, int], None] = lambda phase, done, total: None
    line: Callable[[str], None] = lambda text: None


def boxes(
    shape: tuple[int, ...], itemsize: int, rows: bool = False
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (start, shape) of parts of an array: at most ``CHUNK_BYTES``, also where they are float32 in the source.

    They follow each other in row-major order and are contiguous in it. rows: cut the first axis only.
    """
    limit = CHUNK_BYTES // 4 * min(itemsize, 4)
    return split(shape, itemsize, max(limit, math.prod(shape[1:]) * itemsize) if rows else limit)


def convert(
    source: Source,
    chosen: Mapping[str, Chosen],
    sink: Sink,
    destination: str | os.PathLike[str],
    *,
    add_files: Callable[[Path], None] | None = None,
    progress: Progress = Progress(),
) -> int:
    """Write ``chosen`` arrays of a source as ``sink`` has them; returns their bytes in the result.

    Memory: a few parts of ``CHUNK_BYTES`` elements. The result appears complete, read back and the same as what was
    written, or not at all. After an error nothing is left. After an interrupt, or if the process is killed, what is
    written stays beside ``destination``, as ``.tmp-<name>``; the same call goes on from there if the source and what
    is asked for are the same, else begins anew, and says which.
    add_files: called with the directory to write other files into.
    Raises UserError if ``destination`` exists, for a value that its dtype does not reach, and when the disk refuses;
    CorruptError where the source is damaged.
    """
    path = Path(os.path.abspath(destination))
    total = sum(part.nbytes for part in sink.parts)
    draft = LocalDraft(path)
    with sole_writer(path, total):
        kept = True
        try:
            journal = _Journal(draft, _request(source, chosen, sink))
            done = journal.resume(sink.parts, progress)
            _write(source, chosen, sink, draft.directory, journal, done, progress)
            _verify(sink.parts, journal.digests, draft.directory, path, progress)
            sink.finish(draft.directory, journal.digests)
            if add_files is not None:
                add_files(draft.directory)
            refuse_existing(path)  # somebody else may have made it meanwhile, and a commit replaces
            journal.remove()
            draft.commit(sink.only_file)
            kept = False
        except Exception:
            kept = False
            raise
        finally:
            if not kept:
                draft.abort()
            elif draft.directory.exists():
                progress.line(f"what is done stays in {draft.directory}: the same command goes on from there")
    return total


def _request(source: Source, chosen: Mapping[str, Chosen], sink: Sink) -> dict[str, Any]:
    """What makes the bytes of a result: a part done for the same request is the same."""
    arrays = {new: [c.source, c.logical.dtype.name] for new, c in chosen.items()}
    parts = [dataclasses.astuple(part) for part in sink.parts]
    asked = {"format": sink.format, "arrays": arrays, "parts": digest(json.dumps(parts).encode())}
    return {"source": source.identity, "asked": digest(json.dumps(asked).encode())}


def stream(
    source: Source, chosen: Mapping[str, Chosen], progress: Progress = Progress()
) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Iterator[tuple[tuple[int, ...], np.ndarray]]]]:
    """The ``chosen`` arrays of a source for a format that is written front to back, without parts that can be told
    beforehand: name, shape, dtype, and (start, data) of boxes that cover it once, to be taken in this order.
    """
    total, done = sum(array.logical.nbytes for array in chosen.values()), 0

    def boxes_of(array: Chosen) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        nonlocal done
        logical = array.logical

        def make(box: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], np.ndarray]:
            return box[0], _read(source, array, slices(*box, (0,) * len(box[0])))

        for start, data in in_order(make, boxes(logical.shape, logical.dtype.itemsize)):
            yield start, data
            done += data.nbytes
            progress.bytes_done("write", done, total)

    for name, array in chosen.items():
        yield name, array.logical.shape, array.logical.dtype, boxes_of(array)


def _read(source: Source, array: Chosen, box: tuple[slice, ...]) -> np.ndarray:
    """In the dtype that was chosen."""
    try:
        data = source.read(array.source, box)
    except OSError as e:
        raise UserError(f"{source.where}: array {array.source!r} cannot be read ({e.strerror}); check the disk") from e
    return narrow(data, array.logical.dtype, array.source)


class _Journal:
    """The digests of the parts that are done, in the draft: a line of JSON with the request, then a line a part.

    It is not synced: a part is held against its digest before it counts as done.
    """

    _LINE = re.compile(rb"[0-9a-f]{32}\n")

    def __init__(self, draft: LocalDraft, request: dict[str, Any]):
        self._draft, self._path, self._request = draft, draft.directory / JOURNAL, request
        self.digests: list[str] = []

    def resume(self, parts: Sequence[Part], progress: Progress) -> int:
        """How many parts are done; what comes after them is to be written."""
        found = self._found(len(parts), progress)
        if not found:
            self._draft.begin()
        there = in_order(lambda part: _digest_there(self._draft.directory, part), parts[: len(found)])
        nbytes, total = 0, sum(part.nbytes for part in parts[: len(found)])
        for part, expected, digest_ in zip(parts, found, there, strict=False):
            if digest_ != expected:
                break
            self.digests.append(expected)
            nbytes += part.nbytes
            progress.bytes_done("resume", nbytes, total)
        if found:
            progress.line(
                f"goes on: {len(self.digests)} of {len(parts)} parts ({nbytes / 1e6:.0f} MB) are there already"
            )
        for path in self._draft.directory.iterdir():  # what comes after the parts is made anew
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in {JOURNAL, *(part.file for part in parts)}:
                path.unlink()
        unfinished = self._path.with_suffix(".new")
        lines = [json.dumps(self._request), *self.digests]
        unfinished.write_text("".join(f"{line}\n" for line in lines))
        unfinished.rename(self._path)
        return len(self.digests)

    def _found(self, most: int, progress: Progress) -> list[str]:
        """The digests of an earlier call's journal; none if it was of something else."""
        try:
            head, *lines = self._path.read_bytes().splitlines(keepends=True)
            request = dict(json.loads(head))
        except (OSError, ValueError, TypeError):
            return []
        if other := [key for key, value in json.loads(json.dumps(self._request)).items() if request.get(key) != value]:
            what = {"source": "the source is another or has changed", "asked": "what is asked for is not the same"}
            progress.line(f"begins anew, does not go on with {self._draft.directory}: {what[other[0]]}")
            return []
        good = next((i for i, line in enumerate(lines) if not self._LINE.fullmatch(line)), len(lines))
        return [line.decode().strip() for line in lines[: min(good, most)]]

    def add(self, digest_: str) -> None:
        self.digests.append(digest_)
        with open(self._path, "ab") as file:
            file.write(f"{digest_}\n".encode())

    def remove(self) -> None:
        self._path.unlink()


def _write(
    source: Source,
    chosen: Mapping[str, Chosen],
    sink: Sink,
    directory: Path,
    journal: _Journal,
    done: int,
    progress: Progress,
) -> None:
    """Writes the parts from number ``done`` on, and syncs all files of parts."""
    total = sum(part.nbytes for part in sink.parts)
    written = sum(part.nbytes for part in sink.parts[:done])

    def make(part: Part) -> tuple[Part, np.ndarray, str]:
        array = chosen[part.array]
        data = _read(source, array, part.box)
        raw = sink.encode(part, data)
        assert raw.nbytes == part.nbytes, part
        return part, raw, digest(raw.data)

    for part, raw, digest_ in in_order(make, sink.parts[done:]):
        write_at(directory / part.file, part.offset, raw)
        journal.add(digest_)
        written += part.nbytes
        progress.bytes_done("write", written, total)
    for name in dict.fromkeys(part.file for part in sink.parts):
        with open(directory / name, "r+b") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # the disk is to be read back, not memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _verify(parts: Sequence[Part], digests: Sequence[str], directory: Path, path: Path, progress: Progress) -> None:
    """Raises CorruptError unless what is on the disk is what was written."""
    total, done = sum(part.nbytes for part in parts), 0
    for part, expected, found in zip(
        parts, digests, in_order(lambda p: _digest_there(directory, p), parts), strict=True
    ):
        if found != expected:
            raise CorruptError(
                f"{path} did not verify after writing: bytes {part.offset} to {part.offset + part.nbytes} of "
                f"{part.file} have digest {found}, expected {expected}; check the disk"
            )
        done += part.nbytes
        progress.bytes_done("verify", done, total)


def _digest_there(directory: Path, part: Part) -> str | None:
    """The digest of what a file has where a part is to be; None where it does not reach."""
    try:
        with open(directory / part.file, "rb", buffering=0) as file:
            file.seek(part.offset)
            raw = np.empty(part.nbytes, np.uint8)
            at = 0
            while at < part.nbytes:
                n = file.readinto(raw.data[at:])
                if not n:
                    return None
                at += n
            return digest(raw.data)
    except FileNotFoundError:
        return None
