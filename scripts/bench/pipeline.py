"""CPU time of a training step through stages, over that of the step without: what a schedule computes twice or in vain.

    python scripts/bench/pipeline.py [--stages 4] [--microbatches 16] [--rounds 3]

Eight virtual devices share the cores of this machine, so a stage that waits costs nothing and CPU time is work. The
same microbatches, model and optimizer everywhere; without stages the devices are ``fsdp=8``, with them ``fsdp`` has
what is left. Baseline: GPipe as a shift buffer that autodiff runs backwards through, as other JAX trainers have it.
Beside it what the simulator says of the time on devices of their own, ideal and as the executor goes, in units of the
time that the work alone takes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from measure import Ended, Quiet, Worker, answer, machine

from pipelines.generators import GENERATORS
from pipelines.simulate import Costs, simulate

DEVICES = 8
PLAIN, SHIFT = "without stages", "shift buffer"
NAMES = (PLAIN, SHIFT, *GENERATORS, "1f1b, recompute")


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the model and its batch. rows: of a microbatch."""

    width: int = 256
    layers: int = 8
    vocabulary: int = 2048
    rows: int = 8
    length: int = 128


QUICK = Size(32, 8, 64, 8, 16)


def step_of(name: str, size: Size, stages: int, microbatches: int) -> Callable[[], float]:
    """A function that runs one step and returns the CPU seconds that it took."""
    import jax
    import numpy as np

    from jaxsys.models.config import ModelConfig
    from jaxsys.train.abstract import AbstractRun
    from jaxsys.train.config import DataConfig, PipelineConfig, TrainConfig
    from jaxsys.train.launch import Launcher
    from parallelism import create

    heads = size.width // 32
    model = ModelConfig(
        "llama", size.vocabulary, size.width, size.layers, heads, heads, 32, 4 * size.width, max_seq_len=size.length
    )
    through = PipelineConfig(name.partition(",")[0], recompute="recompute" in name)
    mesh = f"fsdp={DEVICES}" if name == PLAIN else f"stage={stages},fsdp={DEVICES // stages}"
    config = TrainConfig(
        run="none", model=model, mesh=mesh, accumulate=microbatches, steps=1000, compute_dtype="float32",
        data=DataConfig(batch_size=size.rows * microbatches, seq_len=size.length),
        pipeline={PLAIN: PipelineConfig(), SHIFT: PipelineConfig("gpipe")}.get(name, through),
    )  # fmt: skip
    run = AbstractRun(config, model)
    if name == SHIFT:
        from shift_buffer import ShiftBuffer

        own = {field.name: getattr(run.step, field.name) for field in dataclasses.fields(run.step)}
        run.launcher = Launcher(config, ShiftBuffer(**own), run.plan, run.graphs, run.activation_rules)
    seed = np.int32(0)

    def compiled(fn: Any, out_shardings: Any) -> Any:
        return run.graphs.compile("init", fn, seed, out_shardings=out_shardings)

    params = create(run.stored, run.unpadded.init, compiled, seed)
    begin = run.graphs.compile("init_optimizer", run.optimizer.init, params, out_shardings=run.optimizer_plan.shardings)
    held: list[Any] = [params, begin(params)]
    run.prepare()
    tokens = np.random.default_rng(0).integers(0, size.vocabulary, (config.data.batch_size, size.length), np.int32)
    positions = np.broadcast_to(np.arange(size.length, dtype=np.int32), tokens.shape)
    batch = run.launcher.place(
        {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "segments": np.ones_like(tokens), "positions": positions}
    )

    def step() -> float:
        start = time.process_time()
        held[0], held[1], metrics, _ = run.launcher.launch(*held, batch, 0, lambda *_: 0.0, Nobody())  # type: ignore[arg-type]
        jax.block_until_ready((held, metrics))
        assert np.isfinite(float(metrics["loss"]))
        return time.process_time() - start

    step()
    return step


class Nobody:
    """Whoever would lease the parameters."""

    held = False

    def publish(self, params: Any) -> None:
        pass


def simulated(name: str, stages: int, microbatches: int) -> list[str]:
    """Makespans over the work of one stage: F:B of 1:2 ideal and executed, then 1:3."""
    if name not in GENERATORS and name != SHIFT:
        return [""] * 4
    table = GENERATORS["gpipe" if name == SHIFT else name](stages, microbatches)
    each, cells = 1 / table.placement.chunks, []
    for backward in (2.0, 3.0):
        costs = Costs(each, each * backward / 2, each * backward / 2)
        alone = microbatches * (1 + backward)
        cells += [f"{simulate(table, costs, how).makespan / alone:.2f}" for how in ("ideal", "executed")]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=NAMES, action="append", help="repeatable; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="whether everything runs: a tiny model, on a busy machine too"
    )
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    if options.worker:
        step = step_of(options.worker, size, options.stages, options.microbatches)
        answer(lambda _: step())
        return
    os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
    names = [PLAIN, *(name for name in options.only or NAMES if name != PLAIN)]
    found: dict[str, list[float]] = {name: [] for name in names}
    quiet = None if options.quick else Quiet()
    for _ in range(1 if options.quick else options.rounds):
        with contextlib.nullcontext() if quiet is None else quiet:
            for name in names:  # one at a time: eight devices' worth of state each
                worker = Worker(name, [sys.executable, *sys.argv, "--worker", name])
                try:
                    found[name].append(min(float(worker.ask()) for _ in range(1 if options.quick else 3)))
                except Ended as reason:
                    print(f"{name}: not measured: {reason}", file=sys.stderr)
                worker.close()
    plain = statistics.median(found[PLAIN])
    print(f"{options.stages} stages, {options.microbatches} microbatches, {machine()}\n")
    print("| | CPU s a step | over the step without stages | 1:2 ideal | executed | 1:3 ideal | executed |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in found.items():
        if seconds:
            each = statistics.median(seconds)
            cells = simulated(name, options.stages, options.microbatches)
            print(f"| {name} | {each:.2f} | {each / plain:.2f}x | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
