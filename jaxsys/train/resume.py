"""What a run may change when it goes on, what it may not, and what makes it this run and no other."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from parallelism.errors import UserError

# What a checkpoint's meta must have the same, and the configuration's keys that only the beginning of a run reads.
PARTS = ("model", "rng", "data")
BEGINNING = ("init_from", "parameter_dtype")


def refuse(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where the metas of a checkpoint and of this start are of runs that cannot be one."""
    for part in (*PARTS, "config"):
        there, here = before.get(part, {}), now[part]
        keys = BEGINNING if part == "config" else here
        if changed := [key for key in keys if there.get(key) != here[key]]:
            raise UserError(
                f"{run} was trained with another {part}: "
                + ", ".join(f"{key}={there.get(key)!r} there, {here[key]!r} now" for key in changed)
                + "; resume with the same, or give another run directory"
            )


def refuse_optimizer(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError naming what makes this start's optimizer keep another state than the checkpoint's."""
    changed = [
        f"{key}={there!r} there, {here!r} now"
        for key, (there, here) in changes(before, now).items()
        if key.startswith("optim.optimizer.")
    ]
    raise UserError(
        f"{run} was trained with an optimizer that keeps another state: {', '.join(changed)}; resume with the same, or "
        "give another run directory"
    )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the configuration was and is, by key, where it is not the same."""
    there, here = dict(flat(before.get("config", {}))), dict(flat(now["config"]))
    return {key: (there[key], here[key]) for key in here if key in there and there[key] != here[key]}


def flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's values by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{where}{key}.")
        else:
            yield where + key, value


def own_directory(shared: str, run: Path) -> Path:
    """Where under ``shared`` this run's checkpoints lie: of no run that was here before, nor of a copy of this one."""
    mark = run / "id"
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), mark.open("x") as file:
        file.write(uuid.uuid4().hex)
    who = json.dumps([mark.read_text(), str(run.resolve())])
    return Path(shared) / xxhash.xxh3_64_hexdigest(who.encode())
