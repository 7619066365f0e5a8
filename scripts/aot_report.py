"""What the train steps of well-known models take on hardware that is not here, read off the real compilers' programs.

Needs no accelerator: the step is compiled ahead of time for a named topology, with ``jax[tpu]`` installed for TPUs and
``jax[cuda12-local]`` for GPUs. Prints a Markdown table. Exit code 1 if a step does not fit its devices, if something is
replicated that a rule would split, if more than the parameters is gathered over the axes that split a batch (an
activation was replicated), or if gradients are all-reduced over ``fsdp`` where they could be reduce-scattered.

    python scripts/aot_report.py [--effort EFFORT] [--offload OFFLOAD] [--explain] [NAME ...]
"""

from __future__ import annotations

import os

# Before jax is imported: nothing is to be run, and libtpu is not to look for a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxsys.models.config import Experts, Llama3Scaling, ModelConfig
from jaxsys.train import DataConfig, TrainConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.explain import Explanation, explain, explained
from parallelism.sharding import axes_of
from parallelism.text import in_units

LLAMA = {"family": "llama", "vocab_size": 128_256, "rope_theta": 500_000.0, "n_kv_heads": 8}
LLAMA_8B = ModelConfig(**LLAMA, d_model=4096, n_layers=32, n_heads=32, head_dim=128, d_ff=14_336, max_seq_len=8192)
LLAMA_70B = ModelConfig(**LLAMA, d_model=8192, n_layers=80, n_heads=64, head_dim=128, d_ff=28_672, max_seq_len=8192)
LLAMA_1B = ModelConfig(
    **LLAMA, d_model=2048, n_layers=16, n_heads=32, head_dim=64, d_ff=8192, max_seq_len=131_072, tie_embeddings=True,
    rope_scaling=Llama3Scaling(factor=32.0),
)  # fmt: skip
MIXTRAL = ModelConfig(
    "mixtral", vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14_336,
    max_seq_len=32_768, rope_theta=1e6, experts=Experts(8, 2, 14_336, balance_loss=0.02),
)  # fmt: skip
LONG = dataclasses.replace(LLAMA_8B, max_seq_len=131_072, rope_scaling=Llama3Scaling())


@dataclasses.dataclass(frozen=True)
class Recipe:
    """hardware: a TPU topology, or ``h100:HOSTSxGPUS``. batch: rows of a step, and tokens of a row.

    changes: to TrainConfig.
    """

    model: ModelConfig
    hardware: str
    mesh: str
    batch: tuple[int, int]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self) -> TrainConfig:
        rows, length = self.batch
        return TrainConfig(
            run="ahead-of-time", model=self.model, mesh=self.mesh, data=DataConfig(batch_size=rows, seq_len=length),
            **{"remat": "full", **self.changes},
        )  # fmt: skip


# Along these a batch is split, and parameters may be.
SHARD_AXES = ("data", "fsdp", "expert")

RECIPES = {
    "llama-3-8b": Recipe(LLAMA_8B, "v5p:4x4x4", "data=2,fsdp=32", (128, 8192)),
    "llama-3-70b": Recipe(LLAMA_70B, "v5p:8x8x8", "fsdp=128,tensor=4", (256, 8192)),
    "llama-3.2-1b": Recipe(LLAMA_1B, "v5e:4x4", "data=2,fsdp=8", (32, 4096)),
    "mixtral-8x7b": Recipe(MIXTRAL, "v5p:4x4x4", "data=2,fsdp=4,expert=8", (64, 4096)),
    "llama-3.1-8b-128k": Recipe(LONG, "v5p:4x4x4", "fsdp=4,context=16", (4, 131_072)),
    "llama-3.2-1b-h100": Recipe(LLAMA_1B, "h100:2x8", "fsdp=16", (64, 4096)),
}

