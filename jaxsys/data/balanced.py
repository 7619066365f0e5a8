"""Batches of whole documents, arranged so that short ones stay on one device and long ones are split evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsys.data.loader import Loader
from jaxsys.data.packing import NO_TARGET, Batch, pack
from jaxsys.data.shards import Dataset
from parallelism import balance

REPORTED = ("imbalance", "padding", "split_share", "cut")
"""Attributes of a batch's plan that go with it."""

FILL = 63 / 64
"""Tokens of a batch over places for them: what is left lets documents stay whole."""


class BalancedLoader(Loader):
    """Training batches whose documents ``parallelism.balance`` puts on the devices of a grid.

    A batch has ``FILL`` of the tokens that rows would have. Documents longer than ``seq_len`` are cut there, and those
    at both ends of a batch where it ends, as rows cut them; no others are.

    grid: with places for batch_size rows of seq_len tokens. sizes: of the split region, to choose from. The rest as for
    ``Loader``, and what it raises.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seq_len: int,
        seed: int,
        heldout: float,
        grid: balance.Grid,
        sizes: Sequence[int],
    ):
        assert grid.devices * grid.room == batch_size * seq_len, "the grid holds other batches"
        super().__init__(dataset, batch_size, seq_len, seed, "train", heldout)
        self.grid, self.sizes = grid, tuple(sizes)
        self.batch_tokens = int(FILL * batch_size * seq_len)
        self.steps_per_epoch = max(self.tokens // self.batch_tokens, 1)

    def batch(self, step: int, rows: slice | Sequence[slice] = slice(None)) -> Batch:
        """Batch ``step``, or the part of its rows that ``rows`` selects: int32 [groups, pieces * room] by name.

        Its arrays are those of ``pack``, in the order of ``balance.Plan.arrange``. Beside them are scalars: ``split``,
        the size of the split region, and what ``REPORTED`` lists.
        """
        order, _, first, start = self._window(step, 0)
        documents = (self.dataset.document(int(i))[self._begin[i] : self._end[i]] for i in order[first:])
        line = {name: array[0] for name, array in pack(documents, self.batch_tokens, start, rows=1).items()}
        used = np.flatnonzero(line["segments"])
        begins = used[line["positions"][used] % self.seq_len == 0]
        plan = balance.plan(np.diff(begins, append=len(used)), self.grid, self.sizes)
        runs = [rows] if isinstance(rows, slice) else rows
        source, segments, positions = (np.concatenate([array[run] for run in runs]) for array in plan.arrange())
        return {
            "tokens": np.where(source < 0, 0, line["tokens"][source]),
            "targets": np.where(source < 0, NO_TARGET, line["targets"][source]),
            "segments": segments,
            "positions": positions,
            "split": np.array(plan.split, np.int32),
            **{name: np.array(getattr(plan, name), np.float64) for name in REPORTED},
        }

    def identity(self, step: int, rows: slice = slice(None)) -> str:
        first = step % self.steps_per_epoch * self.batch_tokens
        last = min(first + self.batch_tokens, self.tokens)
        return self._identity(step, f"tokens {first}-{last - 1} of {self.tokens}", 0, last - first)
