"""Where checkpoints lie: a store of files by name, with one writer, in which a name appears whole or not at all.

``Store`` is what a level needs of a place; ``LocalStore`` is that for a directory on a local disk, tmpfs or shared file
system, ``checkpoint.objects.ObjectStore`` for an object store, and ``store_of`` chooses. Under the root of a directory:

    step-00000010/manifest.json              a committed checkpoint: it is there because this file is
    step-00000010/data-00000-1f3a7c52.bin    chunks, also of later steps in which they are the same
    .lock                                    held (flock) by the writer, with its host and process id

Data is on stable storage before the manifest that names it, and a manifest is gone before the data that only it names.
So after a crash there may be files that no manifest names, which the next writer removes, and never the reverse.

A writer that is killed, or a sync that fails, leaves what is seen but does not last. So all of that is synced before
anything is deleted or committed: a step that comes undone must not have been the reason to delete another, and none may
share chunks that come undone.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import posixpath
import re
import shutil
import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from checkpoint.manifest import MANIFEST, CorruptError
from parallelism.errors import UserError

_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".tmp-"
SENT_BYTES = 8 << 20  # of a file are sent to the disk at once, before its sync
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE)


class Files(Protocol):
    """The files of one checkpoint, by name, or by ``../step-<number>/name`` of one beside it.

    where: names the checkpoint in messages.
    """

    where: str

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises MissingError, a CorruptError, if there is none."""

    def size(self, name: str) -> int:
        """Of a file, in bytes. Raises CorruptError if it is missing."""

    def written(self, name: str) -> float | None:
        """When a file was written, in seconds since the epoch; None where the store does not say, or it is missing."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` on. Raises CorruptError if the file is missing or too short."""


