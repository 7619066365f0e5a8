"""Covering arrays: few combinations of options that hold every pair of values that can occur together."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np


def product(
    factors: Mapping[str, Sequence[Any]], valid: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> np.ndarray:
    """Every valid combination: int [N, factors], indices of values.

    valid: from the values of all combinations, an array [N] a factor, to bool [N].
    """
    grid = np.meshgrid(*(np.arange(len(values)) for values in factors.values()), indexing="ij")
    rows = np.stack([axis.ravel() for axis in grid], axis=1)
    values = {name: np.asarray(each)[rows[:, i]] for i, (name, each) in enumerate(factors.items())}
    return rows[valid(values)]


def pairwise(
    factors: Mapping[str, Sequence[Any]], valid: Callable[[Mapping[str, np.ndarray]], np.ndarray], seed: int = 0
) -> list[dict[str, Any]]:
    """Valid combinations that hold every pair of values that a valid one holds; greedy, the same for a seed."""
    rows = product(factors, valid)
    size = max(len(values) for values in factors.values())
    pairs = list(combinations(range(len(factors)), 2))
    codes = np.stack([p * size * size + rows[:, a] * size + rows[:, b] for p, (a, b) in enumerate(pairs)], axis=1)
    missing = np.zeros(len(pairs) * size * size, bool)
    missing[np.unique(codes)] = True
    random = np.random.default_rng(seed)
    chosen = []
    while missing.any():
        # One that holds a pair which is still missing, and of some of those the one that holds most.
        wanted = random.choice(np.flatnonzero(missing))
        having = np.flatnonzero(codes[:, wanted // size**2] == wanted)
        some = random.choice(having, min(len(having), 4000), replace=False)
        best = some[missing[codes[some]].sum(1).argmax()]
        missing[codes[best]] = False
        chosen.append(rows[best])
    return [{name: values[row[i]] for i, (name, values) in enumerate(factors.items())} for row in chosen]
