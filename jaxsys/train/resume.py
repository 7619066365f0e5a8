"""What a run that goes on has of its past: what it may change, what it may not, what makes it this run and no other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from checkpoint import CorruptError
from checkpoint.reader import CheckpointReader
from checkpoint.storage import committed, files_of
from jaxsys.train.config import ExpertsConfig
from parallelism.errors import UserError

# What a checkpoint's meta must have the same, and the configuration's keys that only the beginning of a run reads.
PARTS = ("model", "rng", "data")
BEGINNING = ("init_from", "parameter_dtype")
TRAINING = tuple(field.name for field in dataclasses.fields(ExpertsConfig))


@dataclasses.dataclass
class Progress:
    """Metrics of a run so far, through all its starts.

    tokens_seen: trained on, padding not counted. training_seconds: of steps, without set-up, evaluation and waits for
    checkpoints. loss: of the last step. heldout_loss: the last one, of the weights after heldout_step; a
    checkpoint of others has None.
    """

    tokens_seen: float = 0.0
    training_seconds: float = 0.0
    loss: float | None = None
    heldout_loss: float | None = None
    heldout_step: int | None = None


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


def refuse_frozen(run: Path, before: Sequence[str], now: Sequence[str]) -> None:
    """Raises UserError naming what was not trained there and is not here."""
    raise UserError(
        f"{run} trained other parameters: freeze={list(before)} there, {list(now)} now, and it has optimizer state of "
        "those alone; resume with the same, or begin another run from its parameters (jaxsys reshard --format hf, "
        "then init_from)"
    )


def check_position(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError unless the next batch begins where the checkpoint's meta says that it does."""
    there = before.get("position", now)  # which checkpoints of earlier versions do not say
    if changed := [key for key in now if there.get(key) != now[key]]:
        raise UserError(
            f"{run}: the batch after step {now['step']} is another than in the run so far: "
            + ", ".join(f"{key}={there.get(key)!r} there, {now[key]!r} now" for key in changed)
            + "; resume with the version of jaxsys and numpy that it was trained with, or give another run directory"
        )


def versions_line(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What the checkpoint was written with and this start has not, in a line; empty where nothing changed."""
    there, here = before.get("versions", {}), now["versions"]
    changed = [
        f"{name} {there[name]} before, {here[name]}" for name in here if there.get(name, here[name]) != here[name]
    ]
    return f"versions: {', '.join(changed)} from here on" if changed else ""


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


def identity(run: Path, remote: str | None) -> str:
    """What tells a run from every other, as its file ``id`` has it; made where there is none.

    Where the disk is lost only ``remote`` can say, of a run with the same path. Raises UserError if that holds the
    checkpoints of another run, or of one that this is a copy of, or cannot be read.
    """
    mark, here = run / "id", str(run.resolve())
    ours = _id_in(mark)
    known = _newest_meta(remote).get("run") if remote is not None else None
    if isinstance(known, Mapping):
        theirs, there = known["id"], known["at"]
        copy = theirs == ours and there != here and _id_in(Path(there) / mark.name) == ours
        if copy or (theirs != ours and there != here):
            raise UserError(
                f"checkpoint.remote={remote} holds the checkpoints of {there}: give {run} one of its own "
                f"(to begin with what is there: jaxsys checkpoint copy {remote} {run}/checkpoints)"
            )
        ours = ours or theirs
    run.mkdir(parents=True, exist_ok=True)
    if _id_in(mark) is None:
        mark.unlink(missing_ok=True)  # a process that was killed left it empty
        with contextlib.suppress(FileExistsError), mark.open("x") as file:
            file.write(ours or uuid.uuid4().hex)
    return mark.read_text()


def _id_in(mark: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return mark.read_text() or None
    return None


def _newest_meta(place: str | Path) -> Mapping[str, Any]:
    try:
        for _, at in reversed(committed(place)):
            with contextlib.suppress(CorruptError):
                meta = CheckpointReader(files_of(at)).manifest.meta
                return meta if isinstance(meta, Mapping) else {}
    except OSError as e:
        raise UserError(f"checkpoints in {place} cannot be read: {e.strerror or e}; see that it can be reached") from e
    return {}


def own_directory(shared: str, run: Path, who: str) -> Path:
    """Where under ``shared`` a run's checkpoints lie: of no run that was here before, nor of a copy of this one."""
    return Path(shared) / xxhash.xxh3_64_hexdigest(json.dumps([who, str(run.resolve())]).encode())
