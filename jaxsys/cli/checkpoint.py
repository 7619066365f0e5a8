"""``jaxsys checkpoint``: what lies in a place of checkpoints, whether it is good, and what to do with it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from parallelism.errors import UserError
from parallelism.text import columns, decimal

if TYPE_CHECKING:
    from checkpoint.compare import ArrayDiff, Source
    from checkpoint.inspect import StepInfo
    from checkpoint.places import Place
    from checkpoint.storage import Store

# The exit code of what was found, which is no error of the user's.
FOUND = 1

TOKENIZER = "tokenizer"

Globs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="GLOB")]


@dataclasses.dataclass(frozen=True)
class ListArgs:
    """List the steps of runs: when they were written, and what they take."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]
    """Runs, directories of checkpoints, or single steps."""
    json: bool = False
    """Print the list as JSON."""

    def run(self) -> int:
        from checkpoint.inspect import list_steps
        from checkpoint.places import find_place

        if not self.paths:
            raise UserError("checkpoint ls: found no PATH, expected at least one; see jaxsys checkpoint ls --help")
        found = {path: list_steps(find_place(path)) for path in self.paths}
        if self.json:
            _print_json([{"path": path, **info.to_json()} for path, steps in found.items() for info in steps])
            return 0
        for number, (path, steps) in enumerate(found.items()):
            if len(found) > 1:
                print("\n" * (number > 0) + f"{path}:")
            print(*(self._table(steps) or ["no checkpoint yet"]), sep="\n")
        return 0

    @staticmethod
    def _table(steps: Sequence[StepInfo]) -> list[str]:
        """A line a step, and one more for each with which something is wrong."""
        if not steps:
            return []
        rows: list[tuple[str, ...]] = [("step", "written", "state", "format", "arrays", "bytes", "own", "shared")]
        for info in steps:
            step = "-" if info.step is None else str(info.step)
            if info.version is None:
                state = "unreadable" if info.foreign else "damaged"
                rows.append((step, _date(info.written), state, *["-"] * 5))
                continue
            sizes = (decimal(n) for n in (info.nbytes, info.own_bytes, info.shared_bytes))
            state = "good" if info.error is None else "damaged"
            rows.append((step, _date(info.written), state, str(info.version), str(info.arrays), *sizes))
        return [*columns(rows, right=3), *(f"step {info.step}: {info.error}" for info in steps if info.error)]


@dataclasses.dataclass(frozen=True)
class ShowArgs:
    """Show what the newest step, or the one named, holds: its meta and its arrays."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A run, a directory of checkpoints, or one step."""
    select: Globs = ()
    """Only arrays whose names match, such as 'layers.*'; repeated, this or another."""
    json: bool = False
    """Print it as JSON."""

    def run(self) -> int:
        from checkpoint.compare import matching
        from checkpoint.places import find_place

        reader = find_place(self.path).newest()
        manifest = reader.manifest
        chosen = {name: manifest.arrays[name] for name in matching(self.select, manifest.arrays, reader.where)}
        if self.json:
            arrays = {
                name: {
                    "dtype": array.dtype.name,
                    "shape": array.shape,
                    "axes": array.axes,
                    "chunks": len(array.chunks),
                    "nbytes": array.nbytes,
                }
                for name, array in chosen.items()
            }
            _print_json({"where": reader.where, "step": manifest.step, "meta": manifest.meta, "arrays": arrays})
            return 0
        print(f"{reader.where}: step {manifest.step}")
        meta = [(key, json.dumps(value)) for key, value in _flat(manifest.meta)]
        rows = [("array", "dtype", "shape", "axes", "chunks", "bytes")]
        for name, array in chosen.items():
            axes = ", ".join(axis or "-" for axis in array.axes)
            shape, chunks = " x ".join(map(str, array.shape)), str(len(array.chunks))
            rows.append((name, array.dtype.name, shape or "scalar", axes, chunks, decimal(array.nbytes)))
        print("", *(columns(meta, right=2) if meta else ["no meta"]), "", *columns(rows, right=4), sep="\n")
        nbytes = sum(array.nbytes for array in chosen.values())
        print(f"\n{len(chosen)} of {len(manifest.arrays)} arrays, {decimal(nbytes)} of {decimal(manifest.nbytes)}")
        return 0


