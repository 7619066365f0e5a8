"""Metrics of a run: one JSON object a line in ``metrics.jsonl``, and TensorBoard event files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Metrics:
    """Appends to a run's metrics. On resume, what was recorded after ``step`` is dropped: it will come again."""

    def __init__(self, run: Path, step: int):
        from tensorboardX import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if _step(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """values: numbers (NaN and inf are written as null, which is JSON's only way)."""
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read(run: Path) -> list[dict[str, Any]]:
    """What a run recorded, in order."""
    return [json.loads(line) for line in _lines(run / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    # A killed writer may leave half a line at the end.
    return [line for line in path.read_text().split("\n")[:-1] if line] if path.exists() else []


def _step(line: str) -> int:
    return json.loads(line)["step"]
