"""GFLOP/s and GB/s of the forms a matmul can take on this machine: the figures behind jaxsys/kernels/matmul.py.

python scripts/bench/matmul.py
"""

from __future__ import annotations

import statistics
import time

from jaxsys.malloc import restart_with_tunables

TRAINING = [(1024, 1024, 1024), (2048, 384, 1536), (2048, 1536, 384), (4096, 4096, 4096)]
DECODE = [(rows, 576, n) for n in (1536, 49152) for rows in (1, 4, 16)]


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from measure import Quiet, machine

    from jaxsys.graphs import Graphs
    from jaxsys.kernels.matmul import linear, weight_gradient

    graphs = Graphs()

    def seconds(name, fn, *args) -> float:
        graph = graphs.compile(name, fn, *args)
        jax.block_until_ready(graph(*args))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(graph(*args))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def plain(out):
        return lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out)

    def over_rows(g, x):
        return lax.dot_general(g, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    f32, bf16 = jnp.float32, jnp.bfloat16
    print(machine())
    with Quiet():
        print(f"{'GFLOP/s of N, D, F':22}{'f32':>8}{'bf16':>8}{'bf16>f32':>10}{'g^T x':>8}{'ours':>8}")
        for n, d, f in TRAINING:
            x, w, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(n, d), (f, d), (n, f)]))
            work = 2e-9 * n * d * f
            row = [
                seconds("f32", plain(f32), x, w),
                seconds("bf16", plain(bf16), x.astype(bf16), w.astype(bf16)),
                seconds("bf16>f32", plain(f32), x.astype(bf16), w.astype(bf16)),
                seconds("over rows", over_rows, g.astype(bf16), x.astype(bf16)),
                seconds("weight gradient", weight_gradient, g.astype(bf16), x.astype(bf16)),
            ]
            print(
                f"{f'{n}, {d}, {f}':22}"
                + "".join(f"{work / t:{w}.0f}" for t, w in zip(row, (8, 8, 10, 8, 8), strict=True))
            )
        print(f"{'GB/s of kernel, N, D, F':24}{'f32':>8}{'bf16':>8}{'ours f32':>10}{'ours bf16':>10}")
        for n, d, f in DECODE:
            x, w = jax.random.normal(jax.random.key(0), (n, d)), jax.random.normal(jax.random.key(1), (f, d))
            row = [
                f * d * 4 / seconds("f32", plain(f32), x, w),
                f * d * 2 / seconds("bf16>f32", plain(f32), x.astype(bf16), w.astype(bf16)),
                f * d * 4 / seconds("linear", linear, x, w),
                f * d * 2 / seconds("linear", linear, x, w.astype(bf16)),
            ]
            print(
                f"{f'{n}, {d}, {f}':24}"
                + "".join(f"{v / 1e9:{w}.1f}" for v, w in zip(row, (8, 8, 10, 10), strict=True))
            )


if __name__ == "__main__":
    restart_with_tunables()
    main()
