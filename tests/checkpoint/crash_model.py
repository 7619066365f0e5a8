"""A disk that loses power: what a program does to files is recorded, and what may be left of it is made.

``Recorder`` stands between a program and its system calls. ``crashes`` goes through what it wrote down and gives, after
every operation, the states that a disk may be in when the power fails there. It promises as little as POSIX does:

- What was written to a file may be lost until the file is synced, page by page; its length too.
- What was done to the names in a directory may be lost until the directory is synced, each alone: a name that was made,
  one that was removed, a rename (of which there is never half).
- Where nothing was lost, that is the state which the kill of a process leaves.
"""

import builtins
import contextlib
import dataclasses
import io
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = 256  # small, as files are: so that each has several
SYNCING = ("sync", "_settle", "_settle_all", "_changing")  # of checkpoint.storage
EXHAUSTIVE = 6  # as many operations that are not synced are lost in every combination, more in a sample of them

NAMES = ("mkdir", "create", "rename", "unlink")
BYTES = ("write", "grow", "resize")


@dataclasses.dataclass(frozen=True)
class Op:
    """node: the file or directory that it is about; directory: the one whose names change. site: where in the program
    a sync is, and whether of bytes or names. what: of a mark, which is no operation but what is promised by then."""

    kind: str
    node: int = -1
    directory: int = -1
    name: str = ""
    to: str = ""
    offset: int = 0
    data: bytes = b""
    site: str = ""
    what: Any = None


class Disk:
    """names: of each directory, by node, what is in it; files: the bytes of each. Node 0 is the root."""

    def __init__(self):
        self.names: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, bytearray] = {}

    def copy(self) -> "Disk":
        other = Disk()
        other.names = {node: dict(names) for node, names in self.names.items()}
        other.files = {node: bytearray(data) for node, data in self.files.items()}
        return other

    def make(self, op: Op) -> None:
        """The node of a new file or directory, which has no name yet."""
        if op.kind == "mkdir":
            self.names.setdefault(op.node, {})
        elif op.kind == "create":
            self.files.setdefault(op.node, bytearray())

    def apply(self, op: Op) -> None:
        names = self.names.get(op.directory, {})
        if op.kind in ("mkdir", "create"):
            self.make(op)
            names[op.name] = op.node
        elif op.kind in ("rename", "unlink"):
            if names.get(op.name) == op.node:
                del names[op.name]
            if op.kind == "rename":
                names[op.to] = op.node
        elif op.kind == "resize":
            data = self.files[op.node]
            del data[op.offset :]
            data.extend(bytes(op.offset - len(data)))
        elif op.kind in ("grow", "write"):
            data = self.files[op.node]
            data.extend(bytes(max(0, op.offset + len(op.data) - len(data))))
            data[op.offset : op.offset + len(op.data)] = op.data

    def tree(self, node: int = 0, path: str = "") -> dict[str, bytes | None]:
        """By path: the bytes of files, None of directories."""
        found: dict[str, bytes | None] = {}
        for name, child in self.names[node].items():
            if child in self.names:
                found[path + name] = None
                found |= self.tree(child, f"{path}{name}/")
            else:
                found[path + name] = bytes(self.files[child])
        return found


