"""Tables and sizes for people."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], right: int) -> list[str]:
    """One line a row; columns from number ``right`` on are flush right, those before flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i >= right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def in_units(n: float) -> str:
    """A number of bytes as ``216.0 KiB``."""
    n, unit = _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"


def decimal(n: float) -> str:
    """A number of bytes as ``221.2 kB``, in four digits: for what people give in GB and GB/s, and compare with that."""
    n, unit = _scaled(n, 1000, ("B", "kB", "MB", "GB", "TB"))
    return f"{n:.4g} {unit}"


def _scaled(n: float, step: int, units: Sequence[str]) -> tuple[float, str]:
    for unit in units:
        if n < step or unit == units[-1]:
            break
        n /= step
    return n, unit
