"""What a compiled program sends over which mesh axis: its collectives, read off the HLO text of any back end.

A loop counts as often as it runs (its trip count is read off its condition), which XLA's own cost analysis does not do.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from jax.sharding import Mesh

from parallelism.hlo import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind: of ``KINDS``. axes: the mesh axes that its groups run over, in mesh order. count: how often it runs.
    nbytes: operands of one run, on one device. sent: bytes that one device sends in all runs, if the algorithm is
    the best there is: (g - 1) times the operands for an all-gather over g devices, (g - 1) / g for a reduce-scatter or
    all-to-all, both for an all-reduce, once for a permute. Of a ragged all-to-all, whose sizes are data, all rows that
    it could send.
    asynchronous: something is computed between its start and its end, in the order of a scheduled program. One that is
    only marked as fit for that is not. source: where it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    nbytes: int
    sent: float
    asynchronous: bool
    source: str


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective between different devices in the text of a program compiled for ``mesh``, in order."""
    program, found = Program(text), []
    started: set[str] = set()  # computations that are a collective which is started and awaited apart
    for computation, each, times in program.walk():
        inside = program.computations[computation]
        if each.opcode == "async-start" and program.hidden(computation, each):
            started.update(each.called("calls"))
        kind = each.opcode.removesuffix("-start")
        if kind not in KINDS or _part_of_another(computation, inside):
            continue
        groups = _groups(each.rest, mesh)
        size = 2 if kind == "collective-permute" else max(map(len, groups))
        if size == 1 or not groups:
            continue
        # A ragged exchange's other operands are where to write, and sizes.
        operands = each.operands[:1] if kind == "ragged-all-to-all" else each.operands
        nbytes = sum(inside[operand].nbytes for operand in operands if operand in inside)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:  # how the TPU compiler writes it
            kind = "reduce-scatter"
        part = (size - 1) / size
        factor = {
            "all-gather": size - 1.0,
            "all-reduce": 2 * part,
            "reduce-scatter": part,
            "all-to-all": part,
            "ragged-all-to-all": part,
            "collective-permute": 1.0,
        }[kind]
        hidden = program.hidden(computation, each) or computation in started or START in _targets(inside)
        axes = _axes(groups, mesh)
        found.append(Collective(kind, axes, times, nbytes, factor * nbytes * times, hidden, program.source(each)))
    return found


# How the TPU's compiler writes a collective that other work hides: once in a fusion that starts it, once in each fusion
# of that work, which moves it on, and once in a fusion that ends it.
START, STEP, END = "AsyncCollectiveStart", "async_collective_fusion", "AsyncCollectiveDone"


def _targets(inside: Mapping[str, Instruction]) -> set[str]:
    found = (re.search(r'custom_call_target="(\w+)"', i.rest) for i in inside.values() if i.opcode == "custom-call")
    return {target[1] for target in found if target}


def _part_of_another(computation: str, inside: Mapping[str, Instruction]) -> bool:
    return computation.startswith(STEP) or END in _targets(inside)


def _groups(rest: str, mesh: Mesh) -> list[list[int]]:
    """Devices, as places in the mesh, that take part together (for a permute: the pairs)."""
    if pairs := re.search(r"source_target_pairs={(.*?)}}", rest):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"{([\d,]+)", pairs[1])]
    if explicit := re.search(r"replica_groups={({[\d,{}]*})}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"{([\d,]+)}", explicit[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")]).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*{(.*?)}", rest):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        names, sizes = [name for name, _ in axes], [int(n) for _, n in axes]
        ids = _iota(named[2] or f"[{math.prod(sizes)}]").reshape(sizes)
        chosen = [names.index(name) for name in re.findall(r"'(\w+)'", named[3])]
        others = [i for i in range(len(names)) if i not in chosen]
        ids = ids.transpose(others + chosen)
        return ids.reshape(-1, math.prod(ids.shape[len(others) :])).tolist()
    if "replica_groups={}" in rest or "replica_groups=" not in rest:
        return [list(range(mesh.size))]
    raise ValueError(f"replica groups in a form that is not known: {rest}")


def _iota(text: str) -> np.ndarray:
    """Devices as ``[2,8]T(1,0)``: counted up in that shape, then transposed."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    dims = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _axes(groups: Iterable[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of some group differ."""
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        varies |= (places != places[:, :1]).any(1)
    return tuple(name for name, yes in zip(mesh.axis_names, varies, strict=True) if yes)


def sent_to_other_slices(text: str) -> float:
    """Bytes that a device hands to the data-centre network in one run of a TPU program for several slices.

    What crosses is no collective in the compiled program: the compiler writes each that spans slices as one inside the
    slice and a transfer to the other slices of what is left (``send`` to the megascale runtime).
    """
    program, sent = Program(text), 0.0
    for computation, each, times in program.walk():
        if each.opcode == "send" and "xla_megascale" in each.rest:
            sent += times * program.computations[computation][each.operands[0]].nbytes
    return sent


def summary(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """(runs, bytes that a device sends) by kind and axes, largest first."""
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in found:
        sums[each.kind, each.axes][0] += each.count
        sums[each.kind, each.axes][1] += each.sent
    return {key: (int(n), sent) for key, (n, sent) in sorted(sums.items(), key=lambda item: -item[1][1])}
