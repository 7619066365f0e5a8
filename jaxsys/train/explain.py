"""What a training step will do, before it does: where arrays lie, what it sends, what fills the memory of a device."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import parallelism
from jaxsys.train.abstract import AbstractRun
from parallelism import detect, target
from parallelism.collectives import Collective, collectives
from parallelism.errors import UserError
from parallelism.mesh import STAGE
from parallelism.placement import host_bytes
from parallelism.residuals import Residual, residuals
from parallelism.sharding_report import Report, report
from parallelism.text import columns, in_units

# Of what the forward pass keeps for the backward pass, so many of the largest arrays are shown.
SHOWN_RESIDUALS = 8
# What a program needs besides its arguments and gradients, where the compiler gave up and does not say more.
BESIDES = "activations and temporaries"


class OutOfMemory(UserError):
    """A step does not fit the memory of its devices."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    classes: ``parameters``, ``optimizer state``, ``batch`` and ``gradients`` are their shards; ``activations`` what the
      forward pass keeps for the backward pass; ``temporaries`` what else the largest program of the step needs. Where
      the compiler gave up, the last two are one: all that it says is needed above the others.
    host: bytes in the memory of the device's host. capacity: of the device, None where it is not published.
    residuals: the activations one by one, largest first.
    not_moved: names of activations that are offloaded and that the program keeps on the device all the same, as on
      CPU, where both memories are one; they are among ``activations`` and ``temporaries``.
    """

    classes: dict[str, int]
    host: int
    capacity: int | None
    residuals: tuple[Residual, ...] = ()
    not_moved: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.classes.values())

    def __str__(self) -> str:
        """A table, largest first."""
        table = [("memory of one device", "bytes", "share")]
        for name, n in sorted(self.classes.items(), key=lambda item: -item[1]):
            table.append((name, in_units(n), f"{n / max(self.total, 1):.0%}"))
        of = "" if self.capacity is None else f"of {in_units(self.capacity)}"
        table.append(("total", in_units(self.total), of))
        if self.host:
            table.append(("in host memory", in_units(self.host), ""))
        lines = columns(table, right=1)
        if self.not_moved:
            lines.append(
                f"offloaded activations ({', '.join(self.not_moved)}) are counted on the device: CPU has one memory, "
                "where the program keeps them; on GPU and TPU they wait in host memory"
            )
        if self.residuals:
            lines += ["", "largest activations"]
            shown = self.residuals[:SHOWN_RESIDUALS]
            lines += columns([(f"  {r.shape}", _short(r.source), in_units(r.nbytes)) for r in shown], right=2)
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """``str()`` is a page for people.

    arrays: of the whole state and the batch. collectives: of all programs of one step, runs counted. split: tokens of
    a device's split region in these programs, of how many tokens; None where rows are in order. stages: of a pipeline.
    """

    arrays: Report
    collectives: tuple[Collective, ...]
    memory: Memory
    split: tuple[int, int] | None = None
    stages: int = 1

    def __str__(self) -> str:
        parts = [str(self.arrays), _collectives_table(self.collectives), str(self.memory)]
        if self.stages > 1:
            parts.append(
                f"through {self.stages} stages: what the layers of a chunk send is counted once for all of them and at "
                "every tick, and what waits for its backward pass is among the temporaries"
            )
        if self.split is not None:
            size, room = self.split
            parts.insert(
                1,
                f"below, the step of the largest of data.split_shares: {size / room:g} ({size} of {room} tokens)",
            )
        return "\n\n".join(parts)


def explain(run: AbstractRun) -> Explanation:
    """Compiles the step and reads what it will do off its programs. Raises what the compiler raises."""
    run.prepare()
    return Explanation(
        state_report(run), tuple(step_collectives(run)), memory(run), run.launcher.split, run.mesh.shape[STAGE]
    )


def state_report(run: AbstractRun) -> Report:
    """The report of parameters and optimizer state."""
    of_parameters, of_optimizer = report(run.stored), report(run.optimizer_plan)
    return Report(
        of_parameters.mesh,
        (*of_parameters.rows, *of_optimizer.rows),
        (*of_parameters.decisions, *of_optimizer.decisions),
    )


def step_collectives(run: AbstractRun) -> list[Collective]:
    """Every collective of the compiled step, in the order of its programs; counted as often as a step runs it."""
    return [
        dataclasses.replace(each, count=each.count * times, sent=each.sent * times)
        for graph, times in run.launcher.programs
        for each in collectives(graph.text, run.mesh)
    ]


def memory(run: AbstractRun, failure: str | None = None) -> Memory:
    """What fills a device. failure: the compiler's words where the step could not be compiled."""
    classes = {
        "parameters": sum(map(_shard_bytes, run.params.values())) - host_bytes(run.params),
        "optimizer state": sum(map(_shard_bytes, run.opt_state.values())) - host_bytes(run.opt_state),
        "batch": sum(map(_shard_bytes, run.launcher.batch.values())),
        "gradients": sum(
            _gradient_bytes(run.params[key], run.shardings.gradients[key]) for key in run.optimizer.layout
        ),
    }
    host = host_bytes(run.params) + host_bytes(run.opt_state)
    hardware = target(run.config.target) if run.config.target else detect(run.mesh.devices.flat[0])
    capacity = hardware.memory_bytes if hardware else None
    if failure is not None:
        if used := _needed(failure, sum(classes.values())):
            classes[BESIDES] = max(used - sum(classes.values()), 0)
        return Memory(classes, host, capacity)
    programs = [graph for graph, _ in run.launcher.programs]
    most = max(programs, key=lambda graph: graph.stats.temporary_bytes or 0)
    kept = residuals(programs[0].text)
    temporary = most.stats.temporary_bytes or 0
    if len(programs) == 1:  # gradients live within the fused step
        temporary -= classes["gradients"]
    classes["activations"] = min(sum(r.nbytes for r in kept), max(temporary, 0))
    classes["temporaries"] = max(temporary - classes["activations"], 0)
    host += max(graph.stats.host_temporary_bytes or 0 for graph in programs)
    one_memory = all(graph.stats.host_temporary_bytes is None for graph in programs)
    return Memory(classes, host, capacity, tuple(kept), run.step.offload.activations if one_memory else ())


