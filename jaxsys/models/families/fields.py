"""Configuration files read strictly: every field is taken, checked, known to be harmless, or an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from parallelism.errors import UserError

T = TypeVar("T")
_REQUIRED: Any = object()
LARGE = 2**63  # a size below it is one that numpy can be asked for


class Fields:
    """The fields of one configuration, each taken once; ``finish`` raises for one that nobody took.

    values: parsed JSON or GGUF metadata; null counts as absent. where: names the source in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._left = {name: value for name, value in values.items() if value is not None}
        self.where = where

    def take(self, name: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The field ``name`` as ``kind``, numbers positive and finite. Raises UserError if it is missing or is not."""
        if name not in self._left:
            if default is _REQUIRED:
                raise UserError(f"{self.where}: field {name!r} is missing; fetch the file again")
            return default
        value = self._left.pop(name)
        if kind is float and type(value) is int and value < LARGE:
            value = float(value)
        number, limit = kind in (int, float), LARGE if kind is int else math.inf
        if not isinstance(value, kind) or (number and (isinstance(value, bool) or not 0 < value < limit)):  # type: ignore[operator]
            expected = f"a positive {kind.__name__}" if number else f"a {kind.__name__}"
            raise UserError(f"{self.where}: {name} is {value!r}, expected {expected}")
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """Takes a field that may be absent, or one of the values that the model implements."""
        value = self._left.pop(name, supported[0])
        # 1 == True in Python, and no configuration means the one by the other.
        if not any(value == s and isinstance(value, bool) == isinstance(s, bool) for s in supported):
            raise UserError(f"{self.where}: {name} is {value!r}, supported is {' or '.join(map(repr, supported))}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Raises UserError for a field that is left, unless it is ``harmless``, switched off or empty."""
        for name in self._left.keys() - set(harmless):
            value = self._left[name]
            if value is not False and value != [] and value != {}:
                raise UserError(
                    f"{self.where}: {name} is {value!r}, a field with no meaning here; "
                    "remove it if it does not change what the model computes"
                )
