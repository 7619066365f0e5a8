"""A pipeline schedule as a table: what each stage does at each tick.

A model is cut into ``stages * chunks`` virtual stages, numbered along the forward pass; a ``Placement`` says which
stage holds which of them. At a tick a stage may do one action of each kind, in this order: a forward (F), a
backward for the input (B), a backward for the weights (W; where B is not split it does both). What it sends to another
stage is there at the next tick; what stays is there for the next action. Beside them it may bring to the host
what a microbatch keeps for its backward pass (O, offload), of this tick's forward at the earliest, and bring that of
another back (R, reload), for this tick's backward at the latest.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from parallelism.errors import UserError, unknown_name

F, B, W, O, R = range(5)
KINDS = ("F", "B", "W", "O", "R")
PLACE = {R: 0, F: 1, B: 2, W: 3, O: 4}
"""Where in a tick an action of a kind is."""
NONE = -1


Shape = Literal["loop", "v"]


class Action(NamedTuple):
    """kind: F, B, W, O or R, of a microbatch, of a chunk of the stage that does it."""

    kind: int
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{KINDS[self.kind]}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the virtual stages are.

    ``loop``: number k is chunk k // stages of stage k % stages (Narayanan et al. 2021, section 2.2). ``v``: every other
    chunk runs back, so that the last virtual stage is where the first is, if chunks are even (Qi et al. 2024, ZB-V).
    """

    stages: int
    chunks: int = 1
    shape: Shape = "loop"

    def __post_init__(self) -> None:
        if self.stages < 1 or self.chunks < 1:
            raise UserError(f"stages={self.stages}, chunks={self.chunks}: expected at least 1 of each")
        if self.shape not in get_args(Shape):
            raise unknown_name("shape of a placement", str(self.shape), get_args(Shape))

    @property
    def count(self) -> int:
        """How many virtual stages there are."""
        return self.stages * self.chunks

    def stage(self, number: int) -> int:
        """The stage that holds a virtual stage."""
        chunk, place = divmod(number, self.stages)
        return self.stages - 1 - place if self.shape == "v" and chunk % 2 else place

    def number(self, stage: int, chunk: int) -> int:
        """The virtual stage that is a stage's chunk."""
        return chunk * self.stages + (self.stages - 1 - stage if self.shape == "v" and chunk % 2 else stage)

    def numbers(self, stage: int) -> list[int]:
        """The virtual stages that a stage holds, chunk by chunk."""
        return [self.number(stage, chunk) for chunk in range(self.chunks)]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Table:
    """A schedule.

    microbatch, chunk: [ticks, stages, len(KINDS)] int32, of the action of each kind; NONE for none.
    split: whether backward for the weights is an action of its own. name: of what made it.
    """

    placement: Placement
    microbatches: int
    split: bool
    microbatch: np.ndarray
    chunk: np.ndarray
    name: str = "table"

    def __repr__(self) -> str:
        p = self.placement
        return f"<{self.name}: {p.stages} stages of {p.chunks}, {self.microbatches} microbatches, {self.ticks} ticks>"

    @property
    def ticks(self) -> int:
        return self.microbatch.shape[0]

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kinds of action that every microbatch needs."""
        return (F, B, W) if self.split else (F, B)

    @property
    def offloads(self) -> bool:
        """Whether anything goes to the host."""
        return bool((self.microbatch[..., O] != NONE).any())

    def at(self, tick: int, stage: int) -> list[Action]:
        """What a stage does at a tick, in order."""
        found = ((kind, int(self.microbatch[tick, stage, kind])) for kind in sorted(PLACE, key=PLACE.__getitem__))
        return [Action(k, m, int(self.chunk[tick, stage, k])) for k, m in found if m != NONE]

    def order(self, stage: int) -> list[Action]:
        """Everything that a stage does, in order."""
        return list(itertools.chain.from_iterable(self.at(tick, stage) for tick in range(self.ticks)))

    @property
    def forwards(self) -> Table:
        """What is left without backwards, each forward as soon as what it needs is there; to run, not to check."""
        orders = [[a for a in self.order(stage) if a.kind == F] for stage in range(self.placement.stages)]
        return from_orders(self.placement, self.microbatches, orders, f"{self.name}, forwards")

    @property
    def learns(self) -> bool:
        """Whether there are backwards."""
        return bool((self.microbatch[..., B] != NONE).any())

    def walk(self) -> Iterator[tuple[int, int, Action]]:
        """(tick, stage, action), tick by tick."""
        for tick in range(self.ticks):
            for stage in range(self.placement.stages):
                for action in self.at(tick, stage):
                    yield tick, stage, action

    def ticks_of(self) -> dict[tuple[int, int, int], int]:
        """The tick of each (kind, microbatch, virtual stage). Raises UserError for one that is there twice."""
        found: dict[tuple[int, int, int], int] = {}
        for tick, stage, action in self.walk():
            key = action.kind, action.microbatch, self.placement.number(stage, action.chunk)
            if key in found:
                raise self._wrong(f"{_named(key)} is at ticks {found[key]} and {tick}", "expected once")
            found[key] = tick
        return found

    def check(self) -> None:
        """Raises UserError where the table is no schedule: an action that lacks, is there twice, or comes before what
        it needs is there."""
        shape = self.microbatch.shape
        if shape != self.chunk.shape or shape[1:] != (self.placement.stages, len(KINDS)):
            expected = f"[ticks, {self.placement.stages}, {len(KINDS)}]"
            raise self._wrong(f"arrays of {shape} and {self.chunk.shape}", f"expected {expected} twice")
        used = self.microbatch != NONE
        if (used & ((self.microbatch < 0) | (self.microbatch >= self.microbatches))).any():
            raise self._wrong("a microbatch out of range", f"expected 0 to {self.microbatches - 1}")
        if (used & ((self.chunk < 0) | (self.chunk >= self.placement.chunks))).any():
            raise self._wrong("a chunk out of range", f"expected 0 to {self.placement.chunks - 1}")
        ticks = self.ticks_of()
        every = itertools.product(self.kinds, range(self.microbatches), range(self.placement.count))
        for key in every:
            if key not in ticks:
                raise self._wrong(f"no {_named(key)}", "expected every microbatch at every virtual stage")
        for key in ticks:
            if key[0] in (O, R) and (other := (O + R - key[0], *key[1:])) not in ticks:
                raise self._wrong(f"{_named(key)} without {_named(other)}", "expected both or neither")
            for need in [*needs(key, self.placement), *[(R, *key[1:])] * (key[0] == B and (R, *key[1:]) in ticks)]:
                soonest = _soonest(key, need, ticks, self.placement)
                if ticks[key] < soonest:
                    raise self._wrong(f"{_named(key)} at tick {ticks[key]}", f"expected {soonest} or later: it needs "
                                      f"{_named(need)} of tick {ticks[need]}")  # fmt: skip
        if (used[..., W].any()) and not self.split:
            raise self._wrong("backward for the weights apart", "expected split")

    def _wrong(self, found: str, expected: str) -> UserError:
        p = self.placement
        return UserError(
            f"schedule {self.name!r} ({p.stages} stages, {self.microbatches} microbatches): {found}, {expected}"
        )

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        Path(path).write_text(json.dumps(self.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``from_dict`` reads them."""
        actions = [
            [[str(action) for action in self.at(tick, stage)] for stage in range(self.placement.stages)]
            for tick in range(self.ticks)
        ]
        return {
            "name": self.name, "placement": dataclasses.asdict(self.placement),
            "microbatches": self.microbatches, "split": self.split, "ticks": actions,
        }  # fmt: skip

    @staticmethod
    def load(path: str | Path) -> Table:
        """Reads and checks what ``save`` wrote. Raises UserError for anything else."""
        try:
            values = json.loads(Path(path).read_text())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; expected a schedule that Table.save wrote") from error
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); expected a schedule that Table.save wrote") from error
        try:
            return Table.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @staticmethod
    def from_dict(values: Any) -> Table:
        """The table of ``as_dict``'s values, checked. Raises UserError for what is none."""
        names = {"name": str, "placement": dict, "microbatches": int, "split": bool, "ticks": list}
        if not isinstance(values, dict) or values.keys() != names.keys():
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise UserError(f"found no schedule: {found}, expected {', '.join(names)}")
        for name, kind in names.items():
            if type(values[name]) is not kind:
                raise UserError(f"{name}: found {values[name]!r:.40}, expected {kind.__name__}")
        shape = values["placement"]
        if shape.keys() != {"stages", "chunks", "shape"} or any(
            type(shape[n]) is not int for n in ("stages", "chunks")
        ):
            raise UserError(f"placement: found {shape!r:.80}, expected stages, chunks and shape")
        if values["microbatches"] < 1:
            raise UserError(f"microbatches: found {values['microbatches']}, expected at least 1")
        placement = Placement(**shape)
        ticks = []
        for tick, stages in enumerate(values["ticks"]):
            if not isinstance(stages, list) or len(stages) != placement.stages:
                raise UserError(
                    f"tick {tick}: found {stages!r:.40}, expected a list for each of {placement.stages} stages"
                )
            ticks.append([[_parsed(text, tick, stage) for text in each] for stage, each in enumerate(stages)])
        table = from_actions(placement, values["microbatches"], values["split"], ticks, values["name"])
        table.check()
        return table


