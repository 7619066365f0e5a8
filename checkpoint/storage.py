"""Where checkpoints lie: directories with atomic commit, atomic deletion and one writer.

``Storage`` is what the levels need of a place; ``LocalStorage`` is that for a directory on a local
disk, tmpfs or shared file system. Under its root:

    step-00000010/     a committed checkpoint
    .tmp-...           one being written: of no meaning until it is renamed
    .old-...           one being replaced by a newer checkpoint of the same step
    .trash-...         one being deleted
    .lock              held (flock) by the writer, with its host and process id
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from checkpoint.manifest import CorruptError
from parallelism.errors import UserError

_STEP = re.compile(r"step-(\d{8,})")


class Files(Protocol):
    """The files of one committed checkpoint. ``where`` names it in messages."""

    where: str

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises CorruptError if it is missing."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on. Raises CorruptError if the file is missing or too short."""


class Draft(Protocol):
    """A checkpoint that is being written and that no reader sees before ``commit``."""

    def write(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A new file; it is on stable storage when the context ends."""

    def files(self) -> Files:
        """What has been written so far."""

    def commit(self) -> None:
        """Make it the checkpoint, in one step: after a crash it is either there whole or not at all."""

    def abort(self) -> None:
        """Remove what was written."""


class Storage(Protocol):
    """A place that holds committed checkpoints by step, and takes new ones from one writer at a time."""

    where: str

    def acquire(self, mark: str = "") -> None:
        """Become the writer, leave ``mark``, and remove what a killed writer left.

        Raises UserError naming the present holder.
        """

    def mark(self) -> str | None:
        """What the writer left as its mark; None if nobody did."""

    def release(self) -> None: ...

    def steps(self) -> list[int]:
        """Committed steps, ascending."""

    def open(self, step: int) -> Files: ...

    def begin(self, step: int) -> Draft:
        """Start a draft of ``step``, dropping an unfinished earlier one."""

    def join(self, step: int) -> Draft:
        """The draft that another process of this job began."""

    def delete(self, step: int) -> None: ...


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_directory(path: Path) -> None:
    """Delete a directory so that a crash never leaves half of it under its own name."""
    trash = path.with_name(f".trash-{path.name.lstrip('.')}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)


def committed(root: Path) -> list[tuple[int, Path]]:
    """The checkpoints under a root as (step, directory), ascending."""
    matches = ((_STEP.fullmatch(path.name), path) for path in root.iterdir()) if root.is_dir() else ()
    return sorted((int(match[1]), path) for match, path in matches if match)


class WriterLock:
    """An exclusive lock on a file. The kernel drops it when the process dies, however it dies."""

    def __init__(self, path: Path, guards: Path):
        self._path, self._guards = path, guards
        self._fd: int | None = None

    def acquire(self, mark: str = "") -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._guards} is being written by {self._holder(fd)}; stop that or choose another directory"
            ) from None
        else:
            os.ftruncate(fd, 0)
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "mark": mark}
            os.pwrite(fd, json.dumps(holder).encode(), 0)
            self._fd, fd = fd, -1
        finally:
            if fd >= 0:
                os.close(fd)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def mark(self) -> str | None:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._path.read_bytes()).get("mark")
        return None

    @staticmethod
    def _holder(fd: int) -> str:
        try:
            holder = json.loads(os.pread(fd, 4096, 0))
            return f"process {holder['pid']} on host {holder['host']}"
        except (ValueError, KeyError):
            return "another process"


class LocalFiles:
    """The files of a checkpoint in one directory."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._path = path

    def read(self, name: str) -> bytes:
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            raise CorruptError(f"file {self._path / name} is missing; use another checkpoint") from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        path = self._path / name
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < len(buffer):
                    n = file.readinto(buffer[done:])
                    if not n:
                        raise CorruptError(
                            f"file {path} is truncated: {offset + done} bytes, expected at least "
                            f"{offset + len(buffer)}; use another checkpoint"
                        )
                    done += n
        except FileNotFoundError:
            raise CorruptError(f"file {path} is missing; use another checkpoint") from None


class LocalDraft:
    """A checkpoint being written in ``directory``, beside its final place: ``.tmp-<name>``."""

    def __init__(self, path: Path):
        self._path = path
        self.directory = path.with_name(f".tmp-{path.name}")
        self._old = path.with_name(f".old-{path.name}")

    def begin(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        with open(self.directory / name, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def files(self) -> LocalFiles:
        return LocalFiles(self.directory)

    def commit(self) -> None:
        fsync_directory(self.directory)
        if self._path.exists():
            os.rename(self._path, self._old)
        os.rename(self.directory, self._path)
        fsync_directory(self._path.parent)
        if self._old.exists():
            remove_directory(self._old)

    def abort(self) -> None:
        if self._old.exists() and not self._path.exists():
            os.rename(self._old, self._path)
        shutil.rmtree(self.directory, ignore_errors=True)


class LocalStorage:
    """Checkpoints as directories under ``root``, which is made if it is missing."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        self.where = str(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot make checkpoint directory {root}: {e.strerror}; choose another") from e
        self._lock = WriterLock(self.root / ".lock", self.root)

    def acquire(self, mark: str = "") -> None:
        try:
            self._lock.acquire(mark)
        except OSError as e:
            raise UserError(f"cannot write in checkpoint directory {self.root}: {e.strerror}; choose another") from e
        self._clean()

    def mark(self) -> str | None:
        return self._lock.mark()

    def release(self) -> None:
        self._lock.release()

    def _clean(self) -> None:
        for path in self.root.glob(".old-step-*"):
            # Killed between the two renames of a replacement: the new one was not yet there.
            final = self.root / path.name.removeprefix(".old-")
            if final.exists():
                remove_directory(path)
            else:
                os.rename(path, final)
        for pattern in (".tmp-*", ".trash-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        return [step for step, _ in committed(self.root)]

    def open(self, step: int) -> LocalFiles:
        return LocalFiles(self._path(step))

    def begin(self, step: int) -> LocalDraft:
        draft = LocalDraft(self._path(step))
        draft.begin()
        return draft

    def join(self, step: int) -> LocalDraft:
        return LocalDraft(self._path(step))

    def delete(self, step: int) -> None:
        remove_directory(self._path(step))
        fsync_directory(self.root)
