"""What the processes of a job must have the same before they work together.

Processes that differ in any of it trace different programs, or fill one array from different files: they hang, or
compute what nobody asked for.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import xxhash

import jaxsys
from jaxsys import configuration
from jaxsys.hub import resolve
from jaxsys.train.config import TrainConfig
from jaxsys.train.resume import flat
from parallelism.coordinator import Coordinator
from parallelism.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

_PIECE = 1 << 16


def facts(config: TrainConfig) -> dict[str, str]:
    """By name for people: versions, settings of JAX, the code of these packages, the configuration key by key."""
    found = {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    found |= {name: str(jax.config.values[name]) for name in SETTINGS}
    found |= {f"the environment's {name}": os.environ.get(name, "") for name in VARIABLES}
    found["the code of jaxsys (digest)"] = _digest(_sources())
    return found | {f"configuration key {key}": repr(value) for key, value in flat(configuration.to_dict(config))}


def model_files(config: TrainConfig) -> dict[str, str]:
    """The files that a run begins with, by what a look at each shows: its size, and pieces of its ends and middle."""
    if config.init_from is None:
        return {}
    path = resolve(config.init_from).path
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {f"{config.init_from}: {p.relative_to(path.parent)} (size and digest)": _glance(p) for p in files}


def agree(coordinator: Coordinator, found: Mapping[str, str]) -> None:
    """Raises UserError, the same in all processes, for the first thing that is not the same in all."""
    if len(set(coordinator.gather("agree", _digest(f"{k}={v}".encode() for k, v in found.items())))) == 1:
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


def _sources() -> Iterator[bytes]:
    root = Path(jaxsys.__file__).parents[1]
    for package in ("parallelism", "checkpoint", "pipelines", "jaxsys"):
        for path in sorted((root / package).rglob("*.py")):
            yield str(path.relative_to(root)).encode()
            yield path.read_bytes()


def _digest(parts: Iterator[bytes]) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _glance(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:

        def pieces() -> Iterator[bytes]:
            for at in (0, (size - _PIECE) // 2, size - _PIECE):
                file.seek(max(at, 0))
                yield file.read(_PIECE)

        return f"{size} {_digest(pieces())}"