@dataclasses.dataclass(frozen=True)
class VerifyArgs:
    """Read every chunk of the newest step, or of all, and compare digests.

    Exit code: 0 if all is good or mended, 1 if something is damaged, 2 if it could not be looked at.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A run, a directory of checkpoints, or one step."""
    all: bool = False
    """Every step."""
    repair: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="OTHER")] = ()
    """A place with the same chunks: what is damaged is mended from there; repeated, from this or another."""
    json: bool = False
    """Print what was found as JSON."""

    def run(self) -> int:
        from checkpoint.inspect import verify
        from checkpoint.places import find_place
        from jaxsys.console import Console

        place, others = find_place(self.path), [find_place(other) for other in self.repair]
        console = Console()
        with console.stage(f"verify {self.path}"), console.megabytes("verify") as progress:
            reports = verify(place, self.all, others, progress)
        if self.json:
            _print_json([{**dataclasses.asdict(report), "ok": report.ok} for report in reports])
        else:
            for report in reports:
                print(f"{report.where}: {'good' if report.ok else 'DAMAGED'}, ", end="")
                print(f"{report.chunks} chunks, {decimal(report.nbytes)}")
                for damage in report.damage:
                    mended = f"; mended from {damage.mended_from}" if damage.mended_from else ""
                    print(f"  {damage.message}{mended}")
        return 0 if all(report.ok for report in reports) else FOUND


@dataclasses.dataclass(frozen=True)
class DiffArgs:
    """Compare the arrays of two checkpoints, or of models in other files: which differ, where and by how much.

    Exit code: 0 if they are the same, 1 if not, 2 if they could not be compared.
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A run, a directory of checkpoints (of either the newest step) or one step; or a model as generate takes it, whose
    arrays are read in float32."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The same."""
    select: Globs = ()
    """Only arrays whose names match, such as 'layers.*'; repeated, this or another."""
    tolerance: float | None = None
    """Compare values, of any dtype: those are the same that differ by at most this part of the larger one. The default
    is that every bit must be the same."""
    full: bool = False
    """Read also what has the same digest on both sides."""
    json: bool = False
    """Print what was found as JSON."""

    def run(self) -> int:
        from checkpoint.compare import diff
        from jaxsys.console import Console

        a, b = _source(self.a), _source(self.b)
        console = Console()
        with console.stage("diff") as said, console.megabytes("diff") as progress:
            report = diff(a, b, self.select, self.tolerance, self.full, progress)
            said.append(f"{decimal(report.compared_bytes)} read, {decimal(report.skipped_bytes)} with the same digests")
        if self.json:
            _print_json({**dataclasses.asdict(report), "same": report.same})
        else:
            for array in report.differing:
                print(f"{array.name}: {_difference(array)}")
            print(f"{len(report.differing)} of {report.arrays} arrays differ" if report.differing else "the same")
        return 0 if report.same else FOUND


