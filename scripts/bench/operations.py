"""Where the time of a compiled graph goes, operation by operation, and how fast XLA runs each of them alone.

    python scripts/bench/operations.py train_step [--model llama-25m] [--dtype bfloat16]
    python scripts/bench/operations.py decode|prefill [--model smollm2-135m-instruct] [--dtype bfloat16] [--batch 16]
        [--numerics invariant]

Operations that do the same work count as one row: a matmul by its shapes and dtypes, others by what they do. For a
matmul ``alone`` is the rate of the same product in a program of its own, for the rest that of a copy: what is left
between a row and its ``alone`` is this program's doing, what is beyond it XLA's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsys.malloc import restart_with_tunables
from parallelism.hlo import Instruction, Program

NAMES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "s32": "int32", "s8": "int8"}
MOVES = {"copy", "transpose", "bitcast", "reshape", "convert", "slice", "concatenate", "pad", "broadcast", "parameter",
         "constant", "tuple", "get-tuple-element", "dynamic-slice", "dynamic-update-slice", "gather",
         "scatter"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Product:
    """A matmul: operands, contracted and batch dimensions of each, the result's dtype."""

    lhs: tuple[str, tuple[int, ...]]
    rhs: tuple[str, tuple[int, ...]]
    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    out: str

    @property
    def flops(self) -> float:
        (_, left), (_, right) = self.lhs, self.rhs
        free = [n for i, n in enumerate(right) if i not in (*self.contract[1], *self.batch[1])]
        return 2.0 * math.prod(left) * math.prod(free)

    def __str__(self) -> str:
        def operand(side, contract):
            dtype, dims = side
            return f"{dtype}[{','.join(f'{n}*' if i in contract else str(n) for i, n in enumerate(dims))}]"

        return f"{operand(self.lhs, self.contract[0])} x {operand(self.rhs, self.contract[1])} -> {self.out}"


def product(dot: Instruction, inside: dict[str, Instruction]) -> Product:
    """The matmul of a dot; inside: the instructions of its computation."""

    def dims(which: str) -> tuple[int, ...]:
        match = re.search(which + r"={([\d,]*)}", dot.rest)
        return tuple(int(n) for n in match[1].split(",") if n) if match else ()

    left, right = (inside[operand].arrays[0] for operand in dot.operands)
    contract = dims("lhs_contracting_dims"), dims("rhs_contracting_dims")
    return Product(left, right, contract, (dims("lhs_batch_dims"), dims("rhs_batch_dims")), dot.arrays[0][0])


def classify(at: Instruction, computation: str, program: Program) -> Product | str:
    """What an instruction of the program does."""
    called = at.called("calls")
    inside = program.computations[called[0] if called else computation]
    members = list(inside.values()) if called else [at]
    dots = [each for each in members if each.opcode == "dot"]
    if dots:
        return product(dots[0], inside)
    opcodes = {each.opcode for each in members}
    if any(code.startswith(("reduce", "sort")) for code in opcodes):
        return "reductions"
    if opcodes <= MOVES:
        return "copies, transposes, converts"
    return "element-wise"


def durations(profile: Path) -> dict[str, list[float]]:
    """Seconds of every run of each HLO operation in a trace; parallel ones overlap."""
    import jax

    found: dict[str, list[float]] = defaultdict(list)
    (path,) = profile.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    found[str(stats["hlo_op"])].append(event.duration_ns / 1e9)
    return found


