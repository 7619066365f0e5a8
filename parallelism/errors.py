"""The error a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something outside the program is wrong: a flag, a file, a mesh, a checkpoint.

    The message is one line that says what, what was found, what was expected and what to do.
    Command-line entry points print it alone on stderr and exit non-zero; everything else that
    is raised is a defect and keeps its traceback.
    """


def unknown_name(what: str, found: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not one of ``known``: ``what`` says what it should name.

    Names the nearest known ones, or all of them when none is near.
    """
    known = sorted(known)
    near = difflib.get_close_matches(found, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known) or 'none'}"
    return UserError(f"unknown {what} {found!r}: {hint}")