@dataclasses.dataclass(frozen=True)
class CopyArgs:
    """Copy the newest good step, or all, to another directory of checkpoints; what they share stays shared.

    A tokenizer beside them is copied too. After an interruption the same command goes on.
    Exit code: 0; 1 if --all met damaged steps, which are left out; 2 if nothing could be copied.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run, a directory of checkpoints, or one step."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """A directory of checkpoints, made if it is missing, in which nobody writes; or a run."""
    all: bool = False
    """Every good step."""

    def run(self) -> int:
        from checkpoint.copying import copy_steps
        from checkpoint.places import find_place, root_of
        from jaxsys.console import Console

        source = find_place(self.source)
        source.some_directories()  # before anything is made
        target, console = root_of(self.destination), Console()
        with console.stage(f"copy {self.source}") as said, console.megabytes("copy") as progress:
            copied = copy_steps(source, target, self.all, progress)
            _copy_tokenizer(source, target)
            said.append(f"{decimal(copied.nbytes)} written, {decimal(copied.kept_bytes)} there already or shared")
        for step in copied.steps:
            print(f"{target.where}: step {step}")
        return FOUND if self.all and copied.damaged else 0


@dataclasses.dataclass(frozen=True)
class CollectArgs:
    """Make room: remove files that no step uses and, if asked, old steps. A directory that a run writes is refused."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A run, or a directory of checkpoints."""
    keep: int | None = None
    """Keep this many of the newest good steps; the default is all."""
    every: int | None = None
    """Of the older ones keep those that this divides."""
    dry_run: bool = False
    """Say what would be removed, and remove nothing."""

    def run(self) -> int:
        from checkpoint.collect import collect
        from checkpoint.places import find_place

        found = collect(find_place(self.path), self.keep, self.every, self.dry_run)
        for step in found.steps:
            print(f"step {step}")
        print(f"{'would free' if self.dry_run else 'freed'} {decimal(found.nbytes)}, files: {len(found.files)}")
        return 0


SUBCOMMANDS: dict[str, Any] = {
    "ls": ListArgs,
    "show": ShowArgs,
    "verify": VerifyArgs,
    "diff": DiffArgs,
    "copy": CopyArgs,
    "gc": CollectArgs,
}
Subcommand: Any = functools.reduce(
    operator.or_, [Annotated[args, tyro.conf.subcommand(name)] for name, args in SUBCOMMANDS.items()]
)


@dataclasses.dataclass(frozen=True)
class CheckpointArgs:
    """Look after checkpoints: list, show, verify and mend, compare, copy, remove."""

    command: Subcommand
    subcommands: ClassVar[dict[str, Any]] = SUBCOMMANDS

    def run(self) -> int:
        return self.command.run()


def _source(path: str) -> Source:
    """What ``diff`` is to read at a path, or by a model's name."""
    from pathlib import Path

    from checkpoint import CheckpointSource
    from checkpoint.places import find_place
    from jaxsys.export import open_source
    from jaxsys.hub import is_native

    native = "://" in path or any(is_native(Path(path, part)) for part in ("", "checkpoints"))
    return CheckpointSource(find_place(path).newest()) if native else open_source(path)[0]


def _copy_tokenizer(source: Place, target: Store) -> None:
    """Copies the tokenizer beside checkpoints, where both places are directories and the target has none."""
    from checkpoint.storage import LocalDraft, LocalStore

    if not isinstance(source.store, LocalStore) or not isinstance(target, LocalStore):
        return
    places = (source.store.root / (source.only or "") / TOKENIZER, source.store.root / TOKENIZER)
    found = next((place for place in places if place.is_dir()), None)
    if found is not None and not (target.root / TOKENIZER).exists():
        draft = LocalDraft(target.root / TOKENIZER)
        draft.begin()
        shutil.copytree(found, draft.directory, dirs_exist_ok=True)
        draft.commit()


def _difference(array: ArrayDiff) -> str:
    """What a person reads of an array that differs."""
    for side, other in ((0, "A"), (1, "B")):
        if array.shapes[side] is None:
            return f"not in {other}"
    shapes = [list(shape) for shape in array.shapes if shape is not None]
    if shapes[0] != shapes[1]:
        return f"shape {shapes[0]} in A, {shapes[1]} in B"
    said = [f"dtype {array.dtypes[0]} in A, {array.dtypes[1]} in B"] if array.dtypes[0] != array.dtypes[1] else []
    if array.different:
        elements = math.prod(shapes[0])
        said.append(f"{array.different} of {elements} elements")
        said.append(f"at most {array.largest_difference:.3g} (relative {array.largest_relative:.3g})")
        said += [f"{array.nans} NaN on one side"] if array.nans else []
        said.append(f"most at {list(array.where or ())}")
    else:
        said.append("the same values")
    return ", ".join(said)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is in dictionaries within dictionaries, by keys joined by dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _date(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _print_json(value: Any) -> None:
    """One JSON value; infinity, which JSON does not have, is "inf"."""
    print(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
