"""The same step by other JAX trainers, for ``train_step.py --peer NAME=PYTHON``.

    python scripts/bench/train_step.py --peer tunix=/path/to/tunix/bin/python

Each trainer has an interpreter of its own, because their requirements exclude one another; so this file, which those
interpreters run, imports nothing of jaxsys. A trainer's model code and its jitted train step are its own; from here
come the shape, optax's clipped AdamW (as train_step.py sets it) and the random tokens. Each is measured as its users
start it, and with the huge pages that jaxsys gives itself. Written for google-tunix 0.1.7,
and easydel 0.3, which does not import without pillow and torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is told: the model's shape and how to train it."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    batch: int
    length: int
    learning_rate: float
    weight_decay: float
    clip: float
    warm: int
    steps: int

    @classmethod
    def of(cls, config: Any, **training: Any) -> Job:
        """A job with the shape of a ModelConfig."""
        names = [field.name for field in dataclasses.fields(cls) if field.name not in training]
        return cls(**{name: getattr(config, name) for name in names}, **training)


@dataclasses.dataclass(frozen=True)
class Training:
    """A trainer at work: ``step`` does one step and returns its loss, ``held`` is all that the last one left."""

    step: Callable[[], Any]
    held: Callable[[], Any]
    parameters: Callable[[], Any]


def _optimizer(job: Job) -> Any:
    import optax

    adamw = optax.adamw(job.learning_rate, b1=0.9, b2=0.95, weight_decay=job.weight_decay)
    return optax.chain(optax.clip_by_global_norm(job.clip), adamw)


def _tokens(job: Job) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, job.vocab_size, (job.batch, job.length)).astype(np.int32)


def tunix(job: Job, dtype: str) -> Training:
    """PeftTrainer's step of all parameters of Llama3, which computes in the type of its parameters."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft import utils
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    config = ModelConfig(
        num_layers=job.n_layers,
        vocab_size=job.vocab_size,
        embed_dim=job.d_model,
        hidden_dim=job.d_ff,
        num_heads=job.n_heads,
        head_dim=job.head_dim,
        num_kv_heads=job.n_kv_heads,
        rope_theta=int(job.rope_theta),
        norm_eps=job.norm_eps,
        weight_tying=job.tie_embeddings,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    # Its MLP starts at zero, for weights to be loaded, and from zero gets no gradient.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    shapes = jax.tree.map(lambda p: p if p.ndim == 1 else 0.02 * jax.random.normal(next(keys), p.shape), params)
    nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), shapes))
    trainer = PeftTrainer(model, _optimizer(job), TrainingConfig(eval_every_n_steps=1_000_000))
    mask = jnp.ones((job.batch, job.length), bool)
    batch = {
        "input_tokens": jnp.asarray(_tokens(job)),
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    return Training(
        lambda: step(batch)[0],
        lambda: (nnx.state(model), nnx.state(trainer.optimizer)),
        lambda: nnx.state(model, nnx.Param),
    )


def easydel(job: Job, dtype: str) -> Training:
    """The step of its base Trainer, jitted with the state donated as there, over float32 parameters."""
    import easydel as ed
    import jax
    import jax.numpy as jnp
    from easydel.trainers.trainer._fn import training_step
    from flax import nnx

    jax.config.update("jax_enable_compilation_cache", False)  # Its import turns it on; the others compile anew.
    config = ed.LlamaConfig(
        vocab_size=job.vocab_size,
        hidden_size=job.d_model,
        intermediate_size=job.d_ff,
        num_hidden_layers=job.n_layers,
        num_attention_heads=job.n_heads,
        num_key_value_heads=job.n_kv_heads,
        head_dim=job.head_dim,
        max_position_embeddings=job.max_seq_len,
        rms_norm_eps=job.norm_eps,
        rope_theta=job.rope_theta,
        tie_word_embeddings=job.tie_embeddings,
        attn_dtype=jnp.dtype(dtype),
    )
    model = ed.LlamaForCausalLM(config, dtype=jnp.dtype(dtype), param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    state = model.to_state().init_tx(_optimizer(job))
    tokens = jnp.asarray(_tokens(job))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": jnp.ones_like(tokens)}
    jitted = jax.jit(training_step, donate_argnums=(0,))

    def step() -> Any:
        nonlocal state
        with model.mesh:
            state, metrics = jitted(state, batch)
        return metrics.loss

    return Training(step, lambda: state, lambda: state.graphstate)


@dataclasses.dataclass(frozen=True)
class Peer:
    package: str
    build: Callable[[Job, str], Training]
    variants: tuple[str, ...]
    """What it can be measured as; the first word is the type that it computes in."""


PEERS = {
    "tunix": Peer("google-tunix", tunix, ("float32", "bfloat16 parameters")),
    "easydel": Peer("easydel", easydel, ("float32", "bfloat16")),
}


def rate(name: str, training: Training, job: Job) -> Callable[[], float]:
    """Tokens/s of one round, as train_step.py measures it."""
    import jax
    import numpy as np

    losses: list[float] = []

    def run() -> float:
        found = []
        for i in range(job.warm + job.steps):
            if i == job.warm:
                jax.block_until_ready((found, training.held()))
                start = time.perf_counter()
            found.append(training.step())
        jax.block_until_ready((found, training.held()))
        seconds = time.perf_counter() - start
        losses.extend(float(loss) for loss in found)
        assert np.isfinite(losses).all() and losses[-1] < losses[0], f"{name} does not learn: {losses}"
        if len(losses) == len(found):
            count = sum(leaf.size for leaf in jax.tree.leaves(training.parameters()))
            print(f"{name}: {count:,} parameters, loss {losses[0]:.3f} to {losses[-1]:.3f}", file=sys.stderr)
        return job.steps * job.batch * job.length / seconds

    return run


def contestants(peers: Sequence[str], job: Job) -> dict[str, list[str]]:
    """The worker command of every variant of each ``NAME=PYTHON``; exits with a line if one cannot run."""
    commands = {}
    for peer in peers:
        name, _, python = peer.partition("=")
        if name not in PEERS or not python:
            sys.exit(f"--peer {peer}: expected NAME=PYTHON, NAME one of {', '.join(PEERS)}")
        # -E: a PYTHONPATH for jaxsys would put this repository's packages before the trainer's.
        command = [python, "-E", str(Path(__file__).resolve()), "--job", json.dumps(dataclasses.asdict(job))]
        try:
            found = subprocess.run([*command, "--version-of", name], capture_output=True, text=True)
        except OSError as e:
            sys.exit(f"--peer {peer}: {e.strerror}")
        if found.returncode or not found.stdout:
            sys.exit(f"--peer {peer}: {found.stderr.strip().rpartition(chr(10))[2] or 'not a Python interpreter'}")
        print(found.stdout.strip(), file=sys.stderr)
        for variant in PEERS[name].variants:
            worker = [*command, "--worker", f"{name} {variant}"]
            commands[f"{name} {variant}"] = ["env", "-u", "GLIBC_TUNABLES", *worker]
            commands[f"{name} {variant}, huge pages"] = worker
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", required=True, help="a Job as JSON; train_step.py passes it")
    parser.add_argument("--version-of", choices=list(PEERS), help="only print the version installed")
    parser.add_argument("--worker", help="trainer and variant")
    options = parser.parse_args()
    if options.version_of:
        package = PEERS[options.version_of].package
        try:
            print(f"{package} {importlib.metadata.version(package)}, jax {importlib.metadata.version('jax')}")
        except importlib.metadata.PackageNotFoundError as e:
            sys.exit(f"{e.name} is not installed under {sys.executable}")
        return
    from measure import serve

    job = Job(**json.loads(options.job))
    name, dtype = options.worker.split()[:2]
    serve(rate(options.worker, PEERS[name].build(job, dtype), job))


if __name__ == "__main__":
    main()
