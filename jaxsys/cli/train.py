"""``jaxsys train``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from jaxsys.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train, or resume, the run of a recipe.

    Ctrl-C, SIGTERM or SIGUSR1 finishes the step, saves and exits; the same command resumes.
    Exit code: 0; 1 when the last checkpoint could not be written, and with the traceback of a defect; 2 for what the
    user can mend; 3 when another process of the job is dead, hangs or failed; 130 when interrupted before the first
    step, or twice.
    """

    config: str
    """A recipe by name, or path/to/file.py:function."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """KEY=VALUE, repeated: changes one key of the configuration, such as optim.learning_rate=1e-4."""
    init_from: str | None = None
    """MODEL: begin with this pretrained model, in any format that jaxsys reads, whatever the recipe begins with."""
    profile: str | None = None
    """START:STOP: write a trace of these steps to the run directory."""
    print_config: bool = False
    """Print the resolved configuration as JSON, and do nothing else."""
    serve: int | None = None
    """PORT: answer HTTP requests from the weights in training, as jaxsys serve does; short for serve.port."""
    explain: bool = False
    """Compile the step, print every array with its sharding, what the step sends and what fills a device's memory,
    and do nothing else."""
    coordinator: str | None = None
    """HOST:PORT of process 0, in a job of several; without these three the environment and the scheduler say."""
    processes: int | None = None
    """How many processes the job has."""
    process: int | None = None
    """Which of them this is, from 0."""

    def run(self) -> int:
        from jaxsys import configuration
        from jaxsys.train import recipes
        from parallelism.errors import UserError

        config = configuration.override(recipes.find(self.config), self.set)
        if self.init_from is not None:
            if both := [x for x in self.set if x.startswith(("model.", "model=", "init_from="))]:
                raise UserError(f"--init-from {self.init_from} and --set {both[0]} exclude each other; give one")
            config = dataclasses.replace(config, init_from=self.init_from, model=None)
        if self.profile is not None:
            config = dataclasses.replace(config, profile=self.profile)
        if self.serve is not None:
            config = configuration.override(config, [f"serve.port={self.serve}"])
        if self.print_config:
            print(configuration.dumps(config))
            return 0
        from jaxsys.train.trainer import Trainer
        from parallelism.liveness import Watch
        from parallelism.multihost import detect, start

        limits = config.liveness
        # JAX's own time-out says nothing, so it comes last.
        processes = start(detect(self.coordinator, self.processes, self.process), 100 + 3 * limits.dead)
        if self.explain:
            with Watch(processes, limits):
                return self._explain(config, processes.index == 0)
        with Watch(processes, limits) as watch, Trainer(config, watch=watch) as trainer:
            summary = trainer.run()
        line = trainer.console.line
        said = f"loss {summary.losses[-1]:.4f}" if summary.losses else "nothing to do"
        line(f"step {summary.step} of {config.steps}, {said}")
        if summary.tokens_per_second:  # measured from the second step on
            used = "" if summary.utilisation is None else f", {summary.utilisation:.1%} of the devices' peak"
            rate = summary.model_flops_per_second / 1e9
            line(f"{summary.tokens_per_second:,.0f} tokens/s, {rate:,.1f} model GFLOP/s{used}")
        if not summary.finished:
            line(f"stopped; the same command resumes from step {summary.step}")
        if summary.save_error is not None:
            line(f"the last checkpoint FAILED: {summary.save_error}; make room, then give the same command again")
            if processes.count > 1:
                import jax

                jax.distributed.shutdown()  # it failed in all: none leaves before the others
            return 1
        return 0

    @staticmethod
    def _explain(config: TrainConfig, lead: bool) -> int:
        from jaxsys.console import Console
        from jaxsys.graphs import enable_persistent_cache
        from jaxsys.train.abstract import AbstractRun, starting_model
        from jaxsys.train.explain import explain, explained

        enable_persistent_cache()
        run = AbstractRun(config, starting_model(config)[0])
        with explained(run, Console(shown=lead).line):
            found = explain(run)
        if lead:
            print(found)
        return 0
