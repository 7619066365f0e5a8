"""What the processes of a job must have the same before they work together.

Processes that differ in any of it trace different programs, or fill one array from different files: they hang, or
compute what nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from jaxsys import configuration
from jaxsys.hub import resolve
from jaxsys.surroundings import code, digest, variables, versions
from jaxsys.train.config import TrainConfig
from jaxsys.train.resume import flat
from parallelism.coordinator import Coordinator
from parallelism.errors import UserError

SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")

_PIECE = 1 << 16


def facts(config: TrainConfig) -> dict[str, str]:
    """By name for people: versions, settings of JAX, the code of these packages, the configuration key by key."""
    found = versions() | {name: str(jax.config.values[name]) for name in SETTINGS}
    found |= {f"the environment's {name}": value for name, value in variables().items()}
    found["the code of jaxsys (digest)"] = code()
    return found | {f"configuration key {key}": repr(value) for key, value in flat(configuration.to_dict(config))}


def model_files(config: TrainConfig) -> dict[str, str]:
    """The files that a run is made of, by what a look at each shows: its size, and pieces of its ends and middle."""
    found = {}
    if (table := Path(config.pipeline.schedule).expanduser()).suffix == ".json" and table.is_file():
        found[f"pipeline.schedule {table} (size and digest)"] = _glance(table)
    if config.init_from is not None:
        path = resolve(config.init_from).path
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found |= {f"{config.init_from}: {p.relative_to(path.parent)} (size and digest)": _glance(p) for p in files}
    return found


def agree(coordinator: Coordinator, found: Mapping[str, str]) -> None:
    """Raises UserError, the same in all processes, for the first thing that is not the same in all."""
    if len(set(coordinator.gather("agree", digest(f"{k}={v}".encode() for k, v in found.items())))) == 1:
        return
    first, *others = coordinator.gather("differ", dict(found))
    for index, other in enumerate(others, start=1):
        for name in {**first, **other}:
            here, there = (each.get(name, "none") for each in (first, other))
            if here != there:
                raise UserError(
                    f"{name}: process {index} has {there}, process 0 has {here}: expected the same in all: start "
                    "all with the same command, in the same environment"
                )


def _glance(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:

        def pieces() -> Iterator[bytes]:
            for at in (0, (size - _PIECE) // 2, size - _PIECE):
                file.seek(max(at, 0))
                yield file.read(_PIECE)

        return f"{size} {digest(pieces())}"
