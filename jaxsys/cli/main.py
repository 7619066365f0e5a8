"""``jaxsys train | generate | reshard | graphs``: what a user cannot mend keeps its traceback, the rest is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import operator
import os
import re
import signal
import sys
from typing import Annotated, Any

import tyro

from jaxsys.cli.generate import GenerateArgs
from jaxsys.cli.graphs import GraphsArgs
from jaxsys.cli.reshard import ReshardArgs
from jaxsys.cli.train import TrainArgs
from jaxsys.hugepages import restart_with_huge_pages
from parallelism.errors import UserError, unknown_name

COMMANDS: dict[str, Any] = {
    "train": TrainArgs,
    "generate": GenerateArgs,
    "reshard": ReshardArgs,
    "graphs": GraphsArgs,
}
Command: Any = functools.reduce(
    operator.or_, [Annotated[args, tyro.conf.subcommand(name)] for name, args in COMMANDS.items()]
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        return parse(sys.argv[1:] if argv is None else argv).run()
    except UserError as error:
        print(f"jaxsys: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has gone: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"jaxsys: {error.filename}: {error.strerror}; check the path, its permissions and the disk", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("jaxsys: interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> Any:
    """The command of a command line. Raises UserError, in one line, for what tyro explains in a box of many."""
    _check_names(argv)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Command, prog="jaxsys", args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        if not end.code:
            raise
    title, *body = [
        line for line in (re.sub(r"[^\x00-\x7f]+", " ", line).strip() for line in box.getvalue().splitlines()) if line
    ]
    what = f"{title}: {' '.join(body)}"
    what = re.split(r" (?:Argument helptext|For full helptext)", what)[0]
    command = argv[0] + " " if argv and argv[0] in COMMANDS else ""
    raise UserError(f"{what.rstrip('. ')}; see jaxsys {command}--help")


def _check_names(argv: list[str]) -> None:
    """Says what a command or an option that does not exist was meant to be."""
    if not argv or argv[0].startswith("-"):
        return
    if argv[0] not in COMMANDS:
        raise unknown_name("command", argv[0], COMMANDS)
    known = ["--help"]
    for field in dataclasses.fields(COMMANDS[argv[0]]):
        option = field.name.replace("_", "-")
        known += [f"--{option}", f"--no-{option}"] if field.type == "bool" else [f"--{option}"]
    for word in argv[1:]:
        option = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and word != "--" and option not in known:
            raise unknown_name(f"option of jaxsys {argv[0]}", option, known)


def entry() -> None:
    """The ``jaxsys`` program."""
    restart_with_huge_pages()
    sys.exit(main())


if __name__ == "__main__":
    entry()