def alone(work: Product, seconds: float = 0.3) -> float:
    """Flop/s of this product in a program of its own."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def fill(side):
        dtype, dims = side
        return jax.jit(lambda: jnp.full(dims, 0.5, NAMES[dtype]))()

    def dot(a, b):
        return lax.dot_general(a, b, (work.contract, work.batch), preferred_element_type=NAMES[work.out])

    return work.flops / best(jax.jit(dot), (fill(work.lhs), fill(work.rhs)), seconds)


def best(fn: Callable, arguments: tuple, seconds: float) -> float:
    """The shortest of the runs that fit in ``seconds``."""
    import jax

    jax.block_until_ready(fn(*arguments))
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def copy_rate() -> float:
    """Bytes a second that an element-wise program reads and writes."""
    import jax
    import jax.numpy as jnp

    x = jax.jit(lambda: jnp.zeros((2048, 1536), jnp.float32))()
    return 2 * x.nbytes / best(jax.jit(lambda x: x + 1), (x,), 0.5)


def train_step(model: str, dtype: str, batch: int, numerics: str) -> tuple[Callable[[], Any], Any]:
    from models import MODELS
    from train_step import jaxsys_step

    run = jaxsys_step(MODELS[model], batch, 256, dtype, 3)
    return run, run.graph


def decode(model: str, dtype: str, batch: int, numerics: str) -> tuple[Callable[[], Any], Any]:
    """48 tokens each for some prompts of 128 that are known already."""
    prompts = [[begin + 2, *(1 + i % 1000 for i in range(127))] for begin in range(batch)]
    return _generate(model, dtype, prompts, 49, numerics)


def prefill(model: str, dtype: str, batch: int, numerics: str) -> tuple[Callable[[], Any], Any]:
    """Prompts of 512 tokens, of which nothing is known, in chunks of the largest size."""
    prompts = [[begin + 2, *(1 + i % 1000 for i in range(511))] for begin in range(batch)]
    return _generate(model, dtype, prompts, 1, numerics)


def _generate(
    model: str, dtype: str, prompts: list[list[int]], max_tokens: int, numerics: str
) -> tuple[Callable[[], Any], Any]:
    import jaxsys

    llm = jaxsys.load(model, dtype=dtype, max_context=1024, numerics=numerics)
    sizes = llm.engine.sizes
    size = sizes[-1] if max_tokens == 1 else next(size for size in sizes if size.sequences >= len(prompts))
    graph = next(g for g in llm.engine.graphs if g.name == f"forward[{size.rows}x{size.sequences}]")

    def run() -> Any:
        if max_tokens == 1:
            llm.engine.scheduler.evict()
        return llm.generate(prompts, max_tokens=max_tokens, temperature=0.0, stop=())

    return run, graph


GRAPHS = {
    "train_step": (train_step, "llama-25m", 8),
    "decode": (decode, "smollm2-135m-instruct", 1),
    "prefill": (prefill, "smollm2-135m-instruct", 1),
}


def main() -> None:
    from measure import Quiet, machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", choices=list(GRAPHS))
    parser.add_argument("--model", help="default: llama-25m to train, else smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--numerics", choices=["fast", "invariant"], default="fast", help="of decode and prefill")
    parser.add_argument("--batch", type=int, help="rows of 256 tokens, or prompts; default: 8 to train, else 1")
    parser.add_argument("--rows", type=int, default=14, help="longest rows to print")
    options = parser.parse_args()
    import jax

    begin, usual, batch = GRAPHS[options.graph]
    model = options.model or usual
    with Quiet():
        run, graph = begin(model, options.dtype, options.batch or batch, options.numerics)
        run()
        with tempfile.TemporaryDirectory() as directory:
            profiling = jax.profiler.ProfileOptions()
            profiling.python_tracer_level = 0
            with jax.profiler.trace(directory, profiler_options=profiling):
                run()
            times = durations(Path(directory))
        program = Program(graph.compiled.as_text())
        places = {name: where for where, inside in program.computations.items() for name in inside}
        rows: dict[Product | str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for name, each in times.items():
            if name not in places:
                continue
            inside = program.computations[places[name]]
            at = inside[name]
            if at.opcode not in ("while", "conditional", "call"):
                kind = classify(at, places[name], program)
                work = kind.flops if isinstance(kind, Product) else moved(at, inside)
                row = rows[kind]
                row[0], row[1], row[2] = row[0] + len(each), row[1] + sum(each), row[2] + work * len(each)
        ordered = sorted(rows.items(), key=lambda item: -item[1][1])
        total, copies = sum(row[1] for row in rows.values()), copy_rate()
        print(f"{options.graph} of {model}, {options.dtype}, {machine()}")
        print(f"{'operation':64}{'runs':>7}{'ms':>9}{'share':>7}{'rate':>14}{'alone':>14}")
        for kind, (runs, seconds, work) in ordered[: options.rows]:
            unit, rate = ("GFLOP/s", alone(kind)) if isinstance(kind, Product) else ("GB/s", copies)
            print(
                f"{kind!s:64}{runs:7.0f}{seconds * 1e3:9.1f}{seconds / total:7.1%}"
                f"{work / seconds / 1e9:6.0f} {unit:7}{rate / 1e9:6.0f} {unit:7}"
            )
        rest = sum(row[1] for _, row in ordered[options.rows :])
        print(f"{'the other ' + str(max(len(ordered) - options.rows, 0)):64}{'':7}{rest * 1e3:9.1f}{rest / total:7.1%}")


def moved(at: Instruction, inside: dict[str, Instruction]) -> float:
    """Bytes of an instruction's operands and results: what it reads and writes if it reads each once."""
    return at.nbytes + sum(inside[operand].nbytes for operand in at.operands if operand in inside)


if __name__ == "__main__":
    restart_with_tunables()
    main()
