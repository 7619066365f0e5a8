"""What the forward pass of a compiled step keeps for its backward pass, read off the HLO text of any back end."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from parallelism.hlo import Instruction, Program

# Names for the same bytes, or for one of several.
_TRANSPARENT = ("bitcast", "copy", "get-tuple-element", "opt-barrier", "optimization-barrier", "reshape", "tuple")


@dataclasses.dataclass(frozen=True)
class Residual:
    """One array: its bytes on one device, its shape as the program writes it, the line of Python that made it."""

    nbytes: int
    shape: str
    source: str


def residuals(text: str) -> list[Residual]:
    """The arrays that a forward pass makes and a backward pass reads, largest first.

    Where a program has several forward passes, one after the other (microbatches), those of the largest. The two are
    told apart by the names that JAX gives operations: ``jvp(...)`` and ``transpose(jvp(...))``.
    """
    program = Program(text)
    called = ("body", "to_apply", "true_computation", "false_computation")
    computations = {program.entry}
    for _, each, _ in program.walk():
        if each.opcode in ("while", "call", "conditional"):  # what a fusion calls has no buffers
            computations.update(each.called(*called))
    kept = [_kept(program, program.computations[name]) for name in computations]
    largest = max(kept, key=lambda found: sum(r.nbytes for r in found), default=[])
    return sorted(largest, key=lambda r: -r.nbytes)


def _kept(program: Program, computation: dict[str, Instruction]) -> list[Residual]:
    readers: dict[str, list[Instruction]] = defaultdict(list)
    for each in computation.values():
        for operand in each.operands:
            readers[operand].append(each)

    def read_backward(name: str) -> bool:
        return any(
            read_backward(reader.name) if reader.opcode in _TRANSPARENT else _backward(reader)
            for reader in readers[name]
        )

    found = []
    for each in computation.values():
        made = each
        if each.opcode == "get-tuple-element":
            made = computation.get(each.operands[0], each)
            if made.opcode == "while" and _invariant(program, made, each):
                continue
            if made.opcode in ("get-tuple-element", "tuple", "parameter"):
                continue
        elif each.opcode in (*_TRANSPARENT, "parameter", "constant", "while") or each.shape.startswith("("):
            continue
        if _forward(made) and read_backward(each.name):
            found.append(Residual(each.nbytes, re.sub(r"{.*", "", each.shape), program.source(made)))
    return found


def _invariant(program: Program, loop: Instruction, element: Instruction) -> bool:
    """Whether an element of a loop's state goes through it unchanged."""
    body = program.computations[loop.called("body")[0]]
    root = list(body.values())[-1]
    index = int(re.search(r"index=(\d+)", element.rest)[1])  # type: ignore[index]
    if root.opcode != "tuple" or index >= len(root.operands):
        return False
    last = body.get(root.operands[index])
    return last is not None and last.opcode == "get-tuple-element" and f"index={index}," in last.rest + ","


def _name(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""


def _forward(instruction: Instruction) -> bool:
    return "jvp(" in _name(instruction) and not _backward(instruction)


def _backward(instruction: Instruction) -> bool:
    return "transpose(" in _name(instruction)