@contextlib.contextmanager
def explained(run: AbstractRun, say: Callable[[str], None]) -> Iterator[None]:
    """Running out of memory inside, at compile or at run, ``say``s where memory went and raises OutOfMemory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = memory(run) if run.launcher.programs else memory(run, str(error))
        say(str(found))
        told = run.launcher.programs or BESIDES in found.classes
        needs = in_units(found.total) if told else "more than there is"
        of = "" if found.capacity is None else f", a device has {in_units(found.capacity)}"
        raise OutOfMemory(
            f"out of memory: the step needs {needs} a device{of}: {'; '.join(advice(run, found))}"
        ) from error


def advice(run: AbstractRun, found: Memory) -> list[str]:
    """What to change so that a step needs less memory, most useful first."""
    c, shape = run.config, run.mesh.shape
    state = sum(found.classes[name] for name in ("parameters", "optimizer state", "gradients"))
    shards = math.prod(shape[axis] for axis in run.activation_rules["batch"].mesh_axes)
    rows = c.data.batch_size // c.accumulate // shards
    if (stages := shape[STAGE]) > 1:
        held = c.pipeline.device_slots
        slots = 1 if held is None else held - 1
        ways = [f"pipeline.device_slots={slots} (the others wait on the host)"] if slots else []
        ways += [] if c.pipeline.recompute else ["pipeline.recompute=true"]
        ways += [f"more stages (stage={stages}), or more devices on fsdp (fsdp={shape['fsdp']})"]
        return ways + ([] if c.remat == "full" else [f"remat=full (now {c.remat})"])
    less_state = [f"more devices on the mesh axis fsdp (fsdp={shape['fsdp']}) or tensor (tensor={shape['tensor']})"]
    if not run.step.offload.optimizer:
        less_state.append("offload=optimizer (its state in host memory)")
    less_work = []
    if c.remat != "full":
        less_work.append(f"remat=full (now {c.remat})")
    if rows > 1:
        less_work.append(f"accumulate={c.accumulate * rows} (now {c.accumulate}), or a smaller data.batch_size")
    else:
        less_work.append(
            f"a shorter data.seq_len (now {c.data.seq_len}), or context={2 * shape['context']} in the mesh"
        )
    if not run.step.offload.activations:
        less_work.append("offload=activations=residual (one activation a layer in host memory)")
    return less_state + less_work if state > found.total / 2 else less_work + less_state


def _needed(failure: str, arguments: int) -> int | None:
    """Bytes that the compiler says a program needs: ``Used 20.13G of 15.75G hbm``, or, not counting its arguments,
    ``memory required for HLO temporaries (1.23T) exceeds available HBM``."""
    said = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", failure)
    besides = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", failure)
    if (found := said or besides) is None:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) + (0 if said else arguments)


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _gradient_bytes(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    """Summed in at least float32."""
    return math.prod(sharding.shard_shape(array.shape)) * jnp.promote_types(array.dtype, jnp.float32).itemsize


def _collectives_table(found: tuple[Collective, ...]) -> str:
    if not found:
        return "collectives of a step: none"
    sums: dict[tuple[str, str, str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in found:
        how = "async" if each.asynchronous else "sync"
        total = sums[each.kind, "+".join(each.axes), how, _short(each.source)]
        total[0] += each.count
        total[1] += each.sent
    table = [("collectives of a step", "mesh axes", "", "from", "runs", "bytes sent by a device")]
    for (kind, axes, how, source), (runs, sent) in sorted(sums.items(), key=lambda item: -item[1][1]):
        table.append((kind, axes, how, source, f"{runs:.0f}", in_units(sent)))
    table.append(("total", "", "", "", f"{sum(c.count for c in found)}", in_units(sum(c.sent for c in found))))
    return "\n".join(columns(table, right=4))


def _short(source: str) -> str:
    """A path below the directory that holds these packages, or below site-packages, without what is above it."""
    for root in (str(Path(parallelism.__file__).parents[1]), "site-packages"):
        source = source.partition(f"{root}/")[2] or source
    return source
