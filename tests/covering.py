"""Covering arrays: few combinations of options that hold every pair of values that can occur together."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

Factors = Mapping[str, Sequence[Any]]
Constraint = Callable[..., np.ndarray]


def product(factors: Factors, constraints: Sequence[Constraint]) -> np.ndarray:
    """Every combination that all constraints allow: int8 [N, factors], indices of values.

    constraints: each names the factors that it looks at by its parameters, and from an array [N] of values for each
    says which combinations may be: bool [N].
    """
    names, left = list(factors), list(constraints)
    rows = np.zeros((1, 0), np.int8)
    for i, name in enumerate(names):
        rows = np.concatenate(
            [np.pad(rows, ((0, 0), (0, 1)), constant_values=v) for v in range(len(factors[name]))], axis=0
        )
        # As soon as may be: all that could be made of the factors together is a thousand times more.
        for constraint in list(left):
            wanted = list(inspect.signature(constraint).parameters)
            if set(wanted) <= set(names[: i + 1]):
                rows = rows[constraint(**{k: np.asarray(factors[k])[rows[:, names.index(k)]] for k in wanted})]
                left.remove(constraint)
    assert not left, "a constraint on factors that are not there"
    return rows


def cases(factors: Factors, rows: np.ndarray) -> list[dict[str, Any]]:
    """The values of combinations."""
    return [{name: values[row[i]] for i, (name, values) in enumerate(factors.items())} for row in rows]


def pairwise(factors: Factors, constraints: Sequence[Constraint], seed: int = 0) -> list[dict[str, Any]]:
    """Allowed combinations that hold every pair of values that an allowed one holds; greedy, the same for a seed."""
    rows = product(factors, constraints)
    size = max(len(values) for values in factors.values())
    pairs = np.array(list(combinations(range(len(factors)), 2)))

    def codes(rows: np.ndarray) -> np.ndarray:
        """Which values each pair of factors has: int [rows, pairs]."""
        a, b = (rows[:, pairs[:, i]].astype(np.int64) for i in (0, 1))
        return (np.arange(len(pairs)) * size + a) * size + b

    missing = np.zeros(len(pairs) * size * size, bool)
    for part in np.array_split(rows, max(len(rows) // 20_000, 1)):
        missing[codes(part).ravel()] = True
    random = np.random.default_rng(seed)
    chosen = []
    while missing.any():
        # One that holds a pair which is still missing, and of some of those the one that holds most.
        pair, values = divmod(int(random.choice(np.flatnonzero(missing))), size**2)
        a, b = pairs[pair]
        having = np.flatnonzero((rows[:, a] == values // size) & (rows[:, b] == values % size))
        some = rows[random.choice(having, min(len(having), 4000), replace=False)]
        best = some[missing[codes(some)].sum(1).argmax()]
        missing[codes(best[None])] = False
        chosen.append(best)
    return cases(factors, np.array(chosen))
