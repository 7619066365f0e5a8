"""Layouts that several tests use."""

import numpy as np

from parallelism import Layout, Logical, Stored

FLOAT32 = np.dtype(np.float32)


def single(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype=FLOAT32) -> Stored:
    """A stored array that is one logical array of the same name."""
    return Stored(name, shape, dtype, axes, (Logical(name, shape, dtype, axes),))


def stack(name: str, layers: int, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype=FLOAT32) -> Stored:
    """``layers.{name}``: the same array of every layer, along a leading axis."""
    parts = tuple(Logical(f"layers.{i}.{name}", shape, dtype, axes) for i in range(layers))
    return Stored(f"layers.{name}", (layers, *shape), dtype, ("layers", *axes), parts, stacked=True)


def smollm2(layers: int = 30) -> Layout:
    """Shapes of SmolLM2-135M: 9 query heads, 3 key/value heads, tied embedding."""
    arrays = [single("embed.table", (49152, 576), ("vocab", "embed"))]
    for i in range(layers):
        p = f"layers.{i}."
        arrays += [
            single(p + "attention.norm", (576,), ("norm",)),
            single(p + "attention.q.kernel", (576, 9, 64), ("embed", "heads", "head_dim")),
            single(p + "attention.k.kernel", (576, 3, 64), ("embed", "kv_heads", "head_dim")),
            single(p + "attention.v.kernel", (576, 3, 64), ("embed", "kv_heads", "head_dim")),
            single(p + "attention.o.kernel", (9, 64, 576), ("heads", "head_dim", "embed")),
            single(p + "mlp.norm", (576,), ("norm",)),
            single(p + "mlp.gate.kernel", (576, 1536), ("embed", "mlp")),
            single(p + "mlp.up.kernel", (576, 1536), ("embed", "mlp")),
            single(p + "mlp.down.kernel", (1536, 576), ("mlp", "embed")),
        ]
    return Layout([*arrays, single("norm", (576,), ("norm",))])
