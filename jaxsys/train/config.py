"""What a training run is, as one frozen value."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxsys.configuration import BadValue, expect, expect_at_least, expect_positive, expect_text
from jaxsys.models.config import ModelConfig
from jaxsys.optim import OptimConfig
from jaxsys.serve.engine import EngineConfig
from jaxsys.serve.forward import Numerics
from jaxsys.serve.scheduler import NewWeights
from parallelism import sequence, target
from parallelism.errors import UserError
from parallelism.liveness import Limits
from parallelism.placement import Offload


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: ``stdlib`` (the Python standard library's documentation and sources), a file, a folder or a glob.

    batch_size: rows of a global batch. seq_len: tokens of a row. heldout: share of documents kept for evaluation.
    tokenizer: a directory with a tokenizer.json, a model directory, GGUF file or name; None takes that of
    ``init_from``. limit: documents at most.
    split_shares: documents are arranged by ``parallelism.balance``, and those that are split over the mesh axis
    ``context`` take one of these shares of a device's tokens: each batch the smallest with which attention's work is
    even. There is a graph for each. Empty: rows are cut in order, and every row is split.
    """

    source: str = "stdlib"
    batch_size: int = 8
    seq_len: int = 256
    heldout: float = 0.05
    tokenizer: str | None = None
    limit: int | None = None
    split_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "batch_size", "seq_len")
        expect(self, "shares from 0 to 1", lambda shares: all(0 <= share <= 1 for share in shares), "split_shares")
        expect_at_least(self, 1, "limit")
        expect_text(self, "source", "tokenizer")
        expect(self, "at least 0 and below 1", lambda share: 0 <= share < 1, "heldout")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """What training does with the experts of a model, in place of what ``model.experts`` or the files of ``init_from``
    say (see ``jaxsys.models.config.Experts``); None leaves it at that. A run may go on with others.
    """

    capacity_factor: float | None = None
    balance_loss: float | None = None
    z_loss: float | None = None

    def __post_init__(self) -> None:
        expect_positive(self, "capacity_factor")
        expect_at_least(self, 0, "balance_loss", "z_loss")

    @property
    def given(self) -> dict[str, Any]:
        """What is not left at what the model says."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def applied(self, model: ModelConfig) -> ModelConfig:
        """The model as it is trained. Raises UserError where it has no experts that this could be of."""
        if not self.given:
            return model
        if model.experts is None:
            name, value = next(iter(self.given.items()))
            raise UserError(
                f"experts.{name}={value}: the model ({model.family}) has no experts: leave it out, or train another"
            )
        return dataclasses.replace(model, experts=dataclasses.replace(model.experts, **self.given))


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints on disk, or "auto": as few as what a save takes allows; keep: how many stay
    there, besides those that ``keep_every`` divides and the ``keep_best`` ones with the least held-out loss.

    ram: a directory in host memory that outlives the process (``/dev/shm/...``), the same path on all hosts, each of
    which keeps there what its processes write, every ``ram_every`` steps; None for none. Runs may share it: each has a
    directory of its own there, until somebody deletes it. peers: steps between copies in the memory of another host,
    under the same path; None for none.
    remote: a directory, or the URL of an object store, for every ``remote_every`` steps, of which ``remote_keep`` stay
    (None: all).
    staging_mb: host memory at most between devices and the first of these, in MB. verify: read what was written on disk
    and remote, and compare, before it counts.
    grace_seconds: from a notice (SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU) to the end of the machine; the last save goes to
    levels that are left then, the fastest first.
    """

    every: int | Literal["auto"] = 100
    keep: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    ram: str | None = None
    ram_every: int = 10
    peers: int | None = None
    remote: str | None = None
    remote_every: int | Literal["auto"] = "auto"
    remote_keep: int | None = None
    staging_mb: int = 1024
    verify: bool = False
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "keep", "ram_every", "staging_mb")
        expect_at_least(self, 0, "keep_best")
        numbers = "every", "keep_every", "peers", "remote_every", "remote_keep"
        expect(self, "at least 1", lambda number: number in (None, "auto") or number >= 1, *numbers)
        expect_positive(self, "grace_seconds")
        expect_text(self, "ram", "remote")
        if self.peers is not None and self.ram is None:
            raise BadValue("peers", self.peers, "None without ram, a directory in the memory of every host")


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How the microbatches of a step (``accumulate``) go through the stages of a mesh with ``stage`` above 1.

    schedule: gpipe, 1f1b, eager, interleaved, zb-h1, zb-v, or the file of a table (``jaxsys pipeline --save``). chunks:
    pieces of the model that a stage has under interleaved, two if it is None. recompute: a stage keeps what comes into
    it and nothing else of a microbatch. device_slots: microbatches (of a chunk) that a stage keeps on the device, the
    others' activations wait in host memory; None keeps all. head: how many layers' work the model's head is, for
    dealing layers out to stages: the last one gets fewer by that, and the others hold more of each microbatch.
    """

    schedule: str = "1f1b"
    chunks: int | None = None
    recompute: bool = False
    device_slots: int | None = None
    head: float = 0.0

    def __post_init__(self) -> None:
        expect_text(self, "schedule")
        expect_at_least(self, 0, "head")
        expect_at_least(self, 1, "chunks", "device_slots")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Prompts that the weights in training continue: before the first step, every ``every`` steps (0: not between),
    and after the last.

    max_tokens: of each continuation. temperature: 0 takes the most likely token; drawn ones derive from the run's seed.
    chat: the prompts are messages of a user, put into the model's chat template.
    """

    prompts: tuple[str, ...] = ()
    every: int = 0
    max_tokens: int = 32
    temperature: float = 0.0
    chat: bool = False

    def __post_init__(self) -> None:
        expect_at_least(self, 0, "every", "temperature")
        expect_at_least(self, 1, "max_tokens")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """A server, as ``jaxsys serve`` is one, that answers from the weights in training as long as the run goes on.

    port: where it listens, 0 for a free one; None serves nobody. host: 0.0.0.0 listens to other machines too.
    share: of the devices' time that it has when training wants them too. new_weights: what its requests do when a step
    gives new weights, see ``jaxsys.serve.scheduler.NewWeights``.
    max_context: tokens of a prompt with its continuation; None is as many as the model and the pool allow. kv_bytes,
    host_kv_bytes: of the pool of keys and values, and host memory for more. max_queue: requests that may wait.
    api_keys_file: a file of keys, one a line, of which a client must have one.
    """

    port: int | None = None
    host: str = "127.0.0.1"
    share: float = 0.2
    new_weights: NewWeights = "switch"
    max_context: int | None = None
    kv_bytes: int = EngineConfig.kv_bytes
    host_kv_bytes: int = 0
    max_queue: int = 1024
    api_keys_file: str | None = None

    def __post_init__(self) -> None:
        expect(self, "0 to 65535", lambda port: port is None or 0 <= port < 2**16, "port")
        expect(self, "above 0 and below 1", lambda share: 0 < share < 1, "share")
        expect_at_least(self, 1, "max_context", "kv_bytes", "max_queue")
        expect_at_least(self, 0, "host_kv_bytes")
        expect_text(self, "host", "api_keys_file")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    run: directory of its checkpoints, metrics and graphs. Started again with the same directory it resumes.
    init_from: a pretrained model to begin with; otherwise ``model`` says what to make from scratch.
    experts: what is trained otherwise than the model's experts say.
    freeze: parameters that are not trained, by logical name or glob, in order; ``!`` before one takes out again what
    those before it chose, as in ``*,!layers.28.*,!layers.29.*``.
    mesh: ``data=2,fsdp=-1,tensor=4``. parameter_rules, activation_rules: changes to the sharding rules;
    gradient_rules, optimizer_rules: what is different for gradients and optimizer state (ZeRO-1 and 2).
    accumulate: microbatches a step. step_form: one graph, or grads and update groups. remat: what layers keep.
    pipeline: how they go through the stages of a mesh that has some.
    offload: what lives in host memory, such as ``optimizer=0.5,parameters,activations=residual``; see docs/offload.md.
    context_method: how attention works on a mesh with context > 1, see ``parallelism.sequence``.
    eval_every: steps between evaluations on held-out text (0: only before and after), of ``eval_batches`` batches.
    sample: prompts to continue along the way, from the live weights. serve: a server of them. numerics: of evaluation,
    samples and server, which run the same programs, see ``jaxsys.serve.forward.Numerics``.
    target: named hardware whose peak utilisation is stated against; None finds it, or states none.
    liveness: after how long a job of several processes ends because one of them is dead or hangs.
    profile: ``START:STOP`` writes a trace of these steps to the run directory.
    """

    run: str
    init_from: str | None = None
    model: ModelConfig | None = None
    experts: ExpertsConfig = ExpertsConfig()
    freeze: tuple[str, ...] = ()
    mesh: str = ""
    parameter_rules: str = ""
    activation_rules: str = ""
    gradient_rules: str = ""
    optimizer_rules: str = ""
    data: DataConfig = DataConfig()
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    serve: ServeConfig = ServeConfig()
    steps: int = 100
    seed: int = 0
    accumulate: int = 1
    step_form: Literal["fused", "split"] = "fused"
    pipeline: PipelineConfig = PipelineConfig()
    update_groups: int = 4
    remat: str = "none"
    offload: str = ""
    context_method: sequence.Method = "ring"
    parameter_dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    compute_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    storage: Literal["listed", "stacked"] | None = None
    numerics: Numerics = "fast"
    eval_every: int = 50
    eval_batches: int = 4
    log_every: int = 1
    target: str | None = None
    liveness: Limits = Limits()
    profile: str | None = None

    def __post_init__(self) -> None:
        expect_text(self, "run", "init_from")
        expect(self, "names or globs of parameters", all, "freeze")
        expect_at_least(self, 1, "steps", "accumulate", "update_groups", "log_every")
        expect_at_least(self, 0, "seed", "eval_every", "eval_batches")
        expect(self, "less than 2**31", lambda number: number < 2**31, "seed", "steps")
        Offload.parse(self.offload)
        if self.checkpoint.keep_best and not self.eval_batches:
            found = self.checkpoint.keep_best
            raise BadValue("checkpoint.keep_best", found, "0 where nothing is evaluated (eval_batches=0)")
        if self.target is not None:
            target(self.target)
        start, _ = self.profile_steps
        if self.profile and start >= self.steps:
            raise UserError(f"profile {self.profile!r}: the run ends at step {self.steps}: begin earlier")

    @property
    def profile_steps(self) -> tuple[int, int]:
        """First step of the profile and the one after its last; (0, 0) without a profile."""
        if self.profile is None:
            return 0, 0
        start, colon, stop = self.profile.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise UserError(f"profile {self.profile!r}: expected START:STOP with START below STOP, for example 10:13")
        return int(start), int(stop)