_ACTION = re.compile(r"([FBWOR])(\d{1,9})(?:\.(\d{1,9}))?")


def _parsed(text: Any, tick: int, stage: int) -> Action:
    match = _ACTION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UserError(f"tick {tick}, stage {stage}: found {text!r:.40}, expected an action such as F3 or B0.1")
    return Action(KINDS.index(match[1]), int(match[2]), int(match[3] or 0))


def _named(key: tuple[int, int, int]) -> str:
    return f"{KINDS[key[0]]} of microbatch {key[1]} at virtual stage {key[2]}"


def needs(key: tuple[int, int, int], placement: Placement) -> list[tuple[int, int, int]]:
    """What an action (kind, microbatch, virtual stage) needs to be done before it."""
    kind, microbatch, number = key
    if kind == F:
        return [(F, microbatch, number - 1)] if number else []
    if kind in (W, O, R):
        return [({W: B, O: F, R: O}[kind], microbatch, number)]
    last = number == placement.count - 1
    return [(F, microbatch, number), *([] if last else [(B, microbatch, number + 1)])]


def from_actions(
    placement: Placement, microbatches: int, split: bool, ticks: Sequence[Sequence[Sequence[Action]]], name: str
) -> Table:
    """The table of actions by tick and stage."""
    shape = len(ticks), placement.stages, len(KINDS)
    microbatch, chunk = (np.full(shape, NONE, np.int32) for _ in range(2))
    for tick, stages in enumerate(ticks):
        for stage, actions in enumerate(stages):
            for action in actions:
                microbatch[tick, stage, action.kind] = action.microbatch
                chunk[tick, stage, action.kind] = action.chunk
    return Table(placement, microbatches, split, microbatch, chunk, name)