# What XLA asks of a GPU, from the data sheet and the CUDA programming guide's table of compute capability 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 80000000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """seconds: to trace and compile the step."""

    run: AbstractRun
    explanation: Explanation
    seconds: float

    def faults(self) -> list[str]:
        """What a step on this hardware should not do."""
        found, memory = [], self.explanation.memory
        if memory.capacity is not None and memory.total > memory.capacity:
            found.append(f"does not fit: {in_units(memory.total)} of {in_units(memory.capacity)}")
        found += [f"{row.array} is replicated: {row.why}" for row in self.replicated() if "no rule" not in row.why]
        sums = {kind: self._operands(kind) for kind in ("all-reduce", "reduce-scatter")}
        if self.run.mesh.shape["fsdp"] > 1 and sums["all-reduce"] > 0.05 * sums["reduce-scatter"]:
            found.append(
                f"gradients are all-reduced over fsdp: {in_units(sums['all-reduce'])} of operands, "
                f"{in_units(sums['reduce-scatter'])} are reduce-scattered"
            )
        if (gathered := self._gathered()) > 1.3 * (kernels := self._kernels()):
            found.append(
                f"an activation is replicated: {in_units(gathered)} are gathered over {', '.join(SHARD_AXES)}, kernels "
                f"are {in_units(kernels)}"
            )
        return found

    def _gathered(self) -> float:
        """Bytes that a device sends so that others have what differs between the shards of a batch. Tokens travel to
        their experts by other collectives."""
        found = self.explanation.collectives
        return sum(each.sent for each in found if each.kind == "all-gather" and set(each.axes) & set(SHARD_AXES))

    def _kernels(self) -> float:
        """Bytes that a device sends to gather every parameter twice, for the forward and the backward pass."""
        sent, shape = 0.0, self.run.mesh.shape
        for key, stored in self.run.plan.layout.items():
            sharding = self.run.plan.shardings[key]
            split = math.prod(shape[axis] for axis in axes_of(sharding.spec) if axis in SHARD_AXES)
            shard = math.prod(sharding.shard_shape(stored.shape)) * self.run.step.compute_dtype.itemsize
            sent += 2 * (split - 1) * shard
        return sent

    def replicated(self) -> list[Any]:
        """The replicated arrays, scalars apart, largest first."""
        rows = [row for row in self.explanation.arrays.rows if row.replicated and row.shape]
        return sorted(rows, key=lambda row: -row.nbytes)

    def _operands(self, kind: str) -> int:
        return sum(
            each.nbytes * each.count
            for each in self.explanation.collectives
            if each.kind == kind and "fsdp" in each.axes
        )

    def row(self, name: str, recipe: Recipe) -> list[str]:
        e = self.explanation
        sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0, "other": 0.0}
        for each in e.collectives:
            sent[each.kind if each.kind in sent else "other"] += each.sent
        total = sum(sent.values())
        later = sum(each.sent for each in e.collectives if each.asynchronous)
        worst = self.replicated()
        rows, length = recipe.batch
        return [
            name,
            recipe.hardware,
            f"{recipe.mesh}, {rows} x {length}",
            f"{in_units(e.memory.total)} of {in_units(e.memory.capacity)}" if e.memory.capacity else "?",
            in_units(e.memory.host),
            *(in_units(n) for n in sent.values()),
            f"{later / max(total, 1):.0%}",
            f"{worst[0].array}, {in_units(worst[0].nbytes)}" if worst else "none",
            f"{self.seconds:.0f} s",
        ]


HEAD = (
    "step", "hardware", "mesh, rows x tokens", "device", "host", "all-gather", "reduce-scatter", "all-reduce",
    "permute, all-to-all", "async", "largest replicated array", "compile",
)  # fmt: skip


def devices(hardware: str) -> Sequence[Any]:
    """The devices of hardware that is not here."""
    kind, _, shape = hardware.partition(":")
    if kind == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x{shape}").devices
    return topologies.get_topology_desc(platform="tpu", topology_name=hardware).devices


def compile_recipe(recipe: Recipe, say: Any) -> Result:
    """Compiles a recipe's step. Raises OutOfMemory after ``say``ing where memory went."""
    begin = time.perf_counter()
    run = AbstractRun(recipe.config(), recipe.model, devices(recipe.hardware))
    with explained(run, say):
        found = explain(run)
    return Result(run, found, time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *RECIPES], metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--effort", type=float, default=-1.0, help="the compiler's, -1 (default, fastest) to 1")
    parser.add_argument("--explain", action="store_true", help="print all of each step, on stderr")
    parser.add_argument("--offload", default="", help="what lies in host memory, see docs/offload.md")
    args = parser.parse_args()
    jax.config.update("jax_exec_time_optimization_effort", args.effort)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    print("|".join(("", *HEAD, "")), "|".join(("", *("---",) * len(HEAD), "")), sep="\n", flush=True)
    faults = []
    for name in args.names or RECIPES:
        recipe = RECIPES[name]
        recipe = dataclasses.replace(recipe, changes={**recipe.changes, "offload": args.offload})
        result = compile_recipe(recipe, say)
        if args.explain:
            say(str(result.explanation))
        faults += [f"{name}: {fault}" for fault in result.faults()]
        print("|".join(("", *result.row(name, recipe), "")), flush=True)
    for fault in faults:
        say(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
