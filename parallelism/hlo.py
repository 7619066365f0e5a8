"""The text of a compiled program, of any back end: its instructions, how often each runs, where it comes from."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

# What computes.
WORK = ("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional")

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


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

    def walk(self, computation: str | None = None) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) from the entry on, or from a computation; every branch of a
        conditional counts."""
        yield from self._walk(computation or self.entry, 1)

    def branches(self, conditional: Instruction) -> list[str]:
        """The computations of which a conditional runs one."""
        several = re.search(r"branch_computations={(.*?)}", conditional.rest)
        named = re.findall(r"%?([^\s,]+)", several[1]) if several else []
        return [*conditional.called("true_computation", "false_computation"), *(name.lstrip("%") for name in named)]

    def _walk(self, computation: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations[computation].values():
            yield computation, instruction, times
            more = times
            if instruction.opcode == "while":
                more *= self.trip_count(instruction)
            if instruction.opcode in ("while", "fusion", "call", "async-start"):
                for name in instruction.called("body", "calls", "to_apply"):
                    yield from self._walk(name, more)
            elif instruction.opcode == "conditional":
                for name in self.branches(instruction):
                    yield from self._walk(name, times)

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

    def hidden(self, computation: str, start: Instruction) -> bool:
        """Whether anything is computed between the start of an asynchronous instruction and its end, as scheduled."""
        if not start.opcode.endswith("-start"):
            return False
        order = list(self.computations[computation].values())
        later = order[order.index(start) + 1 :]
        end = next((i for i, other in enumerate(later) if start.name in other.operands), 0)
        return any(other.opcode in WORK for other in later[:end])

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
