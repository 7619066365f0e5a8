"""The commands there are, and from a command line to one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import operator
import re
from typing import Annotated, Any

import tyro

from jaxsys.cli.generate import GenerateArgs
from jaxsys.cli.graphs import GraphsArgs
from jaxsys.cli.pipeline import PipelineArgs
from jaxsys.cli.reshard import ReshardArgs
from jaxsys.cli.serve import ServeArgs
from jaxsys.cli.train import TrainArgs
from parallelism.errors import UserError, unknown_name

COMMANDS: dict[str, Any] = {
    "train": TrainArgs,
    "generate": GenerateArgs,
    "serve": ServeArgs,
    "reshard": ReshardArgs,
    "graphs": GraphsArgs,
    "pipeline": PipelineArgs,
}
Command: Any = functools.reduce(
    operator.or_, [Annotated[args, tyro.conf.subcommand(name)] for name, args in COMMANDS.items()]
)


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
        line
        for line in (re.sub(r"[^\x00-\x7f]+", " ", line).strip(" |") for line in box.getvalue().splitlines())
        if line.strip("-+")  # no border, where those are ASCII
    ]
    said = re.split(r" (?:Argument helptext|For full helptext)", " ".join(body))[0]
    what = _bad_number(argv, body) or _in_our_words(title, said)
    command = argv[0] + " " if argv and argv[0] in COMMANDS else ""
    raise UserError(f"{what.rstrip('. ')}; see jaxsys {command}--help")


def _in_our_words(title: str, text: str) -> str:
    """What tyro says, without a title that says it too."""
    if found := re.match(r"invalid choice '(.*)' for argument '(--[\w-]+)'\. Expected one of \((.*?),?\)", text):
        return f"{found[2]}: found {found[1]!r}, expected one of {found[3]}"
    if found := re.match(r"Missing value for argument '(.+?)'\. Expected 1 values?\.?$", text):
        return f"{found[1]}: found no value, expected one"
    said = ("Unrecognized options", "Required options", "Parsing error", "Invalid choice", "Missing argument")
    return text if title in said else f"{title}: {text}"


def _bad_number(argv: list[str], body: list[str]) -> str | None:
    """What a value of an option is and ought to be, where tyro says how it came to grief."""
    found = re.match(r"Error parsing (--[\w-]+):", " ".join(body))
    if not found or argv[0] not in COMMANDS:
        return None
    option, name = found[1], found[1].removeprefix("--").replace("-", "_")
    kinds = {field.name: str(field.type).partition(" ")[0] for field in dataclasses.fields(COMMANDS[argv[0]])}
    expected = {"int": "a whole number", "float": "a number"}.get(kinds.get(name, ""))
    values = [
        word.partition("=")[2] or after
        for word, after in zip(argv, [*argv[1:], ""], strict=True)
        if word.partition("=")[0].replace("_", "-") == option
    ]
    return f"{option}: found {values[-1]!r}, expected {expected}" if expected and values else None


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
    for before, word in itertools.pairwise(argv):
        option = word.partition("=")[0].replace("_", "-")
        # A short one is -h; what comes after an option may be its value.
        short = re.match(r"-[A-Za-z]", word) and word != "-h" and not before.startswith("--")
        if short or (word.startswith("--") and word != "--" and option not in known):
            raise unknown_name(f"option of jaxsys {argv[0]}", option, known)
