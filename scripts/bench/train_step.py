"""Training tokens/s of a whole step (forward, backward, clipping, AdamW), against torch in the same run.

    python scripts/bench/train_step.py [--model llama-25m] [--rounds 5] [--peer tunix=PYTHON]

Both float32 and bfloat16 compute over float32 parameters; torch's are eager float32 and bfloat16 autocast, the model
that of transformers. Without torch, only jaxsys. On a machine with an NVIDIA GPU both run there. ``--peer`` adds
another JAX trainer, installed under an interpreter of its own: see peer_trainers.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from jaxsys.malloc import restart_with_tunables

LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0
# Steps of a round before the clock starts: the turns of others leave caches cold, and kernels reclaim idle memory.
WARM = 1


def jaxsys_step(config, batch: int, length: int, compute: str, steps: int) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsys.graphs import Graphs
    from jaxsys.models.state import build
    from jaxsys.optim import AdamW, Constant, OptimConfig, Optimizer
    from jaxsys.train.step import Step
    from parallelism import MeshSpec, create, plan
    from parallelism.zero import StateShardings

    model = build(config, storage=None)
    mesh = MeshSpec.parse("").build()
    placed, graphs = plan(model.layout, mesh, units=model.units), Graphs(mesh)
    optim = OptimConfig(AdamW(weight_decay=WEIGHT_DECAY), Constant(), LEARNING_RATE, CLIP)
    optimizer = Optimizer(optim, placed.layout, 1000)
    shardings = StateShardings(placed.shardings, placed.shardings, placed.shardings)
    step = Step(model, optimizer, jnp.dtype(compute), "none", shardings)
    seed, number = np.int32(0), np.int32(0)
    params = create(placed, model.init, lambda f, **k: graphs.compile("init", f, seed, **k), seed)
    state = graphs.compile("init_optimizer", optimizer.init, params)(params)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, batch, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    rows = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "segments": np.ones_like(tokens),
        "positions": positions,
    }
    rows = jax.device_put(rows)
    fused = graphs.compile("train_step", step.fused, params, state, number, rows, donate=(0, 1))
    held = [params, state]

    def run() -> float:
        for i in range(WARM + steps):
            if i == WARM:
                jax.block_until_ready(held)
                start = time.perf_counter()
            held[0], held[1], metrics = fused(held[0], held[1], number, rows)
        assert np.isfinite(float(metrics["loss"]))
        return steps * batch * length / (time.perf_counter() - start)

    run.graph = fused  # type: ignore[attr-defined]
    return run


def torch_step(config, batch: int, length: int, autocast: bool, steps: int) -> Callable[[], float] | None:
    from models import torch_model

    model = torch_model(config)
    if model is None:
        return None
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95))
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)

    def run() -> float:
        for i in range(WARM + steps):
            if i == WARM:
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert torch.isfinite(loss.detach()).item()
        return steps * batch * length / (time.perf_counter() - start)

    return run


def main() -> None:
    from measure import interleaved, machine, serve, table
    from models import MODELS
    from peer_trainers import PEERS, Job, contestants

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-25m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of one round, after one that is not")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"measure this JAX trainer too ({', '.join(PEERS)}), with the interpreter that has it; repeatable",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = MODELS[options.model]
    size = (options.batch, options.length)
    runs = {
        "torch float32": lambda: torch_step(config, *size, False, options.steps),
        "jaxsys float32": lambda: jaxsys_step(config, *size, "float32", options.steps),
        "torch bfloat16 autocast": lambda: torch_step(config, *size, True, options.steps),
        "jaxsys bfloat16": lambda: jaxsys_step(config, *size, "bfloat16", options.steps),
    }
    if options.worker:
        serve(runs[options.worker]())
        return
    job = Job.of(
        config,
        batch=options.batch,
        length=options.length,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip=CLIP,
        warm=WARM,
        steps=options.steps,
    )
    others = contestants(options.peer, job)
    found = interleaved(list(runs), options.rounds, others)
    print(f"{options.model}, {options.batch}x{options.length} tokens a step, {machine()}")
    peers = {"jaxsys float32": "torch float32", "jaxsys bfloat16": "torch bfloat16 autocast"}
    peers |= {name: f"jaxsys {name.split()[1]}" for name in others}
    print(table(found, peers, "tokens/s"))


if __name__ == "__main__":
    restart_with_tunables()
    main()
