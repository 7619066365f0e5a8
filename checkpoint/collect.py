"""Room in a place: old steps go, and files that no manifest names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from checkpoint.inspect import StepInfo, list_steps
from checkpoint.manifest import MANIFEST, CorruptError
from checkpoint.places import Place
from checkpoint.storage import Store
from parallelism.errors import UserError


@dataclasses.dataclass(frozen=True)
class Collected:
    """What went, or would go: steps, and all files as ``<directory>/<name>`` with their bytes in sum."""

    steps: tuple[int, ...]
    files: tuple[str, ...]
    nbytes: int


def collect(place: Place, keep: int | None = None, every: int | None = None, dry_run: bool = False) -> Collected:
    """Remove files that no manifest names and, with ``keep``, steps older than the newest ``keep`` good ones.

    every: of those older ones, the good ones that it divides stay. Good are steps whose manifest is, and whose files
    are long enough; chunks are not read. No file that a step uses which stays is touched; beside a damaged manifest,
    nothing is, until its step goes. A manifest goes before what it names: after an interruption, call it again.
    dry_run: remove nothing.
    Raises UserError while a run writes there, and for a step that only a newer program can read.
    """
    if place.only is not None:
        raise UserError(f"{place.where} is one step, expected a run or the directory of its checkpoints")
    if keep is not None and keep < 1:
        raise UserError(f"keep {keep}: expected at least 1")
    if every is not None and (keep is None or every < 1):
        raise UserError(f"every {every}: expected at least 1, and with it how many of the newest to keep (--keep)")
    with place.writing():
        return collect_locked(place.store, keep, every, dry_run)


def collect_locked(store: Store, keep: int | None = None, every: int | None = None, dry_run: bool = False) -> Collected:
    """``collect`` for who writes there already."""
    steps = list_steps(Place(store))
    if foreign := next((info for info in steps if info.foreign), None):
        raise UserError(f"nothing is removed, as what that step uses is not known: {foreign.error}")
    going = _old(steps, keep, every)
    names = store.names()
    used = {file for info in steps if info not in going for file in info.files}
    for info in steps:
        if info not in going:
            # Of a damaged manifest nobody knows what it names.
            beside = [MANIFEST] if info.version is not None else names[info.directory]
            used |= {(info.directory, name) for name in beside}
    unused = {directory: [n for n in sorted(own) if (directory, n) not in used] for directory, own in names.items()}
    nbytes = sum(_size(store, directory, name) for directory, own in unused.items() for name in own)
    files = tuple(f"{directory}/{name}" for directory, own in sorted(unused.items()) for name in own)
    if not dry_run:
        for info in going:
            store.delete(info.directory, [MANIFEST])
        for directory, own in unused.items():
            # What held nothing but its manifest has gone with it.
            if (rest := [name for name in own if name != MANIFEST]) or not names[directory]:
                store.delete(directory, rest)
    return Collected(tuple(info.step for info in going if info.step is not None), files, nbytes)


def _old(steps: Sequence[StepInfo], keep: int | None, every: int | None) -> list[StepInfo]:
    """Which of these steps, ascending, go."""
    good = [info for info in steps if info.error is None]
    if keep is None or not good:
        return []
    oldest = steps.index(good[-keep:][0])
    return [i for i in steps[:oldest] if i.error is not None or every is None or i.step is None or i.step % every]


def _size(store: Store, directory: str, name: str) -> int:
    try:
        return store.open(directory).size(name)
    except CorruptError:  # a name that leads nowhere
        return 0
