"""A training run: from a configuration to a mesh full of state, through the loop, to checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint import Best, Level, Manager, SaveHandle
from checkpoint.storage import directory_of
from jaxsys import configuration
from jaxsys.console import Console
from jaxsys.data import BalancedLoader, Dataset, Loader, build_dataset, documents, prefetch
from jaxsys.data.balanced import REPORTED
from jaxsys.dispatch import dispatcher
from jaxsys.graphs import Graph, cache_root, enable_persistent_cache
from jaxsys.hub import resolve
from jaxsys.live import Live
from jaxsys.models.config import ModelConfig
from jaxsys.models.pretrained import Pretrained
from jaxsys.optim import OptimConfig, Optimizer
from jaxsys.serve.engine import NonFiniteLogits, replicas_of
from jaxsys.surroundings import versions
from jaxsys.tokenizer import Tokenizer
from jaxsys.train import live_server, resume
from jaxsys.train.abstract import AbstractRun, starting_model
from jaxsys.train.agreement import agree, facts, model_files
from jaxsys.train.config import TrainConfig
from jaxsys.train.explain import explained
from jaxsys.train.freeze import frozen
from jaxsys.train.inference import Inference, served_context
from jaxsys.train.last_save import save_within
from jaxsys.train.launch import batch_grid
from jaxsys.train.metrics import Metrics, NoMetrics
from jaxsys.train.metrics import read as rows
from jaxsys.train.saves import Saves
from jaxsys.train.stop import Stop, is_notice
from parallelism import balance, create, detect, put, target
from parallelism.coordinator import default_coordinator, in_turns, together
from parallelism.errors import UserError
from parallelism.liveness import Watch
from parallelism.multihost import Processes, job


class NonFiniteLoss(UserError):
    """The loss, or what a checkpoint would hold, became NaN or infinite."""


@dataclasses.dataclass
class Summary:
    """What a run did. Losses are means over targets, in nats. stall: seconds training waited for checkpoints.

    tokens_seen: of the whole run, through all its starts; what is a rate, a sum or a list is of this start.
    finished: False when a signal or a stop step ended it early.
    save_error: why the last checkpoint is not at every level that it should be at; None if it is.
    """

    first_step: int
    step: int
    finished: bool
    losses: list[float]
    heldout_before: float | None
    heldout_after: float | None
    tokens_seen: float
    tokens_per_second: float
    model_flops_per_second: float
    utilisation: float | None
    stall_seconds: float
    checkpoint_bytes: int
    save_error: str | None


class Trainer:
    """Sets a run up (or resumes it) and runs it. Use it as a context manager: it holds the run's directory.

    watch: of the job, where it has several processes; each makes its own trainer, of the same configuration, and
    process 0 alone prints, records metrics and writes the files that are one a run.

    Raises UserError for what the configuration, the data or the checkpoints have wrong.
    """

    def __init__(self, config: TrainConfig, console: Console | None = None, watch: Watch | None = None):
        self.watch = watch or Watch(Processes(), config.liveness)
        if (found := job()[1]) != (expected := self.watch.processes.count):
            raise UserError(
                f"training: JAX has {found} processes, the trainer was told of {expected}: give it a watch of what "
                "parallelism.multihost.start returned"
            )
        self.watch.launches = dispatcher().launches
        self.lead = self.watch.processes.index == 0
        listening, keys = live_server.prepare(config.serve, expected)
        self.config, self.console = config, console or Console(shown=self.lead)
        self.watch.phase("comparing with the other processes", setup=True)
        if found > 1:
            agree(default_coordinator(), {**facts(config), **model_files(config)})
        self.watch.phase("reading the model", setup=True)
        enable_persistent_cache()
        model_config, pretrained = starting_model(config)
        self.run_directory = Path(config.run)
        self.abstract = run = AbstractRun(config, model_config)
        self.mesh, self.graphs, self.plan, self.layout = run.mesh, run.graphs, run.plan, run.layout
        self.model, self.step_functions, self.launcher = run.model, run.step, run.launcher
        if listening is not None:
            served_context(config, run.model, replicas_of(run.graphs))  # refused now, before what takes long
        for what, uneven in run.indivisible().items():
            self.console.line(f"sharding of {what}: {'; '.join(uneven)}")
        self.tokenizer = self._tokenizer()
        self._data(model_config)
        self.watch.phase("opening the checkpoints", setup=True)
        self.manager = self._open_checkpoints()
        self.saves, self.progress = Saves(self.manager, self.levels), resume.Progress()
        try:
            with explained(run, self.console.line):
                self._restore_or_begin(pretrained)
                self.live = Live(self.params, self.graphs)
                self._compile()
            self.server: live_server.LiveServer | None = None
            if listening is not None:
                assert self.inference is not None
                self.server = live_server.LiveServer(config, self.inference, listening, keys, self.console)
                self.server.front.metrics.add(self.saves.collect)
        except BaseException:
            if listening is not None:
                listening.close()
            self.manager.close()
            raise
        self.stop, self._stopped = Stop(), False
        self._save: SaveHandle | None = None
        self._noticed: float | None = None  # when, of time.monotonic, as far as this process knows
        self._saved_in_time = False  # ahead of the end of a machine: then one level will do
        self._saved_finite: tuple[jax.Array, str] | None = None
        self._clock = 0.0

    # ---------------------------------------------------------------------------------------------------- set-up

    def _tokenizer(self) -> Tokenizer:
        name = self.config.data.tokenizer or self.config.init_from
        if name is None:
            raise UserError(
                "configuration key data.tokenizer: a model from scratch needs one: a directory, file or name"
            )
        if (Path(name).expanduser() / "tokenizer.json").is_file():  # a tokenizer needs no model beside it
            return Tokenizer.from_hf(Path(name).expanduser())
        return Tokenizer.of(resolve(name))

    def _data(self, model: ModelConfig) -> None:
        c = self.config.data
        if self.tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {model.vocab_size}: "
                "use the model's own tokenizer, or a larger model.vocab_size"
            )
        source = documents(c.source, c.limit)
        self.watch.phase("tokenising", setup=True)

        def dataset_of() -> Dataset:
            return build_dataset(source, self.tokenizer, cache_root() / "data", lambda *_: self.watch.tick())

        with self.console.stage(f"data {c.source}") as said:
            dataset = in_turns(default_coordinator(), "data", dataset_of)
            agree(default_coordinator(), {f"{c.source}: the data (digest)": dataset.fingerprint})
            said.append(f"{dataset.documents} documents, {dataset.tokens:,} tokens")
        grid = batch_grid(self.config, self.mesh, self.abstract.activation_rules)
        order = dataset, c.batch_size, c.seq_len, self.config.seed
        if c.split_shares:
            sizes = balance.split_sizes(c.split_shares, grid)
            self.train_data: Loader = BalancedLoader(*order, c.heldout, grid, sizes)
        else:
            self.train_data = Loader(*order, "train", c.heldout)
        rows = c.batch_size // self.config.accumulate
        if self.config.eval_batches:
            self.heldout_data = Loader(dataset, rows, c.seq_len, self.config.seed, "heldout", c.heldout)

    def _open_checkpoints(self) -> Manager:
        c, coordinator = self.config.checkpoint, default_coordinator()
        self.identity, ram = together(coordinator, "run", self._identity)[0]
        best = Best("heldout_loss", c.keep_best) if c.keep_best else None
        kept: dict[str, Any] = {"keep_every": c.keep_every, "best": best, "verify": c.verify}
        self.levels = [Level("disk", self.run_directory / "checkpoints", keep=c.keep, every=c.every, **kept)]
        if c.ram:
            self.levels.insert(0, Level("ram", f"{ram}/own", keep=2, every=c.ram_every, on="host"))
            if c.peers is not None:
                self.levels.insert(1, Level("peers", f"{ram}/peers", keep=2, every=c.peers, on="peer"))
        if c.remote:
            self.levels.append(Level("remote", c.remote, keep=c.remote_keep, every=c.remote_every, verify=c.verify))
        return Manager(self.levels, staging_bytes=c.staging_mb * 10**6)

    def _identity(self) -> tuple[dict[str, str], str]:
        """The run's id and place, and where it has checkpoints in memory; process 0 says it for all: one writes it."""
        if not self.lead:
            return {}, ""
        run, c = self.run_directory, self.config.checkpoint
        who = resume.identity(run, c.remote)
        return {"id": who, "at": str(run.resolve())}, str(resume.own_directory(c.ram or "", run, who))

    def _restore_or_begin(self, pretrained: Pretrained | None) -> None:
        """Parameters, optimizer state and step: from the newest checkpoint, else from the beginning."""
        opt_layout, opt_shardings = self.abstract.optimizer_plan.layout, self.abstract.optimizer_plan.shardings
        self.watch.phase("making or restoring the state", setup=True)
        # A shared file system may show one process what another does not see yet: all go by what process 0 sees.
        if default_coordinator().gather("resume", str(self.manager.latest()))[0] != "None":
            self._check_resume()
            with self.console.stage("resume") as said:
                restored = self.manager.restore(
                    layout=self.layout, shardings={**self.abstract.stored.shardings, **opt_shardings}
                )
                said.append(
                    f"step {restored.step} from {restored.source}, onto mesh {self.config.mesh or 'of one device'}"
                )
                read: Counter[str] = Counter()
                for sources in default_coordinator().gather("sources", dict(restored.sources)):
                    read.update(sources)
                if len(read) > 1:
                    said.append(", ".join(f"{nbytes / 1e6:.1f} MB of {where}" for where, nbytes in read.items()))
            self.step = restored.step
            lost = {row["step"]: row["seconds"] for row in rows(self.run_directory) if "seconds" in row}
            if lost := {step: seconds for step, seconds in lost.items() if step > self.step}:
                self.console.line(f"steps {min(lost)} to {max(lost)} are lost: {sum(lost.values()):.1f} s of training")
            resume.check_position(self.run_directory, restored.meta, self.train_data.position(self.step))
            self.progress = resume.Progress(**restored.meta.get("metrics", {}))
            self.saves.took(restored)
            self.params = {key: restored.arrays[key] for key in self.plan.layout}
            self.opt_state = {name: restored.arrays[name] for name in opt_layout}
            for key, (there, here) in resume.changes(restored.meta, self._meta()).items():
                self.console.line(f"{key}: {there!r} before, {here!r} from here on")
            if line := resume.versions_line(restored.meta, self._meta()):
                self.console.line(line)
            if self.config.steps < self.step:
                self.console.line(f"steps={self.config.steps} is below step {self.step}, which the run has reached")
            return
        self.step = 0
        if pretrained:
            with self.console.stage(f"load {self.config.init_from}") as said:
                self.params = put(self.abstract.stored, pretrained.reader)
                said.append(f"{sum(s.nbytes for s in self.plan.layout.values()) / 1e6:.0f} MB")
        else:
            seed = np.int32(self.config.seed)

            def compile_init(fn: Callable, out_shardings: Any) -> Graph:
                graph = self.graphs.compile("init", fn, seed, out_shardings=out_shardings)
                self._meet()
                return graph

            self.params = create(self.abstract.stored, self.abstract.unpadded.init, compile_init, seed)
        trained = {key: self.params[key] for key in self.abstract.trained}
        begin = self.graphs.compile(
            "init_optimizer", self.abstract.optimizer.init, trained, out_shardings=opt_shardings
        )
        self.opt_state = begin(trained)

    def _check_resume(self) -> None:
        before, now = self.manager.meta(), self._meta()
        if before is None:
            return  # every manifest is damaged: restore says so
        resume.refuse(self.run_directory, before, now)
        freeze = before["config"].get("freeze", [])
        if frozen(freeze, self.plan.layout.logical) != self.abstract.frozen:
            resume.refuse_frozen(self.run_directory, freeze, self.config.freeze)
        there = configuration.from_dict(OptimConfig, before["config"]["optim"], "optim.")
        ours = self.config.optim.optimizer
        if type(there.optimizer) is type(ours):
            layout, _ = Optimizer(there, self.abstract.trained, self.config.steps).layout_of_state()
            if layout.logical == self.abstract.optimizer_plan.layout.logical:
                return
        resume.refuse_optimizer(self.run_directory, before, now)

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its arrays, at any step; ``_checkpoint`` adds how far it is."""
        c = self.config
        return {
            "run": self.identity,
            "model": configuration.to_dict(self.model.config),
            "config": configuration.to_dict(c),
            "rng": {"seed": c.seed},
            "data": {
                "fingerprint": self.train_data.dataset.fingerprint,
                "batch_size": c.data.batch_size,
                "seq_len": c.data.seq_len,
                "heldout": c.data.heldout,
                "split_shares": list(c.data.split_shares) or None,
            },
            "versions": versions(),
        }

    def _compile(self) -> None:
        """Every graph of the run, before its first step."""
        c, f = self.config, self.step_functions
        self.watch.phase("compiling", setup=True)
        if f.summary:
            self.console.line(f.summary)
        with self.console.stage("compile") as said:
            self.finite_graph = self.graphs.compile("finite", f.finite, {**self.params, **self.opt_state})
            self.inference: Inference | None = None
            if c.eval_batches or c.sample.prompts or c.serve.port is not None:
                own = self.live, self.graphs, self.tokenizer
                if (serving := self.abstract.serving()) is not None:
                    model, placed = serving
                    self.inference = Inference(c, model, *own, placed.shardings, self.plan.layout)
                else:
                    shardings = self.plan.shardings if self.step_functions.offload.parameters else None
                    self.inference = Inference(c, self.model, *own, shardings)
                said.append(f"view for inference {self.inference.view_bytes / 1e6:.0f} MB")
                if c.serve.port is not None:
                    said.append(self.inference.llm.engine.room)
            keeping = self.inference is not None and self.inference.keeps
            self.launcher.prepare(self.params, self.opt_state, keeping)
            said.append(f"{len(self.graphs)} graphs")
            self._meet()
        self.graphs.freeze()
        if self.lead:
            self.graphs.save(self.run_directory / "graphs.json")

    def _meet(self) -> None:
        """Waits until all processes have compiled what they have here: one that launches long before the others runs
        into the time-out of the first collective (of Gloo, on CPU, 30 s)."""
        agree(default_coordinator(), {"names of programs": ", ".join(graph.name for graph in self.graphs)})

    # ------------------------------------------------------------------------------------------------------ run

    def run(self, stop_at: int | None = None) -> Summary:
        """Trains from where it stands to the last step, or to ``stop_at``; saves at the end."""
        c = self.config
        last = min(c.steps, stop_at or c.steps)
        begun = self.step
        metrics = Metrics(self.run_directory, self.step) if self.lead else NoMetrics()
        losses: list[float] = []
        spent = tokens = flops = stall = 0.0
        pending: tuple[int, dict[str, jax.Array], dict[str, float]] | None = None

        def drain() -> None:
            """Reads the metrics of the last launched step: the only place that waits for the device."""
            nonlocal pending, spent, tokens, flops
            if pending is None:
                return
            step, device, host = pending
            pending = None
            self.watch.phase("waiting for the devices", step + 1)
            self._check_saved()
            values = {name: float(value) for name, value in jax.device_get(device).items()}
            seconds = time.perf_counter() - self._clock
            self._clock = time.perf_counter()
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                what = f"loss {values['loss']} and gradient norm {values['grad_norm']} at"
                raise NonFiniteLoss(self._non_finite(f"{what} {self.train_data.identity(step)}"))
            losses.append(values["loss"])
            self.progress.loss = values["loss"]
            self.progress.tokens_seen += host["tokens"]
            self.progress.training_seconds += seconds
            values |= {name: value for name, value in host.items() if name != "flops"}
            values |= {
                "tokens_per_second": host["tokens"] / seconds,
                "model_flops_per_second": host["flops"] / seconds,
                "seconds": seconds,
                "tokens_seen": self.progress.tokens_seen,
                "training_seconds": self.progress.training_seconds,
            }
            if self.server is not None:
                values |= self.server.trained(host["tokens"])
            if step > begun:  # the first step of a start includes loading its programs
                spent, tokens, flops = spent + seconds, tokens + host["tokens"], flops + host["flops"]
            if (step + 1) % c.log_every == 0:
                metrics.write(step + 1, values)
            advance(1, f"loss {values['loss']:.4f} {values['tokens_per_second']:,.0f} tokens/s")

        watched = explained(self.abstract, self.console.line)
        with watched, self.stop, self._profiler() as profile, contextlib.ExitStack() as stack:
            stack.callback(metrics.close)
            self._record_saves(metrics)
            before = self._evaluated(metrics) if c.eval_batches else None
            after = None
            self._sampled(metrics)
            advance = stack.enter_context(self.console.bar("train", c.steps, self.step))
            batches = stack.enter_context(
                contextlib.closing(prefetch(self.train_data, self.step, last, self.launcher.rows))
            )
            self._clock = time.perf_counter()
            saved = self.step if self.manager.latest() == self.step else -1
            self.watch.phase("waiting for the batch", self.step + 1)
            for step, host_batch in batches:
                profile(step)
                self.watch.phase("launching", step + 1)
                stall += self._launch(self.launcher.place(host_batch), step)
                if self.server is None:
                    drain()  # the step before, while the devices compute this one
                pending = (step, self._metrics, self._work(host_batch))
                self.step = step + 1
                evaluates, samples = (
                    bool(every) and self.step % every == 0 and self.step < last
                    for every in (c.eval_every, c.sample.every)
                )
                due = self.manager.due(self.step) or self.step == last
                # With a server a step is done when its turn is: were it read later, its time would be the next one's.
                if due or evaluates or samples or self.server is not None:
                    drain()
                # Asked once, after the devices: a signal that comes later ends the run after the next step, never
                # unsaved.
                stopping = self._stops()
                if stopping:
                    drain()
                # Before the save, which says what the weights are worth.
                if (evaluates or (self.step == last and c.eval_batches)) and not self._asked:
                    heldout = self._evaluated(metrics)
                    after = heldout if self.step == last else None
                if due or stopping:
                    stall += self._checkpoint(final=self.step == last or stopping, stopping=stopping)
                    saved = self.step
                    self._clock = time.perf_counter()
                self._record_saves(metrics)
                if samples and not self._asked:
                    self._sampled(metrics)
                if evaluates or samples:
                    self._clock = time.perf_counter()
                if stopping:
                    break
                self.watch.phase("waiting for the batch", self.step + 1)
            profile(None)
            if self.step == begun and not self._asked:
                after = before
            if not self._asked and self.step > begun:
                self._sampled(metrics)
            self.watch.phase("finishing the last save", setup=True)
            self._check_saved()
            self.manager.wait()
            self._record_saves(metrics)
            written = sum(at.last.nbytes for at in self.saves.at.values() if at.last and at.last_step == saved)
            metrics.write(self.step, {"stall_seconds": stall, "checkpoint_bytes": written})
        if self.server is not None:
            self.console.line(self.server.report())
        peak = self._peak()
        lost = [] if self._saved_in_time else [str(f.error) for f in self.manager.failures if f.step == saved]
        return Summary(
            begun, self.step, self.step >= c.steps, losses, before, after, self.progress.tokens_seen,
            tokens / spent if spent else 0.0, flops / spent if spent else 0.0,
            flops / spent / peak if peak and spent else None, stall, written,
            lost[-1] if lost else None,
        )  # fmt: skip

    def _stops(self) -> bool:
        """Whether this step is the last because of a signal: of a process of the job, and the same in all."""
        if self.stop.asked is not None:
            self.watch.ask(self.stop.asked)
        self._stopped = self.watch.stops(self.step)
        if self._stopped and self.watch.processes.count > 1:
            self.console.line(f"{self.watch.reason}: all stop after step {self.step}")
        return self._stopped

    @property
    def _asked(self) -> bool:
        """A signal came. With several processes only once all know: what they do next is to be the same."""
        return self._stopped if self.watch.processes.count > 1 else self.stop.asked is not None

    def _launch(self, batches: Any, step: int) -> float:
        """One step; returns seconds held up by a snapshot of what it donates."""

        def copied(keys: Iterable[str], busy: Callable[[], bool]) -> float:
            try:
                return self._save.copied(keys, busy, self._late) if self._save else 0.0
            except RuntimeError:  # the snapshot failed, which its save reports: nobody reads the arrays any more
                return 0.0

        def pause(arrays: Any) -> None:
            if self.server is not None:
                jax.block_until_ready(arrays)
                self.server.share.pause("train")

        with contextlib.nullcontext() if self.server is None else self.server.step():
            self.params, self.opt_state, self._metrics, waited = self.launcher.launch(
                self.params, self.opt_state, batches, step, copied, self.live, pause
            )
        return waited

    def _checkpoint(self, final: bool, stopping: bool) -> float:
        """Saves the state; returns seconds waited. final: everywhere; where the machine is about to be gone, before
        this returns and to what outlives it first."""
        arrays = self.launcher.overwritten(self.params, self.opt_state)
        self.watch.phase("saving", self.step, setup=True)
        start = time.perf_counter()
        self._check_saved()
        finite, batch = self.finite_graph(arrays), self.train_data.identity(self.step - 1)
        self._saved_finite = finite, f"parameters or optimizer state are not finite after {batch}"

        def check() -> None:
            if not finite:
                raise UserError("it is not finite")

        if self.lead:
            self._save_tokenizer()
        so_far = dataclasses.asdict(self.progress)
        if self.progress.heldout_step != self.step:
            so_far["heldout_loss"] = None  # of other weights: the best checkpoints are found by it
        meta = self._meta() | {"position": self.train_data.position(self.step), "metrics": so_far}

        def save(*levels: str) -> SaveHandle:
            self._save = self.manager.save(
                self.step, arrays, self.layout, meta, everywhere=final, levels=levels or None, check=check,
                hurried=self._hurried,
            )  # fmt: skip
            self.saves.began(self._save)
            return self._save

        if stopping and is_notice(self.watch.reason):
            grace, since = self.config.checkpoint.grace_seconds, self.stop.since or start
            step = self.step
            self._saved_in_time = save_within(
                grace, since, self.levels, self.saves, default_coordinator(), save,
                lambda line: self.console.line(f"step {step}: {line}"),
            )  # fmt: skip
        else:
            save()
        return time.perf_counter() - start

    def _hurried(self) -> bool:
        """Whether some process has a notice that its machine is about to be gone."""
        if self.stop.asked is not None:
            self.watch.ask(self.stop.asked)
        return bool(self.watch.reason) and is_notice(self.watch.reason)

    def _late(self) -> bool:
        """Whether, since a notice, earlier saves have not moved for so long that the last one needs the time, and has
        another level to go to."""
        if len(self.levels) == 1 or not self._hurried():
            return False
        self._noticed = self._noticed or self.stop.since or time.monotonic()
        still = time.monotonic() - max(self._noticed, self.manager.moved)
        return still > self.config.checkpoint.grace_seconds / 3

    def _check_saved(self) -> None:
        """Raises NonFiniteLoss for what the last save was to hold; no level has it then. The devices look at it, and
        what they found is read when something of theirs is waited for anyway."""
        if self._saved_finite is not None:
            finite, what = self._saved_finite
            self._saved_finite = None
            if not finite:
                raise NonFiniteLoss(self._non_finite(what))

    def evaluate(self) -> float:
        """Mean loss over the first ``eval_batches`` held-out batches, in nats a token."""
        assert self.inference is not None
        self.watch.phase("evaluating", self.step)
        batches = min(self.config.eval_batches, self.heldout_data.steps_per_epoch)
        try:
            total, count = self.inference.losses(map(self.heldout_data.batch, range(batches)), self.watch.tick)
        except NonFiniteLogits:
            return math.nan
        finally:
            self.inference.rest()
        return total / max(count, 1)

    def _evaluated(self, metrics: Metrics | NoMetrics) -> float:
        with self.console.stage(f"held-out loss at step {self.step}") as said:
            loss = self.evaluate()
            if not math.isfinite(loss):
                raise NonFiniteLoss(self._non_finite(f"held-out loss {loss} at step {self.step}"))
            said.append(f"{loss:.4f}")
        self.progress.heldout_loss, self.progress.heldout_step = loss, self.step
        metrics.write(self.step, {"heldout_loss": loss})
        return loss

    def _sampled(self, metrics: Metrics | NoMetrics) -> None:
        if self.inference is None or not self.config.sample.prompts:
            return
        self.watch.phase("sampling", self.step)
        with self.console.stage(f"samples at step {self.step}") as said:
            taken = self.inference.samples()
            self.inference.rest()
            said.append(f"weights of version {self.live.version}")
        pairs = [
            {"prompt": prompt, "text": result.text}
            for prompt, result in zip(self.config.sample.prompts, taken, strict=True)
        ]
        for pair in pairs:
            self.console.line(f"  {pair['prompt']!r} -> {pair['text']!r}")
        metrics.write(self.step, {"samples": pairs})

    def _record_saves(self, metrics: Metrics | NoMetrics) -> None:
        for step, values in self.saves.rows():
            metrics.write(step, values)

    # -------------------------------------------------------------------------------------------------- helpers

    def _work(self, host: dict[str, np.ndarray]) -> dict[str, float]:
        """Tokens of a batch (padding not counted), the model's floating-point operations on them, and how even a
        balanced batch is.

        Taken from the rows that this process holds, for all: with several an estimate of the operations, as attention's
        depend on how long the documents are.
        """
        contexts = host["positions"][host["segments"] > 0] + 1
        n = len(contexts)
        flops = n * self.model.config.flops_per_token(contexts) if n else 0.0
        even = {name: float(host[name]) for name in REPORTED if name in host}
        tokens = n / self.launcher.share
        if even:  # the devices of other processes may hold more or fewer
            tokens = round((1 - even["padding"]) * self.config.data.batch_size * self.config.data.seq_len)
        return {"tokens": tokens, "flops": flops / self.launcher.share, **even}

    def _peak(self) -> float | None:
        found = target(self.config.target) if self.config.target else detect(self.mesh.devices.flat[0])
        peak = found.peak(self.config.compute_dtype) if found else None
        return peak * self.mesh.size if peak else None

    def _non_finite(self, what: str) -> str:
        """The message for ``what``. Checkpoints are finite, and yet the newest may be of what went wrong."""
        self.manager.wait()
        where = "there is no good checkpoint"
        if steps := self.manager.steps():
            places = [f"{x.path}/{'*/' * (x.on != 'shared')}{directory_of(steps[-1])}" for x in self.levels]
            paths = [place for place in places if "://" in place or any(Path("/").glob(str(Path(place).resolve())[1:]))]
            before = f"step {steps[-2]}" if steps[1:] else "the beginning"
            where = f"the same command resumes from step {steps[-1]}, or from {before} after rm -r {' '.join(paths)}"
        return f"{what}; {where}: lower the learning rate or look at the text"

    def _save_tokenizer(self) -> None:
        directory = self.run_directory / "checkpoints" / "tokenizer"
        if directory.exists():
            return
        temporary = directory.with_name(".tmp-tokenizer")
        try:
            self.tokenizer.save(temporary)
            temporary.rename(directory)
        except OSError as error:
            self.console.line(
                f"the tokenizer was not saved to {directory}: {error.strerror}; the next save tries again"
            )

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        """Yields ``at(step)``, called before each step and with None after the last."""
        start, stop = self.config.profile_steps
        on = False

        def at(step: int | None) -> None:
            nonlocal on
            if not on and self.lead and step is not None and start <= step < stop:
                jax.profiler.start_trace(str(self.run_directory / "profile"))
                on = True
            elif on and (step is None or step >= stop):
                jax.block_until_ready(self.params)
                jax.profiler.stop_trace()
                on = False
                self.console.line(f"profile of steps {start}:{stop} written to {self.run_directory / 'profile'}")

        yield at
        at(None)

    def close(self) -> None:
        """Ends the server, finishes pending saves and gives the run's directory back."""
        if self.server is not None:
            self.server.close()
        self.manager.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
