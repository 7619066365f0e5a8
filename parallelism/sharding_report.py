"""What a plan costs: every array's shape, spec and bytes a device, and what is replicated and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

from parallelism.layout import Stored
from parallelism.rules import Rules
from parallelism.sharding import Decision, Plan
from parallelism.streaming import HOST
from parallelism.text import columns, in_units


@dataclasses.dataclass(frozen=True)
class Row:
    """One stored array.

    memory: ``device``, or ``host`` of an array that lies in the memory of the device's host.
    spec: mesh axes of each dimension, ``-`` for none; nbytes, padding: bytes of the whole stored array and of the
    padding in it; nbytes_per_device: bytes of one shard; replicated: every device holds all of it although there are
    several; why: why it is replicated, or a dimension of it padded or kept whole; empty if neither.
    """

    array: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    memory: str
    nbytes: int
    padding: int
    nbytes_per_device: int
    replicated: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Report:
    """``str()`` is a table for people, ``as_dicts()`` one for programs (JSON)."""

    mesh: dict[str, int]
    rows: tuple[Row, ...]
    decisions: tuple[Decision, ...]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def nbytes_per_device(self) -> int:
        """In the memory of a device."""
        return sum(row.nbytes_per_device for row in self.rows if row.memory != "host")

    @property
    def indivisible(self) -> list[str]:
        """A line for each dimension that does not divide: what was done with it, in how many arrays."""
        alike: dict[str, int] = defaultdict(int)
        for decision in self.decisions:
            alike[str(decision)] += 1
        return [f"{what} (in {_arrays(n)})" for what, n in alike.items()]

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary of plain JSON types an array."""
        return [dataclasses.asdict(row) | {"shape": list(row.shape)} for row in self.rows]

    def __str__(self) -> str:
        devices = math.prod(self.mesh.values())
        axes = ",".join(f"{axis}={n}" for axis, n in self.mesh.items() if n > 1) or "one device"
        lines = [f"mesh {axes}" + (f" ({devices} devices)" if devices > 1 else ""), ""]

        groups: dict[tuple, list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[_numbers_starred(row.array), row.shape, row.dtype, row.spec, row.memory].append(row)
        away = [row for row in self.rows if row.memory == "host"]
        here = [row for row in self.rows if row.memory != "host"]
        table: list[tuple[str, ...]] = [("array", "shape", "dtype", "spec", "memory", "bytes", "per device")]
        for (_, shape, dtype, spec, memory), rows in groups.items():
            table.append((_name(rows), "x".join(map(str, shape)) or "scalar", dtype, spec, memory, *_sums(rows)))
        table.append((f"total of {_arrays(len(here))}", "", "", "", "device" if away else "", *_sums(here)))
        if away:
            table.append((f"total of {_arrays(len(away))}", "", "", "", "host", *_sums(away)))
        else:  # a column of one value
            table = [(*cells[:4], *cells[5:]) for cells in table]
        lines += columns(table, right=len(table[0]) - 2)
        if padding := sum(row.padding for row in self.rows):
            lines.append(f"padding: {in_units(padding)} of the total")

        if replicated := [row for row in self.rows if row.replicated]:
            lines += ["", f"replicated on every device: {_arrays(len(replicated))}, {in_units(_sum(replicated))}"]
            reasons: dict[tuple[str, str], list[Row]] = defaultdict(list)
            for row in replicated:
                reasons[_numbers_starred(row.array), row.why].append(row)
            lines += [f"  {_name(rows)}: {why}" for (_, why), rows in reasons.items()]
        if self.decisions:
            lines += ["", "dimensions that do not divide:"]
            lines += [f"  {line}" for line in self.indivisible]
        return "\n".join(lines)


def report(plan: Plan) -> Report:
    """The report of a plan; touches no device."""
    of_array: dict[str, list[Decision]] = defaultdict(list)
    for decision in plan.decisions:
        of_array[decision.array].append(decision)
    rows = []
    for key, stored in plan.layout.items():
        sharding = plan.shardings[key]
        shard = math.prod(sharding.shard_shape(stored.shape)) * stored.dtype.itemsize
        replicated = plan.mesh.size > 1 and not any(sharding.spec)
        reasons = [str(d) for d in of_array[key]] or ([_why_whole(stored, plan.rules)] if replicated else [])
        rows.append(
            Row(
                array=key,
                shape=stored.shape,
                dtype=str(stored.dtype),
                spec=_spec(sharding.spec),
                memory="host" if sharding.memory_kind == HOST else "device",
                nbytes=stored.nbytes,
                padding=stored.nbytes - sum(math.prod(p.shape) for p in stored.parts) * stored.dtype.itemsize,
                nbytes_per_device=shard,
                replicated=replicated,
                why="; ".join(reasons),
            )
        )
    return Report(dict(plan.mesh.shape), tuple(rows), plan.decisions)


def _why_whole(stored: Stored, rules: Rules) -> str:
    """Why no dimension of an array is split, none of them having failed to divide."""
    if not stored.axes:
        return "a scalar"
    wanted = [
        f"{axis} goes over {'+'.join(rules[axis].mesh_axes)}" for axis in stored.axes if axis and rules[axis].mesh_axes
    ]
    return f"{', '.join(wanted)}, of size 1" if wanted else f"no rule splits {', '.join(a or '-' for a in stored.axes)}"


def _spec(spec: PartitionSpec) -> str:
    return ",".join("-" if a is None else a if isinstance(a, str) else "+".join(a) for a in spec) or "-"


def _numbers_starred(name: str) -> str:
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _name(rows: Sequence[Row]) -> str:
    """One name for rows whose names differ in numbers only."""
    return rows[0].array if len(rows) == 1 else f"{_numbers_starred(rows[0].array)} x{len(rows)}"


def _arrays(n: int) -> str:
    return f"{n} array" if n == 1 else f"{n} arrays"


def _sum(rows: Sequence[Row]) -> int:
    return sum(row.nbytes for row in rows)


def _sums(rows: Sequence[Row]) -> tuple[str, str]:
    return in_units(_sum(rows)), in_units(sum(row.nbytes_per_device for row in rows))
