"""``jaxsys pipeline``."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from parallelism.errors import UserError, unknown_name
from parallelism.text import columns

if TYPE_CHECKING:
    from pipelines.schedule import Placement, Table
    from pipelines.simulate import Costs, Timeline

GIGA = 1e9
LEGEND = "a line a stage: last digits of microbatches forward, letters backward (a is 0), capitals W, dots waiting"


@dataclasses.dataclass(frozen=True)
class PipelineArgs:
    """Draw and compare pipeline schedules: time, bubble, memory of each.

    Milliseconds and gigabytes are those of one microbatch in a whole stage.
    """

    stages: int
    """Of the pipeline."""
    microbatches: int
    """Of a step."""
    schedule: str = "all"
    """Names separated by commas, all, best (a search), or a table's file (.json)."""
    chunks: int | None = None
    """Pieces of the model that a stage has under interleaved; two, if it is left out."""
    forward: float = 1.0
    """Milliseconds of F."""
    backward: float = 1.0
    """Milliseconds of B, for the gradient of the input alone."""
    weight: float = 1.0
    """Milliseconds of W, for the gradients of the weights."""
    head: float = 0.0
    """Milliseconds of the head and the loss with their gradients, in F of the last virtual stage."""
    transfer: float = 0.0
    """Milliseconds from one stage to the next."""
    residual: float = 1.0
    """Gigabytes that a microbatch keeps from F to its backward pass."""
    cotangent: float = 0.0
    """Gigabytes that it keeps from B to W."""
    light: float | None = None
    """Gigabytes that it keeps where cheap operations are computed again (remat=dots)."""
    again: float = 0.0
    """Milliseconds that those take, in B."""
    link: float | None = None
    """Gigabytes/s between a device and its host: residuals are offloaded where nobody waits for them."""
    shared: int = 1
    """Neighbouring stages that share such a link."""
    layers: int = 4
    """Of a stage: what moves goes layer by layer."""
    slots: int | None = None
    """Residuals that a stage may hold on the device, even where stages then wait for the link."""
    limit: float | None = None
    """Gigabytes that a stage may hold, for the search."""
    how: Literal["executed", "ideal"] = "executed"
    """executed: stages go tick by tick, as the executor does; ideal: each as soon as it can."""
    draw: Path | None = None
    """Write the timelines as a picture (.svg, .png, .pdf)."""
    save: Path | None = None
    """Write the table as JSON, of one schedule."""
    width: int = 100
    """Columns of the timelines in the terminal, 0 for none."""

    def run(self) -> int:
        from pipelines.draw import picture, text
        from pipelines.simulate import simulate

        self._check()
        found = []
        for table in self._tables():
            try:
                found.append(self._offloaded(table))
            except UserError as error:
                if self.schedule != "all":
                    raise
                print(f"left out: {error}", file=sys.stderr)
        timelines = {table.name: simulate(table, costs, self.how) for table, costs, _ in found}
        for table, _, because in found:
            timeline = [text(timelines[table.name], self.width)] if self.width else []
            if timeline or because:
                print(table.name, *timeline, *because, "", sep="\n")
        if self.width:
            print(LEGEND, "", sep="\n")
        ideal = {table.name: simulate(table, costs) for table, costs, _ in found}
        print(*columns(self._rows(timelines, ideal), right=1), sep="\n")
        if self.draw is not None:
            picture(list(timelines.items()), self.draw)
        if self.save is not None:
            found[0][0].save(self.save)
        return 0

    def _check(self) -> None:
        from pipelines.draw import check_output, check_picture

        for name in ("stages", "microbatches", "shared", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: found {getattr(self, name)}, expected at least 1")
        for name in ("forward", "backward", "weight", "head", "transfer", "residual", "cotangent", "again"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "forward" and not value):
                expected = "a number above 0" if name == "forward" else "a number of at least 0"
                raise UserError(f"--{name}: found {value:g}, expected {expected}")
        for name in ("link", "limit", "slots", "light"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name}: found {value:g}, expected a number above 0")
        for name, given in (
            ("slots", self.slots is not None),
            ("shared", self.shared > 1),
            ("light", self.light is not None),
        ):
            if given and self.link is None:
                raise UserError(f"--{name}: how fast residuals move is not known: give --link too")
        if self.draw is not None:
            check_picture(self.draw)
        if self.save is not None:
            check_output(self.save)
            if self.schedule == "all" or "," in self.schedule:
                raise UserError(f"--save {self.save} with --schedule {self.schedule}: expected one schedule: name it")
        if self.width < 0:
            raise UserError(f"--width: found {self.width}, expected 0 or more columns")
        if len(names := self.schedule.split(",")) != len(set(names)):
            raise UserError(f"--schedule {self.schedule}: a schedule is there twice, expected each once")
        if self.again and self.light is None:
            raise UserError(f"--again {self.again:g}: what is kept then is not known: give --light too")
        if self.limit is not None and self.schedule != "best":
            raise UserError(f"--limit with --schedule {self.schedule}: it is for the search: --schedule best")
        if self.chunks is not None and not {"interleaved", "all"} & set(self.schedule.split(",")):
            raise UserError(f"--chunks with --schedule {self.schedule}: it is interleaved's, leave it out")

    def _costs(self, placement: Placement, light: bool = False) -> Costs:
        """Of a virtual stage. light: where cheap operations are computed again."""
        from pipelines.simulate import Costs

        each = 1 / placement.chunks
        residual = self.light if light and self.light is not None else self.residual
        forward = [1e-3 * each * self.forward] * placement.count
        forward[-1] += 1e-3 * self.head
        return Costs(
            forward,
            1e-3 * each * (self.backward + light * self.again),
            1e-3 * each * self.weight,
            transfer=1e-3 * self.transfer,
            residual=GIGA * each * residual,
            cotangent=GIGA * each * self.cotangent,
            link=math.inf if self.link is None else GIGA * self.link,
            shared=self.shared,
            pieces=max(self.layers // placement.chunks, 1),
        )

    def _tables(self) -> list[Table]:
        from pipelines.generators import GENERATORS, generate
        from pipelines.schedule import Table
        from pipelines.search import search

        if self.schedule.endswith(".json"):
            table = Table.load(self.schedule)
            if (found := (table.placement.stages, table.microbatches)) != (self.stages, self.microbatches):
                raise UserError(
                    f"{self.schedule}: a table of {found[0]} stages and {found[1]} microbatches, found --stages "
                    f"{self.stages} --microbatches {self.microbatches}: give what the table has"
                )
            return [table]
        if self.schedule == "best":
            limit = math.inf if self.limit is None else GIGA * self.limit
            return [search(self.stages, self.microbatches, self._costs, limit, self.how).table]
        every = self.schedule == "all"
        tables = []
        for name in GENERATORS if every else self.schedule.split(","):
            if name in ("all", "best") or name.endswith(".json"):
                raise UserError(f"--schedule {self.schedule}: {name} stands alone, others are separated by commas")
            if name not in GENERATORS:
                raise unknown_name("schedule", name, [*GENERATORS, "all", "best"])
            chunks = self.chunks if name == "interleaved" else None
            try:
                tables.append(generate(name, self.stages, self.microbatches, chunks))
            except UserError as error:
                if not every:
                    raise
                print(f"left out: {error}", file=sys.stderr)
        return tables

    def _offloaded(self, table: Table) -> tuple[Table, Costs, list[str]]:
        """The table with its transfers, the costs that it then has, and why."""
        from pipelines.offload import lightest

        costs = self._costs(table.placement)
        if self.link is None or table.offloads:
            return table, costs, []
        kept = {"everything kept": costs}
        if self.light is not None:
            kept["cheap operations again"] = self._costs(table.placement, light=True)
        name, found = lightest(table, kept, self.slots)
        return found.table, kept[name], [found.because]

    def _rows(self, timelines: dict[str, Timeline], ideal: dict[str, Timeline]) -> list[tuple[str, ...]]:
        head = "schedule", "ms", "bubble", "ideal", "in flight", "device GB", "host GB", "link"
        rows: list[tuple[str, ...]] = [head]
        for name, timeline in timelines.items():
            rows.append(
                (
                    name,
                    f"{1e3 * timeline.makespan:.1f}",
                    f"{timeline.bubble:.1%}",
                    f"{ideal[name].bubble:.1%}",
                    str(timeline.live.max()),
                    f"{timeline.peak.max() / GIGA:.2f}",
                    f"{timeline.host.max() / GIGA:.2f}",
                    f"{timeline.links.max():.0%}",
                )
            )
        return rows
