"""What a run may change when it goes on, what it may not, and what makes it this run and no other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from jaxsys.train.config import ExpertsConfig
from parallelism.errors import UserError

# What a checkpoint's meta must have the same, and the configuration's keys that only the beginning of a run reads.
PARTS = ("model", "rng", "data")
BEGINNING = ("init_from", "parameter_dtype")
TRAINING = tuple(field.name for field in dataclasses.fields(ExpertsConfig))


def refuse(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where the metas of a checkpoint and of this start are of runs that cannot be one."""
    for part in (*PARTS, "config"):
        there, here = (_lasting(part, meta.get(part, {})) for meta in (before, now))
        keys = BEGINNING if part == "config" else here
        if changed := [key for key in keys if there.get(key) != here[key]]:
            raise UserError(
                f"{run} was trained with another {part}: "
                + ", ".join(f"{key}={there.get(key)!r} there, {here[key]!r} now" for key in changed)
                + "; resume with the same, or give another run directory"
            )


def _lasting(part: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of a meta without what only training reads of a model, which may be another from here on."""
    if part != "model" or not values.get("experts"):
        return values
    return {**values, "experts": {k: v for k, v in values["experts"].items() if k not in TRAINING}}


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
    """What the configuration was and is, by key, where it is not the same; of the model what it comes to."""
    there, here = (
        dict(flat({**meta.get("config", {}), "model": meta.get("model"), "experts": None})) for meta in (before, now)
    )
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
