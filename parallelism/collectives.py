"""What a compiled program sends over which mesh axis: its collectives, read off the HLO text of any back end.

A loop counts as often as it runs (its trip count is read off its condition), which XLA's own cost analysis does not do.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

# --------------------------------------------------------------------------------------------------------- HLO text


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program. shape: as the text has it, a tuple in parentheses; rest: all after the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    rest: str

    @property
    def nbytes(self) -> int:
        """Bytes of the result, of all its elements if it is a tuple."""
        return sum(item_bits(dtype) * math.prod(dims) for dtype, dims in self.arrays) // 8

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, dimensions) of the result, or of each element of a tuple."""
        found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\]", re.sub(r"/\*.*?\*/|{[^{}]*}", "", self.shape))
        return [(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)) for dtype, dims in found]

    def called(self, *attributes: str) -> list[str]:
        """Computations that it names under these attributes."""
        return [name for a in attributes for name in re.findall(rf"\b{a}=%?([^\s,{{}}]+)", self.rest)]


def item_bits(dtype: str) -> int:
    if dtype in ITEM_BITS:
        return ITEM_BITS[dtype]
    match = re.search(r"\d+", dtype)
    return int(match[0]) if match else 0


class Program:
    """The text of one compiled program. Instruction names are unique within a computation."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = defaultdict(dict)
        self.entry = ""
        self._sources = _sources(text)
        at = ""
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                words = line.split()
                at = words[1 if words[0] == "ENTRY" else 0].lstrip("%")
                self.entry = at if words[0] == "ENTRY" else self.entry
            elif at and (instruction := _instruction(line)):
                self.computations[at][instruction.name] = instruction

    def walk(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) from the entry on; every branch of a conditional counts."""
        yield from self._walk(self.entry, 1)

    def _walk(self, computation: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations[computation].values():
            yield computation, instruction, times
            more = times
            if instruction.opcode == "while":
                more *= self.trip_count(instruction)
            for name in instruction.called("body", "calls", "true_computation", "false_computation", "to_apply"):
                if instruction.opcode in ("while", "fusion", "call", "async-start", "conditional"):
                    yield from self._walk(name, more)
            if instruction.opcode == "conditional" and (
                branches := re.search(r"branch_computations={(.*?)}", instruction.rest)
            ):
                for name in re.findall(r"%?([^\s,]+)", branches[1]):
                    yield from self._walk(name.lstrip("%"), times)

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs; 1 where its condition does not compare a counter with a constant."""
        if known := re.search(r'known_trip_count"?[:=]\s*{"n":\s*"(\d+)"}', loop.rest):
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        for each in condition.values():
            if each.opcode == "compare" and "direction=LT" in each.rest:
                limit = condition.get(each.operands[-1])
                if limit is not None and limit.opcode == "constant" and limit.arguments.isdecimal():
                    return int(limit.arguments)
        return 1

    def source(self, instruction: Instruction) -> str:
        """``file:line`` of the Python that made it, as far as the compiler kept it; else its operation's name."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        if frame and (found := self._sources.get(int(frame[1]))):
            return found
        if line := re.search(r'source_file="([^"]+)" source_line=(\d+)', instruction.rest):
            return f"{line[1]}:{line[2]}"
        name = re.search(r'op_name="([^"]*)"', instruction.rest)
        return name[1] if name else ""


def _balanced(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([^\s=]+) = ", line)
    if head is None:
        return None
    at = head.end()
    end = _balanced(line, at) if line[at] == "(" else line.index(" ", at)
    opcode = re.match(r"\s*([\w-]+)\(", line[end:])
    if opcode is None:
        return None
    opened = end + opcode.end() - 1
    closed = _balanced(line, opened)
    arguments = line[opened + 1 : closed - 1]
    operands = tuple(re.findall(r"%([^\s,()]+)", arguments))
    return Instruction(head[1], line[at:end], opcode[1], operands, arguments, line[closed:])


def _sources(text: str) -> dict[int, str]:
    """``file:line`` by stack frame, from the tables at the head of the text."""
    tables: dict[str, dict[int, str]] = {}
    at = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            at = tables.setdefault(line, {})
        elif match := re.match(r"(\d+) (.*)", line):
            if at is not None:
                at[int(match[1])] = match[2]
        elif line.startswith(("%", "ENTRY")):
            break

    def number(row: str, name: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", row)
        return int(match[1]) if match else 0

    found = {}
    for frame, row in tables.get("StackFrames", {}).items():
        location = tables.get("FileLocations", {}).get(number(row, "file_location_id"), "")
        file = tables.get("FileNames", {}).get(number(location, "file_name_id"), "").strip('"')
        found[frame] = f"{file}:{number(location, 'line')}" if file else ""
    return found


# ------------------------------------------------------------------------------------------------------ collectives


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    kind: of ``KINDS``. axes: the mesh axes that its groups run over, in mesh order. count: how often it runs.
    nbytes: operands of one run, on one device. sent: bytes that one device sends in all runs, if the algorithm is
    the best there is: (g - 1) times the operands for an all-gather over g devices, (g - 1) / g for a reduce-scatter or
    all-to-all, both for an all-reduce, once for a permute.
    asynchronous: started and awaited apart. source: where it comes from.
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
    for computation, each, times in program.walk():
        kind = each.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _groups(each.rest, mesh)
        size = 2 if kind == "collective-permute" else max(map(len, groups))
        if size == 1 or not groups:
            continue
        inside = program.computations[computation]
        nbytes = sum(inside[operand].nbytes for operand in each.operands if operand in inside)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:  # how the TPU compiler writes it
            kind = "reduce-scatter"
        part = (size - 1) / size
        factor = {
            "all-gather": size - 1.0,
            "all-reduce": 2 * part,
            "reduce-scatter": part,
            "all-to-all": part,
            "collective-permute": 1.0,
        }[kind]
        started = each.opcode.endswith("-start") or "async_collective_name" in each.rest
        axes = _axes(groups, mesh)
        found.append(Collective(kind, axes, times, nbytes, factor * nbytes * times, started, program.source(each)))
    return found


def _groups(rest: str, mesh: Mesh) -> list[list[int]]:
    """Devices, as places in the mesh, that take part together (for a permute: the pairs)."""
    if pairs := re.search(r"source_target_pairs={(.*?)}}", rest):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"{([\d,]+)", pairs[1])]
    if explicit := re.search(r"replica_groups={({[\d,{}]*})}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"{([\d,]+)}", explicit[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = (tuple(int(n) for n in part.split(",")) for part in (iota[1], iota[2]))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\]\s*{(.*?)}", rest):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        names = [name for name, _ in axes]
        ids = np.arange(math.prod(int(n) for _, n in axes)).reshape([int(n) for _, n in axes])
        chosen = [names.index(name) for name in re.findall(r"'(\w+)'", named[2])]
        others = [i for i in range(len(names)) if i not in chosen]
        ids = ids.transpose(others + chosen)
        return ids.reshape(-1, math.prod(ids.shape[len(others) :])).tolist()
    return [list(range(mesh.size))]


def _axes(groups: Iterable[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of some group differ."""
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        varies |= (places != places[:, :1]).any(1)
    return tuple(name for name, yes in zip(mesh.axis_names, varies, strict=True) if yes)


def summary(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """(runs, bytes that a device sends) by kind and axes, largest first."""
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in found:
        sums[each.kind, each.axes][0] += each.count
        sums[each.kind, each.axes][1] += each.sent
    return {key: (int(n), sent) for key, (n, sent) in sorted(sums.items(), key=lambda item: -item[1][1])}