def tree_of(root) -> dict[str, bytes | None]:
    """What is under a real directory, as ``Disk.tree`` has it. Locks are no part of it: nobody reads them."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not is_lock(path.name):
            found[path.relative_to(root).as_posix()] = None if path.is_dir() else path.read_bytes()
    return found


def make_tree(root, tree: dict[str, bytes | None]) -> None:
    root.mkdir()
    for name, data in sorted(tree.items()):
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)


def is_lock(name: str) -> bool:
    return name.endswith(".lock")


# -- what may be left


def crashes(log: list[Op], seed: int = 0, start: int = 0) -> Iterator[tuple[dict[str, bytes | None], list[Any]]]:
    """What is left, and what was promised by then, wherever in a log the power may fail from ``start`` operations on.

    That is every prefix, with every subset (a sample, where they are many) of what was not yet synced. With the same
    promises no state is given twice.
    """
    rng = random.Random(seed)
    synced, pending, promised = Disk(), [], []
    seen: set[int] = set()
    for at, op in enumerate([Op("mark"), *log]):
        if op.kind == "sync":
            rest = []
            for each in pending:
                if op.node == (each.directory if each.kind in NAMES else each.node):
                    synced.apply(each)
                else:
                    rest.append(each)
            pending = rest
        elif op.kind == "mark":
            promised = [*promised, op.what]
            seen = set()
        else:
            synced.make(op)
            pending += _units(op)
        if at < start:
            continue
        for chosen in _subsets(len(pending), rng):
            disk = synced.copy()
            for survives, each in zip(chosen, pending, strict=True):
                if survives:
                    disk.apply(each)
            tree = disk.tree()
            if (key := hash(frozenset(tree.items()))) not in seen:
                seen.add(key)
                yield tree, [what for what in promised if what is not None]


def _units(op: Op) -> Iterator[Op]:
    """What of an operation may be lost alone."""
    if op.kind != "write":
        yield op
        return
    yield Op("grow", op.node, offset=op.offset + len(op.data))  # the length may be there and the bytes not
    at = 0
    while at < len(op.data):
        n = min(PAGE - (op.offset + at) % PAGE, len(op.data) - at)
        yield Op("write", op.node, offset=op.offset + at, data=op.data[at : at + n])
        at += n


def _subsets(n: int, rng: random.Random) -> Iterator[tuple[bool, ...]]:
    """Which of n survive: the order is that in which faults are found soonest."""
    yield (True,) * n
    if n <= EXHAUSTIVE:
        yield from itertools.islice(itertools.product((True, False), repeat=n), 1, None)
        return
    yield (False,) * n
    for i in range(n):
        yield tuple(k == i for k in range(n))
        yield tuple(k != i for k in range(n))
        yield tuple(k < i for k in range(n))
        yield tuple(k > i for k in range(n))
    for _ in range(16):
        yield tuple(rng.random() < 0.5 for _ in range(n))


# -- what was done


class Killed(BaseException):
    """The process is no more: nothing in it may go on, ``finally`` neither."""


class Recorder:
    """Writes down in ``log`` what is done under ``root``, an empty directory, by whatever means of Python's.

    fault: called with the kind of each operation (``rmdir``, ``write``) before it is done; what it raises, the program
    gets. Of a write, half is done then. Locks are left out.
    """

    def __init__(self, root):
        self.root = os.path.abspath(root)
        self.log: list[Op] = []
        self.fault: Callable[[str], None] | None = None
        self._live = Disk()
        self._fds: dict[int, int] = {}
        self._nodes = itertools.count(1)
        self._lock = threading.RLock()

    def mark(self, what: Any) -> None:
        """Note a promise, and see that nothing was done of which the log does not know."""
        with self._lock:
            assert self._live.tree() == tree_of(Path(self.root)), "something was not recorded"
            self.log.append(Op("mark", what=what))

    def damage(self, change: Callable[[Any], None]) -> None:
        """Let ``change`` do something to the files under the root that is no doing of the program, and is synced."""
        with self._lock:
            change(Path(self.root))
            live, real = self._live.tree(), tree_of(Path(self.root))
            for name in live.keys() | real.keys():
                if live.get(name) == real.get(name) and (name in live) == (name in real):
                    continue
                directory, last, node = self._find(os.path.join(self.root, name))
                assert node is not None, "damage makes no files"
                if name in real:
                    data = real[name]
                    self._note(Op("resize", node, offset=len(data)))
                    self._note(Op("write", node, data=data))
                    self._note(Op("sync", node))
                else:
                    self._note(Op("unlink", node, directory, last))
                    self._note(Op("sync", directory))

    def _note(self, op: Op) -> None:
        self.log.append(op)
        self._live.apply(op)

    def _find(self, path: Any, dir_fd: int | None = None) -> tuple[int, str, int | None] | None:
        """Directory, name there and node (None: there is none) of a path under the root; else None."""
        if isinstance(path, int):
            return None
        at = 0
        if dir_fd is not None:
            if dir_fd not in self._fds:
                return None
            at, parts = self._fds[dir_fd], [os.fspath(path)]
        else:
            relative = os.path.relpath(os.path.abspath(os.fspath(path)), self.root)
            if relative.startswith("..") or is_lock(relative):
                return None
            parts = [] if relative == "." else relative.split(os.sep)
        if not parts:
            return 0, "", 0
        for part in parts[:-1]:
            at = self._live.names.get(at, {}).get(part, -1)
        return at, parts[-1], self._live.names.get(at, {}).get(parts[-1])

    def _before(self, kind: str) -> None:
        if self.fault is not None:
            self.fault(kind)

    def install(self, monkeypatch) -> None:
        real = {name: getattr(os, name) for name in (*_KNOWN, *_UNKNOWN)}
        real_open = io.open

        def names(kind: str, name: str) -> Callable[..., Any]:
            def call(path, *args, dir_fd=None, **kw):
                with self._lock:
                    found = self._find(path, dir_fd)
                    if found is not None:
                        self._before(name)
                    result = real[name](path, *args, dir_fd=dir_fd, **kw)
                    if found is not None:
                        directory, last, node = found
                        self._note(Op(kind, next(self._nodes) if node is None else node, directory, last))
                    return result

            return call

        def rename(src, dst):
            with self._lock:
                found = self._find(src), self._find(dst)
                if found == (None, None):
                    real["rename"](src, dst)
                    return
                (one, name, node), (other, to, _) = found
                assert one == other, "a rename from one directory to another is not modelled"
                self._before("rename")
                real["rename"](src, dst)
                self._note(Op("rename", node, one, name, to))

        def opened(found, flags, fd) -> int:
            """The node of what is open as ``fd``."""
            directory, name, node = found
            if node is None:
                node = next(self._nodes)
                self._note(Op("create", node, directory, name))
            elif flags & os.O_TRUNC:
                self._note(Op("resize", node))
            self._fds[fd] = node
            return node

        def open_(path, flags, mode=0o777, *, dir_fd=None):
            with self._lock:
                found = self._find(path, dir_fd)
                if found is not None and flags & (os.O_CREAT | os.O_TRUNC):
                    self._before("create")
                fd = real["open"](path, flags, mode, dir_fd=dir_fd)
                if found is not None:
                    opened(found, flags, fd)
                return fd

        def close(fd):
            with self._lock:
                self._fds.pop(fd, None)
                return real["close"](fd)

        def write(fd, node, offset, data, do) -> int:
            """do: writes some of the bytes; returns how many it did."""
            try:
                self._before("write")
            except Exception:
                done = do(data[: len(data) // 2])
                self._note(Op("write", node, offset=offset, data=bytes(data[:done])))
                raise
            done = do(data)
            self._note(Op("write", node, offset=offset, data=bytes(data[:done])))
            return done

        def write_(fd, data):
            with self._lock:
                if fd not in self._fds:
                    return real["write"](fd, data)
                at = os.lseek(fd, 0, os.SEEK_CUR)
                return write(fd, self._fds[fd], at, memoryview(data), lambda part: real["write"](fd, part))

        def pwrite(fd, data, offset):
            with self._lock:
                if fd not in self._fds:
                    return real["pwrite"](fd, data, offset)
                do = lambda part: real["pwrite"](fd, part, offset)  # noqa: E731
                return write(fd, self._fds[fd], offset, memoryview(data), do)

        def ftruncate(fd, length):
            with self._lock:
                real["ftruncate"](fd, length)
                if fd in self._fds:
                    self._note(Op("resize", self._fds[fd], offset=length))

        def fsync(fd):
            with self._lock:
                if fd in self._fds:
                    self._before("sync")
                real["fsync"](fd)
                if fd in self._fds:
                    kind = "names" if self._fds[fd] in self._live.names else "bytes"
                    self._note(Op("sync", self._fds[fd], site=f"{_site()} {kind}"))

        def unknown(name):
            def call(*args, **kw):
                for each in args:
                    ours = (
                        each in self._fds
                        if isinstance(each, int)
                        else isinstance(each, str | Path) and self._find(each)
                    )
                    assert not ours, f"os.{name} is not known to the recorder"
                return real[name](*args, **kw)

            return call

        class File(io.FileIO):
            """What ``open`` opens for writing: the calls that reach the system, not those of the program."""

            def write(file, data):
                with self._lock:
                    view = memoryview(data).cast("B")
                    at = os.lseek(file.fileno(), 0, os.SEEK_END if "a" in file.mode else os.SEEK_CUR)
                    return write(file.fileno(), self._fds[file.fileno()], at, view, super().write)

            def truncate(file, size=None):
                with self._lock:
                    size = super().truncate(size)
                    self._note(Op("resize", self._fds[file.fileno()], offset=size))
                    return size

            def close(file):
                with self._lock:
                    if not file.closed:
                        self._fds.pop(file.fileno(), None)
                    super().close()

        def open_file(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **kw):
            with self._lock:
                found = self._find(path)
                if found is None:
                    return real_open(path, mode, buffering, encoding, errors, newline, *args, **kw)
                reads = mode.strip("bt") == "r"
                if not reads and (found[2] is None or "w" in mode):
                    self._before("create")
                raw = File(path, mode.replace("b", "").replace("t", ""))
                opened(found, os.O_TRUNC * ("w" in mode), raw.fileno())
                if buffering == 0:
                    return raw
                buffer = io.BufferedRandom if "+" in mode else io.BufferedReader if reads else io.BufferedWriter
                return buffer(raw) if "b" in mode else io.TextIOWrapper(buffer(raw), encoding, errors, newline)

        patches = {
            "mkdir": names("mkdir", "mkdir"),
            "rmdir": names("unlink", "rmdir"),
            "unlink": names("unlink", "unlink"),
            "remove": names("unlink", "remove"),
            "rename": rename,
            "replace": rename,
            "open": open_,
            "close": close,
            "write": write_,
            "pwrite": pwrite,
            "ftruncate": ftruncate,
            "fsync": fsync,
        }
        assert patches.keys() == set(_KNOWN)
        for name in _UNKNOWN:
            patches[name] = unknown(name)
        for name, patch in patches.items():
            monkeypatch.setattr(os, name, patch)
        monkeypatch.setattr(io, "open", open_file)
        monkeypatch.setattr(builtins, "open", open_file)


_KNOWN = tuple(
    [
        "mkdir",
        "rmdir",
        "unlink",
        "remove",
        "rename",
        "replace",
        "open",
        "close",
        "write",
        "pwrite",
        "ftruncate",
        "fsync",
    ]
)
_UNKNOWN = tuple(
    name
    for name in [
        "truncate",
        "link",
        "symlink",
        "writev",
        "pwritev",
        "sendfile",
        "copy_file_range",
        "fdatasync",
        "posix_fallocate",
        "mkfifo",
    ]
    if hasattr(os, name)
)


def _site() -> str:
    """File and line of what syncs: of functions that are made for that, and contexts, what uses them."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in SYNCING or frame.f_code.co_filename == contextlib.__file__:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
