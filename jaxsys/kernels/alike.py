"""Rows that come out the same, to the bit, of programs of any number of rows.

XLA:CPU chooses the order of a sum by what is summed in all, so forms are taken whose order does not depend on the
number of rows; docs/generation.md says what was found. Elsewhere the libraries choose by shape, and only one program
agrees with itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

LEAST_ROWS = 2  # of a product: one row alone is multiplied in another way
LEAST_SUMMED = 4096  # elements: XLA:CPU sums rows of fewer in another order

_alike: ContextVar[bool] = ContextVar("rows_alike", default=False)


@contextlib.contextmanager
def rows_alike() -> Iterator[None]:
    """What is traced inside takes the forms whose rows do not depend on how many there are."""
    token = _alike.set(True)
    try:
        yield
    finally:
        _alike.reset(token)


def alike() -> bool:
    """Whether ``rows_alike`` is on."""
    return _alike.get()


def row_sums(x: jax.Array, over: int = 1) -> jax.Array:
    """Sums over the last ``over`` dimensions, which stay, as 1."""
    width = math.prod(x.shape[x.ndim - over :])
    more = -(-LEAST_SUMMED // width) - x.size // width
    if not _alike.get() or more <= 0:
        return x.sum(tuple(range(-over, 0)), keepdims=True)
    rows = jnp.pad(x.reshape(-1, width), ((0, more), (0, 0)))
    return rows.sum(-1)[:-more].reshape(*x.shape[: x.ndim - over], *(1,) * over)
