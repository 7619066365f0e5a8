"""What a path means where checkpoints are: a run, a root with its steps, or one step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path

from checkpoint.manifest import MANIFEST, CorruptError, Manifest, resolved
from checkpoint.reader import CheckpointReader
from checkpoint.storage import Store, directory_of, place_of, steps_in, store_of
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

OF_RUN = "checkpoints"
"""Where a run has its checkpoints."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Steps in a store. only: the directory of the one that is meant; None: all that are there."""

    store: Store
    only: str | None = None

    @property
    def where(self) -> str:
        return self.store.open(self.only).where if self.only else self.store.where

    def directories(self) -> list[str]:
        """Of the committed steps that are meant, ascending."""
        return [self.only] if self.only else committed_directories(self.store)

    def open(self, directory: str) -> CheckpointReader:
        """A committed step. Raises CorruptError if its manifest is damaged or another step's, UserError if newer."""
        reader = CheckpointReader(self.store.open(directory))
        if directory.startswith("step-") and directory != directory_of(reader.manifest.step):
            raise CorruptError(f"{reader.where} holds step {reader.manifest.step}; use another step")
        return reader

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """As the only writer there; what stands alone nobody else writes.

        Raises UserError naming a run that does, and for what the disk refuses meanwhile.
        """
        alone = self.only is not None and not self.only.startswith("step-")
        if not alone:
            self.store.acquire()
        try:
            yield
        except OSError as e:
            if isinstance(e, UserError) or e.filename is not None:
                raise
            raise UserError(f"cannot write in {self.where}: {e.strerror or e}; make room, then do it again") from e
        finally:
            if not alone:
                self.store.release()

    def newest(self) -> CheckpointReader:
        """Of the steps that are meant, the newest with a good manifest; those passed over are logged."""
        return next(self.newest_first())

    def newest_first(self) -> Iterator[CheckpointReader]:
        """The steps with a good manifest; those passed over are logged.

        Raises CorruptError in place of passing over the one step that is named, UserError if there is none at all.
        """
        good = False
        for directory in reversed(self.some_directories()):
            try:
                reader = self.open(directory)
            except CorruptError as e:
                if self.only:
                    raise
                logger.warning("passed over: %s", e)
                continue
            good = True
            yield reader
        if not good:
            raise UserError(f"no step in {self.where} has a good manifest; restore one from elsewhere")

    def some_directories(self) -> list[str]:
        """``directories``, where there is one at least. Raises UserError otherwise."""
        if not (found := self.directories()):
            raise UserError(f"{self.where} holds no checkpoint yet; give a place with one")
        return found


def committed_directories(store: Store) -> list[str]:
    return [directory_of(step) for step in steps_in(store.names())]


def find_place(path: str | os.PathLike[str]) -> Place:
    """The steps that a path means: a run's directory, that of its checkpoints, or one step's.

    A run that has saved nothing yet is a place without steps. Raises UserError where there is neither.
    """
    text = _checked(path)
    parent, name = _parent(text)
    with contextlib.suppress(CorruptError):
        store = store_of(parent)
        store.open(name).size(MANIFEST)
        return Place(store, name)
    for root in (text, posixpath.join(text, OF_RUN)):
        if _is_url(root) or Path(root).is_dir():
            store = store_of(root)
            # A run makes its directory, and locks it, before it saves.
            if store.names() or store.mark() is not None or (root != text and not _is_url(root)):
                return Place(store)
    raise UserError(
        f"{path} is not a checkpoint: no {MANIFEST}, no step-* directories and no {OF_RUN} with such; check the path"
    )


def root_of(path: str | os.PathLike[str]) -> Store:
    """Where steps are to be put: a run's checkpoints, a root with steps, or a new or empty directory.

    Raises UserError for a directory that holds other things, or is a step.
    """
    text = os.fspath(place_of(path))
    if _is_url(text):
        return store_of(text)
    if Path(text).exists():
        _checked(path)
        found = os.listdir(text)
        if MANIFEST in found:
            raise UserError(f"{path} is one checkpoint, expected a directory for several; give the one that it is in")
        if OF_RUN in found:
            return store_of(posixpath.join(text, OF_RUN))
        if found and ".lock" not in found and not any(name.startswith("step-") for name in found):
            raise UserError(f"{path} holds no checkpoints but {sorted(found)[0]!r}; give a new directory or a run's")
    return store_of(text)


def used_bytes(manifest: Manifest, directory: str) -> Mapping[tuple[str, str], int]:
    """Bytes that the chunks of a step in ``directory`` take in each file, by the file's directory and name."""
    found: dict[tuple[str, str], int] = {}
    for array in manifest.arrays.values():
        for chunk in array.chunks:
            file = resolved(directory, chunk.file)
            found[file] = found.get(file, 0) + chunk.stored_bytes
    return found


def same_place(one: Store, other: Store) -> bool:
    return os.path.realpath(one.where) == os.path.realpath(other.where)


def _is_url(text: str) -> bool:
    return "://" in text


def _checked(path: str | os.PathLike[str]) -> str:
    """The path as text. Raises UserError unless it is a URL or a directory that is there."""
    if not os.fspath(path):
        raise UserError("checkpoint path '': expected a directory")
    text = os.fspath(place_of(path))
    if not _is_url(text) and not Path(text).is_dir():
        what = "is a file, expected a directory" if Path(text).exists() else "does not exist"
        raise UserError(f"checkpoint {text} {what}; check the path")
    return text


def _parent(text: str) -> tuple[str, str]:
    """The directory that a path lies in, and its name there; a bucket lies in none."""
    text = text.rstrip("/") or "/"
    if _is_url(text) and text.count("/") == 2:
        return text, "."
    if not _is_url(text) and (os.path.islink(text) or os.path.basename(text) in ("", ".", "..")):
        text = os.path.realpath(text)
    parent, name = posixpath.split(text)
    return parent or ".", name or "."
