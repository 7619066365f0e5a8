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

from jaxsys.cli.checkpoint import CheckpointArgs
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
    "checkpoint": CheckpointArgs,
    "graphs": GraphsArgs,
    "pipeline": PipelineArgs,
}
Command: Any = functools.reduce(
    operator.or_, [Annotated[args, tyro.conf.subcommand(name)] for name, args in COMMANDS.items()]
)


HELP = ("-h", "--help")


def parse(argv: list[str]) -> Any:
    """The command of a command line. Raises UserError, in one line, for what tyro explains in a box of many."""
    _check_names(argv)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
            return tyro.cli(Command, prog="jaxsys", args=argv, config=config)
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
    raise UserError(f"{what.rstrip('. ')}; see {' '.join(['jaxsys', *_command(argv)[0], '--help'])}")


def _command(argv: list[str]) -> tuple[list[str], Any]:
    """The words of a command line that name a command, and its arguments' class; None where the next ought to be one
    and there is none."""
    words: list[str] = []
    choices: dict[str, Any] | None = COMMANDS
    found = None
    while choices is not None:
        found = choices.get(argv[len(words)]) if len(argv) > len(words) else None
        if found is None:
            break
        words.append(argv[len(words)])
        choices = getattr(found, "subcommands", None)
    return words, found


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
    args = _command(argv)[1]
    if not found or args is None:
        return None
    option, name = found[1], found[1].removeprefix("--").replace("-", "_")
    kinds = {field.name: str(field.type).partition(" ")[0] for field in dataclasses.fields(args)}
    expected = {"int": "a whole number", "float": "a number"}.get(kinds.get(name, ""))
    values = [
        word.partition("=")[2] or after
        for word, after in zip(argv, [*argv[1:], ""], strict=True)
        if word.partition("=")[0].replace("_", "-") == option
    ]
    return f"{option}: found {values[-1]!r}, expected {expected}" if expected and values else None


def _check_names(argv: list[str]) -> None:
    """Says what a command or an option that does not exist was meant to be."""
    words, args = _command(argv)
    if args is None:
        if len(argv) > len(words) and (not argv[len(words)].startswith("-") or (words and argv[1] not in HELP)):
            what = f"command of jaxsys {words[0]}" if words else "command"
            raise unknown_name(what, argv[len(words)], COMMANDS[words[0]].subcommands if words else COMMANDS)
        return
    known = ["--help"]
    for field in dataclasses.fields(args):
        option = field.name.replace("_", "-")
        known += [f"--{option}", f"--no-{option}"] if field.type == "bool" else [f"--{option}"]
    for before, word in itertools.pairwise(argv):
        option = word.partition("=")[0].replace("_", "-")
        # A short one is -h; what comes after an option may be its value.
        short = re.match(r"-[A-Za-z]", word) and word != "-h" and not before.startswith("--")
        if short or (word.startswith("--") and word != "--" and option not in known):
            raise unknown_name(f"option of jaxsys {' '.join(words)}", option, known)
