"""``jaxsys train | generate | reshard | graphs``: what a user cannot mend keeps its traceback, the rest is one line."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from jaxsys.cli.generate import GenerateArgs
from jaxsys.cli.graphs import GraphsArgs
from jaxsys.cli.reshard import ReshardArgs
from jaxsys.cli.train import TrainArgs
from jaxsys.hugepages import restart_with_huge_pages
from parallelism.errors import UserError

Command = (
    Annotated[TrainArgs, tyro.conf.subcommand("train")]
    | Annotated[GenerateArgs, tyro.conf.subcommand("generate")]
    | Annotated[ReshardArgs, tyro.conf.subcommand("reshard")]
    | Annotated[GraphsArgs, tyro.conf.subcommand("graphs")]
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    command = tyro.cli(Command, prog="jaxsys", args=argv, config=(tyro.conf.OmitArgPrefixes,))  # type: ignore[call-overload]
    try:
        return command.run()
    except UserError as error:
        print(f"jaxsys: {error}", file=sys.stderr)
        return 2
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


def entry() -> None:
    """The ``jaxsys`` program."""
    restart_with_huge_pages()
    sys.exit(main())


if __name__ == "__main__":
    entry()
