"""Which parameters are not trained: chosen by name, with the layers stored so that no stack holds both kinds."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence

from parallelism.errors import UserError, unknown_name
from parallelism.layout import Layout

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


def frozen(patterns: Sequence[str], names: Collection[str]) -> frozenset[str]:
    """The logical names that the patterns choose, each a name or a glob (``*`` matches dots too), in order: one with
    ``!`` before it takes out again what those before it chose.

    Raises UserError for a pattern that changes nothing, and where no name is left to train.
    """
    found: set[str] = set()
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        matched = {name for name in names if fnmatch.fnmatchcase(name, glob)}
        if not matched:
            raise unknown_name("array in freeze", glob, {_LAYER.sub("*", name) for name in names})
        if pattern == glob:
            found |= matched
            continue
        if not found & matched:
            raise UserError(
                f"freeze {pattern!r}: nothing that it matches ({min(matched)}) is frozen by a pattern before it: give "
                "the one that freezes more first"
            )
        found -= matched
    if patterns and found == set(names):
        raise UserError(
            f"freeze {', '.join(patterns)}: all {len(found)} arrays, so that nothing is left to train: take some out, "
            "for example with '!norm.*' at the end"
        )
    return frozenset(found)


def cuts(chosen: Collection[str], names: Collection[str]) -> tuple[int, ...]:
    """The layers of which others of their arrays are chosen than of the one before: stacks of layers are to begin
    there."""
    kinds: dict[int, set[str]] = {}
    for name in names:
        if match := _LAYER.search(name):
            kind = kinds.setdefault(int(match[0]), set())
            if name in chosen:
                kind.add(_LAYER.sub("*", name))
    return tuple(layer for layer in sorted(kinds) if layer and kinds[layer] != kinds.get(layer - 1))


def trained(layout: Layout, chosen: Collection[str]) -> Layout:
    """The stored parameters that are trained. Raises UserError for a stack of which some layers are not."""
    kept = []
    for stored in layout.values():
        away = [part.name for part in stored.parts if part.name in chosen]
        if away and len(away) < len(stored.parts):
            raise UserError(
                f"freeze: {away[0]} is stored in {stored.key} with layers that are trained, and stages need one stack "
                "of all layers: freeze it in every layer or in none, or take a mesh without stage"
            )
        if not away:
            kept.append(stored)
    return Layout(kept)
