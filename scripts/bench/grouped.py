"""The grouped matmul of expert layers, against ``jax.lax.ragged_dot`` and a dense matmul of as much work.

    python scripts/bench/grouped.py                 the kernel, forward and with both gradients
    python scripts/bench/grouped.py --step          a train step of a small model with experts, against a dense one

Rates are GFLOP/s of useful work: every row times the kernel of its own expert. Ratios are medians over rounds in which
all forms take turns. Rows per expert are uneven: shares are drawn from a Dirichlet distribution.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from jaxsys.malloc import restart_with_tunables

# Experts, rows of all of them, width in and out: one kernel of a layer of each model, scaled down.
SHAPES = {
    "Mixtral / 4": (8, 2048, 1024, 3584),
    "OLMoE / 2": (64, 4096, 1024, 512),
    "small": (8, 4096, 384, 768),
}
DTYPES = ("float32", "bfloat16")


def sizes_of(experts: int, rows: int) -> Any:
    """Rows of each expert, int32 [E]."""
    import numpy as np

    shares = np.random.default_rng(0).dirichlet(np.full(experts, 4.0))
    return np.diff(np.round(np.cumsum(shares) * rows), prepend=0).astype(np.int32)


def forms() -> dict[str, Callable]:
    """rows [R, D], kernels [E, F, D], sizes [E] to [R, F]; ``dense`` multiplies all rows by the first kernel."""
    import jax.numpy as jnp
    from jax import lax

    from jaxsys.kernels.grouped import grouped_linear
    from jaxsys.kernels.matmul import linear

    def ragged(rows, kernel, sizes):
        a = rows.astype(kernel.dtype)
        numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
        out = lax.ragged_dot_general(a, kernel, sizes, numbers, preferred_element_type=jnp.float32)
        return out.astype(rows.dtype)

    return {
        "grouped": grouped_linear,
        "dense": lambda rows, kernel, _: linear(rows, kernel[0]),
        "ragged_dot": ragged,
    }


def rounds(graphs: dict[str, Callable], count: int) -> dict[str, list[float]]:
    """Seconds of each, one a round in turn, after one that is not counted."""
    import jax

    found: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(count + 1):
        for name, run in graphs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                found[name].append(time.perf_counter() - start)
    return found


def kernels(count: int, small: bool) -> None:
    import jax
    import jax.numpy as jnp

    from jaxsys.graphs import Graphs

    graphs = Graphs()
    print(f"{'':34}{'grouped':>10}{'dense':>10}{'ragged_dot':>12}{'/ dense':>10}{'/ ragged_dot':>14}")
    for shape, (E, R, D, F) in SHAPES.items():
        if small:
            R, D, F = R // 8, D // 8, F // 8
        for dtype in DTYPES:
            # Activations are float32 on CPU whatever the kernels are in.
            rows = jax.random.normal(jax.random.key(0), (R, D))
            kernel = jax.random.normal(jax.random.key(1), (E, F, D)).astype(dtype)
            g, sizes = jax.random.normal(jax.random.key(2), (R, F)), jnp.asarray(sizes_of(E, R))
            for passes, work in (("forward", 1), ("forward and backward", 3)):
                runs: dict[str, Callable] = {}
                for name, form in forms().items():
                    operands = rows, kernel[:1] if name == "dense" else kernel, sizes

                    def both(rows, kernel, sizes, g, form=form):
                        out, pull = jax.vjp(lambda r, k: form(r, k, sizes), rows, kernel)
                        return out, pull(g)

                    args = operands if work == 1 else (*operands, g)
                    graph = graphs.compile(f"{name} {shape} {dtype} {passes}", form if work == 1 else both, *args)
                    runs[name] = lambda graph=graph, args=args: graph(*args)
                seconds = rounds(runs, count)
                rate = {name: 2e-9 * work * R * D * F / statistics.median(each) for name, each in seconds.items()}
                ratio = {
                    name: statistics.median(b / a for a, b in zip(seconds["grouped"], seconds[name], strict=True))
                    for name in ("dense", "ragged_dot")
                }
                title = f"{shape}, {dtype}, {'fwd' if work == 1 else 'fwd+bwd'}"
                print(
                    f"{title:34}{rate['grouped']:10.0f}{rate['dense']:10.0f}{rate['ragged_dot']:12.0f}"
                    f"{ratio['dense']:9.2f}x{ratio['ragged_dot']:13.2f}x",
                    flush=True,
                )


def steps(count: int, small: bool) -> None:
    """A step of a model with eight experts, two a token, against the dense model with as many active parameters."""
    import jax.numpy as jnp
    import numpy as np

    from jaxsys.models.config import Experts, ModelConfig
    from jaxsys.train import DataConfig, TrainConfig
    from jaxsys.train.abstract import AbstractRun

    width = 96 if small else 768
    shape: dict[str, Any] = {
        "vocab_size": 8192, "d_model": width // 2, "n_layers": 2 if small else 8, "n_heads": 6, "n_kv_heads": 6,
        "head_dim": width // 12, "d_ff": 2 * width,
    }  # fmt: skip
    routed = Experts(8, 2, width, balance_loss=0.01)
    models = {
        "experts": ModelConfig("mixtral", **shape, experts=routed),
        "dense": ModelConfig("llama", **shape),
    }
    rows, length = 8, 256
    print(f"{'':34}{'experts':>10}{'dense':>10}{'ratio':>10}   tokens/s")
    for dtype in DTYPES:
        runs = {}
        for name, model in models.items():
            config = TrainConfig(
                run="bench", model=model, data=DataConfig(batch_size=rows, seq_len=length), compute_dtype=dtype
            )
            run = AbstractRun(config, model)
            run.prepare()
            graph, _ = run.launcher.programs[0]
            rng, layout = np.random.default_rng(0), run.layout
            made = {
                key: jnp.asarray(0.02 * rng.standard_normal(stored.shape), stored.dtype)
                for key, stored in layout.items()
            }
            tokens = jnp.asarray(rng.integers(0, 8192, (1, rows, length)), jnp.int32)
            places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
            batch = {"tokens": tokens, "targets": tokens, "segments": jnp.ones_like(tokens), "positions": places}
            held = [{k: made[k] for k in run.params}, {k: abs(made[k]) for k in run.opt_state}]

            def once(graph=graph, held=held, batch=batch):
                held[0], held[1], metrics = graph(*held, np.int32(0), batch)
                return metrics

            runs[name] = once
        seconds = rounds(runs, count)
        rate = {name: rows * length / statistics.median(each) for name, each in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["experts"], seconds["dense"], strict=True))
        print(f"{dtype:34}{rate['experts']:10.0f}{rate['dense']:10.0f}{ratio:9.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--step", action="store_true", help="a train step and not the kernel alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="an eighth of every size: does it run at all?")
    parser.add_argument("--busy", action="store_true", help="measure even while others use the cores")
    args = parser.parse_args()
    from measure import Quiet, machine

    print(machine())
    work = steps if args.step else kernels
    if args.busy:
        work(args.rounds, args.small)
    else:
        with Quiet():
            work(args.rounds, args.small)


if __name__ == "__main__":
    restart_with_tunables()
    main()
