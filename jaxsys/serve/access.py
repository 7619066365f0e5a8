"""What a server needs before it can start: its packages, and the keys of its clients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from parallelism.errors import UserError

_NEEDS = ("starlette", "uvicorn", "prometheus_client")


def require() -> None:
    """Raises UserError where a package is missing."""
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve: {missing[0]} is not installed: pip install 'jaxsys[serve]'")


def read_keys(path: Path) -> list[str]:
    """API keys, one a line; empty lines and those that begin with # are none. Raises UserError for a file without."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found no UTF-8 text, expected API keys, one a line") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"{path}: found no key, expected one a line")
    return keys
