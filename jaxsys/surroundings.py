"""What a program that is traced depends on beside its arguments: versions, the environment, and the code itself."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, of this program and of the libraries, by name."""
    try:
        own = version("jaxsys")
    except PackageNotFoundError:  # run from its sources
        own = "not installed"
    return {"Python": platform.python_version(), "jaxsys": own, **{name: version(name) for name in PACKAGES}}


def variables() -> dict[str, str]:
    """Of the environment, by name; empty where there is none."""
    return {name: os.environ.get(name, "") for name in VARIABLES}


@functools.cache
def code() -> str:
    """A digest of the sources of the four libraries."""
    root = Path(__file__).resolve().parents[1]
    packages = (root / name for name in ("parallelism", "checkpoint", "pipelines", "jaxsys"))
    paths = [path for package in packages for path in sorted(package.rglob("*.py"))]
    return digest(part for path in paths for part in (str(path.relative_to(root)).encode(), path.read_bytes()))


def digest(parts: Iterable[bytes]) -> str:
    """Of parts, each with its length."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