class Store(Protocol):
    """A place for the files of checkpoints by ``<directory>/<name>``, and one writer at a time.

    where: names the place in messages. file_bytes: how large a file should be at most; None: as large as it gets.
    near: whether what this process wrote is read back without a network. cached: whether what a process read is in the
    page cache of its machine.
    """

    where: str
    file_bytes: int | None
    near: bool
    cached: bool

    def acquire(self, mark: str = "") -> None:
        """Become the writer and leave ``mark``. Raises UserError naming the present holder or a step that is a link."""

    def mark(self) -> str | None:
        """What the writer left as its mark; None if nobody did."""

    def release(self) -> None:
        """Let another writer in."""

    def close(self) -> None:
        """Release, and be of no use from here on."""

    def names(self) -> dict[str, set[str]]:
        """The names of all files by directory."""

    def open(self, directory: str) -> Files: ...

    def create(self, directory: str, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A new file; it and its name are on stable storage when the context ends."""

    def put(self, directory: str, name: str, data: bytes) -> None:
        """Make or replace a file in one step, for good: after a crash it is the old or the new, whole."""

    def patch(self, directory: str, name: str, offset: int, data: bytes) -> None:
        """Put bytes into a file where it is damaged, or make it: of no use to a reader until then."""

    def delete(self, directory: str, names: Iterable[str]) -> None:
        """Remove files, for good, and a directory that has none left. What was put before is there for good then."""


def directory_of(step: int) -> str:
    return f"step-{step:08d}"


def is_step(directory: str) -> bool:
    """Whether a directory is one that ``directory_of`` names."""
    return _STEP.fullmatch(directory) is not None


def steps_in(names: dict[str, set[str]]) -> list[int]:
    """The committed steps, ascending."""
    found = ((_STEP.fullmatch(directory), files) for directory, files in names.items())
    return sorted(int(match[1]) for match, files in found if match and MANIFEST in files)


def place_of(place: str | os.PathLike[str]) -> Path | str:
    """A directory as a path, an object store as a URL (s3://bucket/prefix).

    How many slashes it has makes no difference, so that a URL that became a path on the way is one again.
    """
    found = _URL.fullmatch(os.fspath(place))
    return f"{found[1].lower()}://{found[2] and posixpath.normpath(found[2])}" if found else Path(place)


def store_of(place: str | os.PathLike[str]) -> Store:
    """The store at a directory, which is made if it is missing, or at the URL of an object store."""
    place = place_of(place)
    if isinstance(place, Path):
        return LocalStore(place)
    from checkpoint.objects import ObjectStore

    return ObjectStore(place)


def files_of(place: str | os.PathLike[str]) -> Files:
    """The files of one checkpoint, which lies in a directory or at the URL of an object store."""
    place = place_of(place)
    if isinstance(place, Path):
        return LocalFiles(place)
    from checkpoint.objects import files_at

    return files_at(place)


def committed(root: str | os.PathLike[str]) -> list[tuple[int, Path | str]]:
    """The checkpoints under a root as (step, directory or URL), ascending."""
    root = place_of(root)
    if isinstance(root, Path):
        return [(step, root / directory_of(step)) for step in steps_in(_names(root))] if root.is_dir() else []
    return [(step, f"{root}/{directory_of(step)}") for step in steps_in(store_of(root).names())]


def _names(root: Path) -> dict[str, set[str]]:
    found = {}
    for path in root.iterdir():
        if _STEP.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted meanwhile; not ours
                found[path.name] = set(os.listdir(path))
    return found


def sync(path: Path) -> None:
    """What is in a file, or the names in a directory, are on stable storage then."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(path: Path, offset: int, data: Any) -> None:
    """Put a buffer into a file, which is made if it is missing. Not synced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(fd, left, offset)
            left, offset = left[written:], offset + written
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """A directory of which the name, too, is on stable storage, and those of all above it, whoever made them."""
    path.mkdir(parents=True, exist_ok=True)
    for above in path.resolve().parents:
        with contextlib.suppress(PermissionError):  # no name in it is ours
            sync(above)
        if above.is_mount():
            break


class WriterLock:
    """An exclusive lock on a file. The kernel drops it when the process dies, however it dies."""

    def __init__(self, path: Path, guards: Path):
        self._path, self._guards = path, guards
        self._fd: int | None = None

    def acquire(self, mark: str = "") -> None:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                        os.ftruncate(fd, 0)
                        holder = {"host": socket.gethostname(), "pid": os.getpid(), "mark": mark}
                        os.pwrite(fd, json.dumps(holder).encode(), 0)
                        self._fd, fd = fd, -1
                        return
                # Its last holder removed the file between: the lock on it keeps nobody out.
            except BlockingIOError:
                raise UserError(
                    f"{self._guards} is being written by {self._holder(fd)}; stop that or choose another directory"
                ) from None
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


class MissingError(CorruptError):
    """A file of a checkpoint is not there; name: as the chunks in it have it."""

    def __init__(self, where: str, name: str):
        shared = ", which this step shares with one before it (jaxsys reshard copies a step whole)"
        super().__init__(f"file {where} is missing{shared * name.startswith('../')}; use another checkpoint")


class LocalFiles:
    """The files of a checkpoint in one directory."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._path = path

    def read(self, name: str) -> bytes:
        self.size(name)
        try:
            return self._at(name).read_bytes()
        except OSError as e:
            raise self._unreadable(name, e.strerror or str(e)) from e

    def size(self, name: str) -> int:
        try:
            found = self._at(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None
        except OSError as e:
            raise self._unreadable(name, e.strerror or str(e)) from e
        if not stat.S_ISREG(found.st_mode):  # to open a pipe would be to wait for who writes
            raise self._unreadable(name, "it is not a file")
        return found.st_size

    def written(self, name: str) -> float | None:
        with contextlib.suppress(OSError):
            return self._at(name).stat().st_mtime
        return None

    def _at(self, name: str) -> Path:
        """Where it lies; a directory that is not there yet does not hide those beside it."""
        return Path(os.path.normpath(self._path / name))

    def _unreadable(self, name: str, why: str) -> CorruptError:
        return CorruptError(f"cannot read {self._path / name}: {why}; use another checkpoint")

    def _missing(self, name: str) -> MissingError:
        return MissingError(str(self._at(name)), name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        path = os.path.normpath(os.path.join(self.where, name))
        try:
            # Of a pipe that took a file's place nobody waits for the other end.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise self._missing(name) from None
        try:
            done = 0
            while done < len(buffer):
                n = os.preadv(fd, [buffer[done:]], offset + done)
                if not n:
                    raise CorruptError(
                        f"file {path} is truncated: {offset + done} bytes, expected at least "
                        f"{offset + len(buffer)}; use another checkpoint"
                    )
                done += n
        finally:
            os.close(fd)


@contextlib.contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file; it and its name in the directory are on stable storage when the context ends."""
    with _OnItsWay(open(path, "xb", buffering=0)) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


class _OnItsWay(io.BufferedWriter):
    """A file whose bytes set out for the disk while more are written, so that its sync finds little left to do."""

    _sent = 0

    def flush(self) -> None:
        super().flush()
        if (at := self.tell()) >= self._sent + SENT_BYTES and hasattr(os, "posix_fadvise"):
            # To say that they are not needed makes Linux begin to write them; what is dirty stays in the cache.
            os.posix_fadvise(self.fileno(), self._sent, at - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = at


class LocalStore:
    """Checkpoints as directories under ``root``, which is made if it is missing."""

    file_bytes: int | None = None
    near = cached = True

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        self.where = str(root)
        try:
            make_directory(self.root)
        except OSError as e:
            raise UserError(f"cannot make checkpoint directory {root}: {e.strerror}; choose another") from e
        self._lock = WriterLock(self.root / ".lock", self.root)
        self._unsettled: set[Path] = set()  # changed files, and directories with changed names, that are not synced
        self._settling = threading.RLock()

    def acquire(self, mark: str = "") -> None:
        try:
            self._lock.acquire(mark)
        except OSError as e:
            raise UserError(f"cannot write in checkpoint directory {self.root}: {e.strerror}; choose another") from e
        for path in sorted(self.root.iterdir()):
            if is_step(path.name) and path.is_symlink():
                self._lock.release()
                raise UserError(
                    f"{path} is a link, expected a directory: a writer would change or delete what it leads to; remove "
                    f"it, and copy the step here if need be: jaxsys checkpoint copy {path.resolve()} {self.root}"
                )
        # A killed writer may have left anything so: what is seen here is not yet what a crash leaves.
        names = self.names()
        files = {self.root / directory / name for directory, names in names.items() for name in names}
        self._unsettled = {self.root, *(self.root / directory for directory in names), *files}

    def mark(self) -> str | None:
        return self._lock.mark()

    def release(self) -> None:
        self._lock.release()

    def close(self) -> None:
        self._lock.release()

    def names(self) -> dict[str, set[str]]:
        return _names(self.root)

    def open(self, directory: str) -> LocalFiles:
        return LocalFiles(self.root / directory)

    @contextlib.contextmanager
    def create(self, directory: str, name: str) -> Iterator[BinaryIO]:
        self._settle_all()  # the file's owner may share chunks of others
        with durable(self._made(self.root / directory) / name) as file:
            yield file

    def put(self, directory: str, name: str, data: bytes) -> None:
        path, unfinished = self.root / directory, f"{_UNFINISHED}{name}"
        (path / unfinished).unlink(missing_ok=True)
        with self.create(directory, unfinished) as file:
            file.write(data)
        with self._changing(path):
            os.rename(path / unfinished, path / name)

    def patch(self, directory: str, name: str, offset: int, data: bytes) -> None:
        path = Path(os.path.normpath(self.root / directory / name))
        with self._changing(self._made(path.parent), path):
            write_at(path, offset, data)

    def delete(self, directory: str, names: Iterable[str]) -> None:
        self._settle_all()
        path = self.root / directory
        with self._changing(path):
            for name in names:
                (path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty; one that is back after a crash, the next writer removes
            path.rmdir()

    def _made(self, directory: Path) -> Path:
        """A directory under the root, made if there is none."""
        if not directory.is_dir():
            with self._changing(self.root):
                directory.mkdir(exist_ok=True)
        return directory

    @contextlib.contextmanager
    def _changing(self, *paths: Path) -> Iterator[None]:
        """Change files, or the names in directories: for good when the context ends, else they stay unsettled."""
        with self._settling:
            self._unsettled.update(paths)
            yield
            self._settle(paths)

    def _settle(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # deleted, which is synced with the directory
                sync(path)
            self._unsettled.discard(path)

    def _settle_all(self) -> None:
        """Before anything is deleted, or committed that may rely on what is seen of the rest."""
        with self._settling:
            self._settle(sorted(self._unsettled))


@contextlib.contextmanager
def sole_writer(path: Path, nbytes: int) -> Iterator[None]:
    """Nobody else writes ``path``, which does not exist yet and is to have ``nbytes``.

    Raises UserError if it exists or another process writes it, and for what the file system refuses meanwhile.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    lock = WriterLock(lock_path, path)
    try:
        make_directory(path.parent)
        lock.acquire()
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; choose another place") from e
    try:
        refuse_existing(path)
        yield
    except OSError as e:
        needed = f"{nbytes >> 20 or '?'} MiB needed, {shutil.disk_usage(path.parent).free >> 20} MiB free"
        raise UserError(f"cannot write {path}: {e.strerror} ({needed}); choose another place") from e
    finally:
        lock_path.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def new_directory(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """A directory to write into that becomes ``path`` when the context ends, and after an error is not there.

    Raises as ``sole_writer`` does.
    """
    draft = LocalDraft(path)
    with sole_writer(path, nbytes):
        draft.begin()
        try:
            yield draft.directory
            refuse_existing(path)  # somebody else may have made it meanwhile, and a commit replaces
            draft.commit()
        finally:
            draft.abort()  # finds nothing to remove after a commit


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already; choose a new directory or file, or remove it")


class LocalDraft:
    """A directory being written beside its final place ``path``, as ``.tmp-<name>``: for what is not in a ``Store``."""

    def __init__(self, path: Path):
        self._path = path
        self.directory = path.with_name(f"{_UNFINISHED}{path.name}")

    def begin(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()

    def commit(self, only_file: str | None = None) -> None:
        """Give it its name, or, of one that is a single file's draft, that file.

        All that is in it, also what others wrote there, is on stable storage then.
        """
        for directory, _, names in os.walk(self.directory):
            for name in names:
                sync(Path(directory, name))
            sync(Path(directory))
        os.rename(self.directory / (only_file or ""), self._path)
        sync(self._path.parent)

    def abort(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
