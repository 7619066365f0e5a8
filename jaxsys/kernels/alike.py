"""Rows that come out the same, to the bit, of programs of any number of rows.

XLA:CPU chooses the order of a sum by what is summed in all, so forms are taken whose order does not depend on the
number of rows; docs/generation.md says what was found. Elsewhere the libraries choose by shape, and only one program
agrees with itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

LEAST_ROWS = 2  # of a product: one row alone is multiplied in another way
LEAST_SUMMED = 4096  # elements: of fewer XLA:CPU sums rows in another order, and takes another exp before the sum

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
