"""What a training run is, as one frozen value."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxsys.models.config import ModelConfig
from jaxsys.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: ``stdlib`` (the Python standard library's documentation and sources), a file, a folder or a glob.

    batch_size: rows of a global batch. seq_len: tokens of a row. heldout: share of documents kept for evaluation.
    tokenizer: a model directory, GGUF file or name; None takes that of ``init_from``. limit: documents at most.
    """

    source: str = "stdlib"
    batch_size: int = 8
    seq_len: int = 256
    heldout: float = 0.05
    tokenizer: str | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints on disk; keep: how many stay there.

    ram: a directory in host memory that outlives the process (``/dev/shm/...``), written every ``ram_every`` steps;
    None for none.
    """

    every: int = 100
    keep: int = 2
    ram: str | None = None
    ram_every: int = 10


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    run: directory of its checkpoints, metrics and graphs. Started again with the same directory it resumes.
    init_from: a pretrained model to begin with; otherwise ``model`` says what to make from scratch.
    mesh: ``data=2,fsdp=-1,tensor=4``. parameter_rules, activation_rules: changes to the sharding rules.
    accumulate: microbatches a step. step_form: one graph, or grads and update groups. remat: what layers keep.
    eval_every: steps between evaluations on held-out text (0: only before and after), of ``eval_batches`` batches.
    target: named hardware whose peak utilisation is stated against; None finds it, or states none.
    profile: ``START:STOP`` writes a trace of these steps to the run directory.
    """

    run: str
    init_from: str | None = None
    model: ModelConfig | None = None
    mesh: str = ""
    parameter_rules: str = ""
    activation_rules: str = ""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = 100
    seed: int = 0
    accumulate: int = 1
    step_form: Literal["fused", "split"] = "fused"
    update_groups: int = 4
    remat: str = "none"
    parameter_dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    compute_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    storage: Literal["listed", "stacked"] | None = None
    eval_every: int = 50
    eval_batches: int = 4
    log_every: int = 1
    target: str | None = None
    profile: str | None = None
