"""Where text comes from: the standard library, or files by path, folder or glob."""

from __future__ import annotations

import ast
import dataclasses
import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Container, Iterator
from pathlib import Path

import xxhash

from parallelism.errors import UserError

STDLIB = ("stdlib", "stdlib-docs", "stdlib-code")

# What of a folder is text: a glob or a single path takes any file.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")

# Left out of "stdlib-code": installed packages, tests, applications, and tables that are data more than text.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
_NOT_STDLIB |= {"ensurepip", "encodings", "pydoc_data", "__phello__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the name by which reports call it."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    name: str
    read: Callable[[Path, str], Iterator[Document]]


class Documents:
    """The documents of a source, in an order that depends on the source alone; iterate it as often as you like.

    spec, limit: as given to ``documents``.
    total_bytes: size of the files, an upper bound on the text's.
    """

    def __init__(self, spec: str, limit: int | None = None):
        if limit is not None and limit < 1:
            raise UserError(f"data {spec!r}: a limit of {limit} documents leaves none; give at least 1")
        self.spec, self.limit = spec, limit
        self._files = _find(spec)
        self.total_bytes = sum(file.path.stat().st_size for file in self._files)

    def __iter__(self) -> Iterator[Document]:
        every = itertools.chain.from_iterable(file.read(file.path, file.name) for file in self._files)
        return itertools.islice(every, self.limit)

    @property
    def fingerprint(self) -> str:
        """Changes when a file's name, size or modification time does."""
        state = [str(self.limit)]
        for file in self._files:
            stat = file.path.stat()
            state.append(f"{file.path}\0{stat.st_size}\0{stat.st_mtime_ns}")
        return xxhash.xxh3_128_hexdigest("\n".join(state).encode(errors="surrogateescape"))


def documents(spec: str, limit: int | None = None) -> Documents:
    """The documents that ``spec`` names, at most ``limit``.

    spec: ``stdlib-docs`` (the language reference in ``pydoc_data.topics``), ``stdlib-code`` (the standard library's
    non-empty .py files, less installed packages, tests and applications), ``stdlib`` (both); a file; a folder, of
    which files with TEXT_SUFFIXES are taken at any depth, hidden ones left out; or a glob (``**`` for any depth).

    A file is one document, a ``.jsonl`` file one a line (the field "text"). Names are relative to the folder, or to
    the fixed part of the glob.

    Raises UserError, here or while iterating, naming the file that is missing, empty or not UTF-8 text.
    """
    return Documents(spec, limit)


def _find(spec: str) -> list[_File]:
    if spec in STDLIB:
        return [*(_stdlib_docs() if spec != "stdlib-code" else []), *(_stdlib_code() if spec != "stdlib-docs" else [])]
    path = Path(spec).expanduser()
    if path.is_file():
        return [_file(path, path.name)]
    if path.is_dir():
        paths = [p for p in _walk(path) if p.suffix in TEXT_SUFFIXES]
        if not paths:
            raise UserError(f"data {spec!r}: the folder holds no {', '.join(TEXT_SUFFIXES)} files; a glob takes any")
        return [_file(p, p.relative_to(path).as_posix()) for p in paths]
    if glob.has_magic(spec):
        paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not paths:
            raise UserError(f"data {spec!r}: no file matches; check the glob")
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        return [_file(p, p.relative_to(fixed).as_posix()) for p in paths]
    raise UserError(f"data {spec!r}: no such file or folder; expected a path, a glob, or {', '.join(STDLIB)}")


def _walk(root: Path, skip: Container[str] = ()) -> list[Path]:
    """Files at any depth, sorted by path; hidden ones and folders called as in ``skip`` left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _file(path: Path, name: str) -> _File:
    return _File(path, name, _read_jsonl if path.suffix == ".jsonl" else _read_text)


def _stdlib_root() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise UserError(f"data 'stdlib': {root} is not a folder; this Python has no library sources, give a path")
    return root


def _stdlib_code() -> list[_File]:
    root = _stdlib_root()
    # Empty files, mostly __init__.py, are no texts; _sysconfigdata is the record of one build.
    paths = [
        p
        for p in _walk(root, _NOT_STDLIB)
        if p.suffix == ".py" and p.stat().st_size and not p.name.startswith("_sysconfigdata")
    ]
    return [_File(path, path.relative_to(root).as_posix(), _read_text) for path in paths]


def _stdlib_docs() -> list[_File]:
    path = _stdlib_root() / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise UserError(f"data 'stdlib-docs': {path} is missing; install the complete Python, or take 'stdlib-code'")
    return [_File(path, "topics", _read_topics)]


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the text ({error.strerror})") from error
    return _decode(raw, path)


def _decode(raw: bytes, where: object) -> str:
    if not raw.strip():
        raise UserError(f"{where}: no text in it; remove it from the data")
    if b"\0" in raw:
        raise UserError(f"{where}: not text: NUL at byte {raw.index(0)}; expected UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read_text(path: Path, name: str) -> Iterator[Document]:
    yield Document(name, _text(path))


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    found = False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield Document(f"{name}:{number}", _jsonl_text(_decode(line, f"{path}:{number}"), path, number))
    except OSError as error:
        raise UserError(f"{path}: cannot read the text ({error.strerror})") from error
    if not found:
        raise UserError(f"{path}: no text in it; remove it from the data")


def _jsonl_text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}:{number}: expected a JSON object with a "text" field') from error
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{path}:{number}: the "text" field holds no text')
    return text


def _read_topics(path: Path, name: str) -> Iterator[Document]:
    # Read as data: the file is one assignment of a dictionary of strings.
    tree = ast.parse(_text(path))
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value)
    topics: dict[str, str] = ast.literal_eval(value)
    for topic in sorted(topics):
        yield Document(f"{name}/{topic}", topics[topic])