def from_orders(
    placement: Placement,
    microbatches: int,
    orders: Sequence[Sequence[Action]],
    name: str,
    *,
    together: bool = False,
) -> Table:
    """The table in which each stage does its actions in its order, each as soon as what it needs is there.

    together: as many of different kinds at a tick as come one after the other in the order F, B, W; else one a tick.
    Raises UserError if the orders wait for each other.
    """
    split = any(action.kind == W for order in orders for action in order)
    done: dict[tuple[int, int, int], int] = {}
    place = [0] * placement.stages
    ticks: list[list[list[Action]]] = []
    idle = 0
    while any(place[stage] < len(order) for stage, order in enumerate(orders)):
        tick = len(ticks)
        now: list[list[Action]] = [[] for _ in range(placement.stages)]
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                action = order[place[stage]]
                key = action.kind, action.microbatch, placement.number(stage, action.chunk)
                if now[stage] and (not together or now[stage][-1].kind >= action.kind):
                    break
                needed = needs(key, placement)
                if not all(n in done and tick >= _soonest(key, n, done, placement) for n in needed):
                    break
                done[key] = tick
                now[stage].append(action)
                place[stage] += 1
        idle = 0 if any(now) else idle + 1
        if idle > 1:
            waits = next(f"stage {s} for {order[place[s]]}" for s, order in enumerate(orders) if place[s] < len(order))
            raise UserError(f"schedule {name!r}: the orders of its stages wait for each other, {waits}")
        ticks.append(now)
    return from_actions(placement, microbatches, split, ticks, name)


def _soonest(
    key: tuple[int, int, int],
    need: tuple[int, int, int],
    done: Mapping[tuple[int, int, int], int],
    placement: Placement,
) -> int:
    """The first tick at which an action may use what it needs. A tick does its actions in the order of their places:
    what stays on the stage may be of the same one."""
    stays = placement.stage(need[2]) == placement.stage(key[2])
    return done[need] + ((PLACE[need[0]] >= PLACE[key[0]]) if stays else 1)
