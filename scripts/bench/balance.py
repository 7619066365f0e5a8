"""Batches of long-tailed documents: how even their plans are, and what attention sends, against rows all split.

JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python scripts/bench/balance.py

First against rows all split, then for other sizes of the batch against what no plan could go below. Imbalance, split
region and bytes are the worst of all seeds. Bytes are those that a device sends for one layer's
attention, forward and backward, 8 query and 4 key/value heads of 64 in float32, read off the program compiled for the
mesh. The last column is milliseconds of planning a thousand documents.
"""

from __future__ import annotations

import time

import numpy as np

from jaxsys.data.balanced import FILL
from parallelism.balance import EVEN, Grid, Plan, _least, plan, split_sizes

SHARES = (0, 0.125, 0.25, 0.3125, 0.5, 1)
SEEDS = 20
ROWS, LONGEST = 32, 32768
"""Rows of a batch; tokens of a row, and of a document at most."""
OTHER_ROWS = (8, 16, 32, 64)

DISTRIBUTIONS = {
    "log-normal": lambda rng: rng.lognormal(6.5, 1.4),  # median 665, mean 1,770 tokens
    "Pareto": lambda rng: 256 * (1 + rng.pareto(1.5)),  # median 406, mean 768 tokens
}
MESHES = ("context=8", "data=2,context=4")


def grid_of(mesh: str, rows: int = ROWS) -> Grid:
    """The grid of eight devices for the batch of that mesh."""
    groups = 2 if mesh.startswith("data=2") else 1
    return Grid(groups, 8 // groups, rows * LONGEST // 8)


def draw(distribution: str, grid: Grid, seed: int) -> np.ndarray:
    """Lengths of documents that fill the grid's places to FILL; the last is cut."""
    rng, left, lengths = np.random.default_rng(seed), int(FILL * grid.devices * grid.room), []
    while left:
        lengths.append(min(max(int(DISTRIBUTIONS[distribution](rng)), 16), LONGEST, left))
        left -= lengths[-1]
    return rng.permutation(lengths)


def plans(distribution: str, mesh: str, rows: int = ROWS) -> list[tuple[Plan, float]]:
    """The plan of each seed's documents, and the milliseconds that it took for a thousand of them."""
    grid, made = grid_of(mesh, rows), []
    for seed in range(SEEDS):
        lengths = draw(distribution, grid, seed)
        start = time.perf_counter()
        found = plan(lengths, grid, split_sizes(SHARES, grid))
        made.append((found, (time.perf_counter() - start) * 1e6 / len(lengths)))
    return made


def limits(lengths: np.ndarray, grid: Grid) -> tuple[float, float]:
    """The imbalance, and for an even plan the split region as a share of a device's tokens, that no plan that cuts
    nothing goes below.

    Split must be every document that would alone be more work than a device may have; beside what all devices have of
    those, where there is one context group, others must be too.
    """
    longest = np.sort(lengths)[::-1]
    work = longest * (longest + 1) // 2
    mean = work.sum() / grid.devices
    count, shared = -1, 0.0
    while count != (now := int((work + shared > EVEN * mean).sum())):
        count, shared = now, work[:now].sum() / grid.devices if grid.groups == 1 else 0.0
    share = max(longest[:count].sum() / grid.devices, longest[0] / grid.pieces if count else 0) / grid.room
    return max(float(_least(longest, work, grid) / mean), 1.0), float(share)


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
    print(
        f"\nof {SEEDS} batches those of imbalance at most {EVEN} (at best), and their largest split region (at least)"
    )
    cases = [(mesh, distribution) for mesh in MESHES for distribution in DISTRIBUTIONS]
    print("| rows |", " | ".join(f"`{mesh}`, {distribution}" for mesh, distribution in cases), "|")
    print("|---" * (1 + len(cases)) + "|")
    for rows in OTHER_ROWS:
        print(f"| {rows} |", " | ".join(reached(distribution, mesh, rows) for mesh, distribution in cases), "|")


def reached(distribution: str, mesh: str, rows: int) -> str:
    """``20 (20), 25% (24%)``: what the plans of one size of the batch come to, and the limits of any."""
    grid = grid_of(mesh, rows)
    possible = [limits(draw(distribution, grid, seed), grid) for seed in range(SEEDS)]
    found = [each for each, _ in plans(distribution, mesh, rows)]
    even = [i for i, each in enumerate(found) if each.imbalance <= EVEN]
    could = sum(imbalance <= EVEN for imbalance, _ in possible)
    split, least = max(found[i].split for i in even) / grid.room, max(possible[i][1] for i in even)
    return f"{len(even)} ({could}), {split:.3g} ({least:.2f})"


if __name__ == "__main__":
    main()
