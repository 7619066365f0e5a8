"""Batches of long-tailed documents: how even their plans are, and what attention sends, against rows all split.

JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python scripts/bench/balance.py

Imbalance, split region and bytes are the worst of all seeds. Bytes are those that a device sends for one layer's
attention, forward and backward, 8 query and 4 key/value heads of 64 in float32, read off the program compiled for the
mesh. The last column is milliseconds of planning a thousand documents.
"""

from __future__ import annotations

import time

import numpy as np

from jaxsys.data.balanced import FILL
from parallelism.balance import Grid, Plan, plan, split_sizes

SHARES = (0, 0.125, 0.25, 0.5, 1)
SEEDS = 20
ROWS, LONGEST = 32, 32768
"""Rows of a batch; tokens of a row, and of a document at most."""

DISTRIBUTIONS = {
    "log-normal": lambda rng: rng.lognormal(6.5, 1.4),  # median 665, mean 1,770 tokens
    "Pareto": lambda rng: 256 * (1 + rng.pareto(1.5)),  # median 406, mean 768 tokens
}
MESHES = ("context=8", "data=2,context=4")


def grid_of(mesh: str) -> Grid:
    """The grid of eight devices for the batch of that mesh."""
    groups = 2 if mesh.startswith("data=2") else 1
    return Grid(groups, 8 // groups, ROWS * LONGEST // 8)


def draw(distribution: str, grid: Grid, seed: int) -> np.ndarray:
    """Lengths of documents that fill the grid's places to FILL; the last is cut."""
    rng, left, lengths = np.random.default_rng(seed), int(FILL * grid.devices * grid.room), []
    while left:
        lengths.append(min(max(int(DISTRIBUTIONS[distribution](rng)), 16), LONGEST, left))
        left -= lengths[-1]
    return rng.permutation(lengths)


def plans(distribution: str, mesh: str) -> list[tuple[Plan, float]]:
    """The plan of each seed's documents, and the milliseconds that it took for a thousand of them."""
    grid, made = grid_of(mesh), []
    for seed in range(SEEDS):
        lengths = draw(distribution, grid, seed)
        start = time.perf_counter()
        found = plan(lengths, grid, split_sizes(SHARES, grid))
        made.append((found, (time.perf_counter() - start) * 1e6 / len(lengths)))
    return made


def sent(mesh: str, split: int | None, method: str = "ring") -> float:
    """Bytes that a device sends over ``context`` with a split region of that size; None: rows in order, all split."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxsys.graphs import Graphs
    from jaxsys.kernels.attention import SplitRows, attend
    from parallelism import MeshSpec
    from parallelism.collectives import collectives

    built, grid = MeshSpec.parse(mesh).build(), grid_of(mesh)
    B, T = (ROWS, LONGEST) if split is None else (grid.groups, grid.pieces * grid.room)
    own = 0 if split is None else grid.room - split

    def like(dtype, *rest):
        sharding = NamedSharding(built, PartitionSpec(("data", "fsdp"), "context"))
        return jax.ShapeDtypeStruct((B, T, *rest), dtype, sharding=sharding)

    def gradients(q, k, v, segments, positions):
        def loss(q, k, v):
            context = SplitRows(segments, positions, method, own)
            out, _ = attend(q, k, v, context, layer=0, window=None, scale=0.1, softcap=None, dtype=jnp.float32)
            return jnp.square(out).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    heads = (like(jnp.float32, H, 64) for H in (8, 4, 4))
    graph = Graphs(built).compile("attention", gradients, *heads, like(jnp.int32), like(jnp.int32))
    found = collectives(graph.compiled.as_text(), built)
    return sum(each.sent for each in found if "context" in each.axes)


def main() -> None:
    print(f"{SEEDS} batches of {ROWS} rows of {LONGEST} tokens, on eight devices")
    print("| mesh | lengths | imbalance | split region | MiB sent, every row split | MiB sent | padding | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for mesh in MESHES:
        room, everything = grid_of(mesh).room, sent(mesh, None) / 2**20
        for distribution in DISTRIBUTIONS:
            found, milliseconds = zip(*plans(distribution, mesh), strict=True)
            imbalance, split = max(each.imbalance for each in found), max(each.split for each in found)
            padding, nbytes = np.mean([each.padding for each in found]), sent(mesh, split) / 2**20
            print(
                f"| `{mesh}` | {distribution} | {imbalance:.3f} | {split / room:.1%} | {everything:,.0f} "
                f"| {nbytes:,.0f} | {padding:.1%} | {np.median(milliseconds):.1f} |"
            )


if __name__ == "__main__":
    main()
