"""Timelines as text and as pictures: a line a stage, time from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parallelism.errors import UserError
from pipelines.schedule import KINDS, B, F, O, R, W
from pipelines.simulate import COMPUTED, Timeline

COLOURS = {F: "#4c78a8", B: "#f58518", W: "#54a24b", O: "#7f7f7f", R: "#b279a2"}
ENDINGS = (".svg", ".png", ".pdf")
NAMES = {F: "forward", B: "backward", W: "backward for the weights", O: "to the host", R: "from the host"}


def text(timeline: Timeline, width: int = 100) -> str:
    """A line a stage: microbatch numbers (their last digit) of forwards, letters of backwards (a for 0), the same in
    capitals of backwards for the weights, dots while it waits; transfers are not shown. As many columns as the shortest
    action needs, at most ``width``."""
    computed = {key: end for key, end in timeline.end.items() if key[0] in COMPUTED}
    shortest = min(length for key, end in computed.items() if (length := end - timeline.start[key]) > 0)
    columns = min(width, max(round(timeline.makespan / shortest), 1))
    lines = [["."] * columns for _ in timeline.busy]
    for key, end in computed.items():
        kind, m, number = key
        first, stop = (round(t / timeline.makespan * columns) for t in (timeline.start[key], end))
        letter = {F: str(m % 10), B: chr(ord("a") + m % 26), W: chr(ord("A") + m % 26)}[kind]
        lines[timeline.table.placement.stage(number)][first:stop] = [letter] * (stop - first)
    digits = len(str(len(lines) - 1))
    return "\n".join(f"{stage:>{digits}} {''.join(line)}" for stage, line in enumerate(lines))


def picture(timelines: Sequence[tuple[str, Timeline]], path: str | Path) -> None:
    """Writes timelines, of costs in seconds, one below the other; the file's ending says how (``ENDINGS``).

    Transfers are thin lines below what is computed meanwhile: as executed, the ticks in which they are.

    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install 'jaxsys[plot]'") from error
    stages = [len(timeline.busy) for _, timeline in timelines]
    figure = Figure(figsize=(13, 0.9 + 0.42 * sum(stages) + 0.7 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=stages)[:, 0]
    longest = 1e3 * max(timeline.makespan for _, timeline in timelines)
    for panel, (name, timeline) in zip(panels, timelines, strict=True):
        placement = timeline.table.placement
        for (kind, m, number), end in timeline.end.items():
            start, end = 1e3 * timeline.start[kind, m, number], 1e3 * end
            if kind not in COMPUTED:
                low = placement.stage(number) + (0.36 if kind == O else 0.45)
                panel.barh(low, end - start, left=start, height=0.08, color=COLOURS[kind])
                continue
            shade = 1.0 if placement.chunks == 1 else 1.0 - 0.45 * (number // placement.stages) / (placement.chunks - 1)
            panel.barh(
                placement.stage(number) - 0.05, end - start, left=start, height=0.76, color=COLOURS[kind], alpha=shade,
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            if (end - start) / longest > 0.008:
                middle = (start + end) / 2, placement.stage(number) - 0.05
                panel.text(*middle, str(m), ha="center", va="center", fontsize=7, color="white")
        panel.set_ylim(len(timeline.busy) - 0.4, -0.55)
        panel.set_yticks(range(len(timeline.busy)))
        panel.set_ylabel("stage")
        panel.set_title(
            f"{name}: {1e3 * timeline.makespan:g} ms, bubble {timeline.bubble:.1%}, "
            f"at most {int(np.max(timeline.live))} in flight on a stage", loc="left", fontsize=10,
        )  # fmt: skip
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms")
    kinds = sorted({kind for _, timeline in timelines for kind, _, _ in timeline.end})
    handles = [panels[0].barh([0], [0], color=COLOURS[kind], label=f"{KINDS[kind]}, {NAMES[kind]}") for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds), frameon=False, fontsize=9)
    figure.savefig(path, dpi=140)


def check_picture(path: Path) -> None:
    """Raises UserError where ``picture`` could not write this file, before anything is drawn."""
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: found the ending {path.suffix!r}, expected {', '.join(ENDINGS)}")
    check_output(path)


def check_output(path: Path) -> None:
    """Raises UserError for a directory, or a file in one that there is not."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: expected a file's name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no directory {path.parent}; make it, or choose another")
