"""``jaxsys graphs``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from parallelism.errors import UserError
from parallelism.text import columns


@dataclasses.dataclass(frozen=True)
class GraphsArgs:
    """List the compiled graphs of a run: seconds to compile, memory per device, cost."""

    run_directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's directory."""
    json: bool = False
    """Print the list as JSON."""

    def run(self) -> int:
        path = self.run_directory / "graphs.json"
        if not path.is_file():
            raise UserError(f"{path} does not exist: give the directory of a run that has started")
        try:
            rows = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); start the run again to have it made again") from error
        if self.json:
            json.dump(rows, sys.stdout, indent=1)
            print()
            return 0
        head = ("graph", "trace s", "compile s", "cached", "arguments MB", "outputs MB", "temporaries MB", "GFLOP")
        table = [head]
        for row in rows:
            table.append(
                (
                    row["name"],
                    f"{row['trace_seconds']:.2f}",
                    f"{row['compile_seconds']:.2f}",
                    "yes" if row["cached"] else "no",
                    *(_mega(row[k]) for k in ("argument_bytes", "output_bytes", "temporary_bytes")),
                    "-" if row["flops"] is None else f"{row['flops'] / 1e9:.2f}",
                )
            )
        print(*columns(table, right=1), sep="\n")
        return 0


def _mega(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:.1f}"
