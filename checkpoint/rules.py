"""Which arrays of a source go into a result, under which names and in which dtypes."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from checkpoint.manifest import DTYPES
from parallelism.errors import UserError
from parallelism.layout import Logical


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One array of a result: ``source`` is its name there, ``logical`` what it is in the result."""

    source: str
    logical: Logical


@dataclasses.dataclass(frozen=True)
class Rules:
    """What to take of a source.

    select: patterns of names as a shell has them, ``*`` goes over dots; none takes all. exclude: of those, which not.
    rename: pairs of a regular expression and what takes the place of each match (``\\1`` is a group), in this order.
    dtype: of the arrays of a float type, but for those of which ``keep_dtype`` (by name in the source) says so.
    """

    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    dtype: str | None = None
    keep_dtype: Callable[[str], bool] = lambda name: False

    def apply(self, arrays: Mapping[str, Logical], where: str) -> dict[str, Chosen]:
        """The arrays of a result, by their names in it, in the order of the source.

        where: names the source in errors. Raises UserError for a rule that meets no array, one that is no regular
        expression, two arrays that get one name, a ``dtype`` that is none of floats, and when nothing is left.
        """
        if self.dtype is not None and "float" not in getattr(DTYPES.get(self.dtype), "name", ""):
            raise UserError(f"dtype {self.dtype!r} is not a floating-point dtype; use float32, bfloat16 or float16")
        taken = list(arrays)
        if self.select:
            taken = [name for name, met in matches(self.select, taken, "select", where).items() if met]
        if self.exclude:
            taken = [name for name, met in matches(self.exclude, taken, "exclude", where).items() if not met]
        if not taken:
            raise UserError(f"no array of {where} is left to take; it holds {', '.join([*arrays][:3]) or 'none'}, ...")
        found: dict[str, Chosen] = {}
        for name, new in _renamed(self.rename, taken, where).items():
            if new in found:
                raise UserError(f"arrays {found[new].source!r} and {name!r} are both renamed to {new!r}")
            found[new] = Chosen(name, dataclasses.replace(arrays[name], name=new, dtype=self._dtype(arrays[name])))
        return found

    def _dtype(self, array: Logical) -> np.dtype:
        stays = self.dtype is None or "float" not in array.dtype.name or self.keep_dtype(array.name)
        return array.dtype if stays else DTYPES[str(self.dtype)]


def matches(patterns: Iterable[str], names: list[str], rule: str, where: str) -> dict[str, bool]:
    """For each name whether a pattern meets it. Raises UserError for a pattern that meets none."""
    met = dict.fromkeys(names, False)
    for pattern in patterns:
        own = fnmatch.filter(names, pattern) if names else []
        if not own:
            raise _meets_nothing(f"{rule} {pattern!r}", pattern, names, where)
        met |= dict.fromkeys(own, True)
    return met


def _renamed(rules: Iterable[tuple[str, str]], names: list[str], where: str) -> dict[str, str]:
    """The new name of each."""
    new = {name: name for name in names}
    for old, replacement in rules:
        what = f"rename '{old}={replacement}'"
        try:
            expression = re.compile(old)
            after = {name: expression.sub(replacement, now) for name, now in new.items()}
        except (re.error, IndexError) as error:
            raise UserError(f"{what} is no regular expression and replacement: {error}; mend it") from None
        if not any(expression.search(now) for now in new.values()):
            raise _meets_nothing(what, old, list(new.values()), where)
        if empty := next((name for name, now in after.items() if not now), None):
            raise UserError(f"{what} leaves nothing of the name {empty!r}; give it another")
        new = after
    return new


def _meets_nothing(what: str, pattern: str, names: list[str], where: str) -> UserError:
    near = difflib.get_close_matches(re.sub(r"[][*?^$\\()]", "", pattern), names, n=3, cutoff=0.3) or names[:3]
    return UserError(
        f"{what} meets none of the {len(names)} arrays of {where}; near it are {', '.join(near) or 'none'}"
    )


def rename_rule(text: str) -> tuple[str, str]:
    """``OLD=NEW`` as a pair; OLD may hold a ``=``, NEW none. Raises UserError."""
    old, sign, new = text.rpartition("=")
    if not sign or not old:
        raise UserError(f"rename {text!r}: expected 'OLD=NEW', a regular expression and what takes its place")
    return old, new
