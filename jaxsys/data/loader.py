"""Batches as a pure function of (seed, step)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np

from jaxsys.data.packing import Batch, pack
from jaxsys.data.shards import Dataset
from parallelism.errors import UserError

Split = Literal["train", "heldout"]

# Batches that prefetch makes ahead of their use.
_AHEAD = 2


class Loader:
    """Packed batches of one split of a dataset.

    dataset: what ``build_dataset`` returned.
    batch_size (B), seq_len (T): rows a global batch, tokens a row.
    seed: decides the order of the documents, anew each epoch.
    split: "train" or "heldout". Documents fall into one by a hash of their text, so that equal texts are on the same
    side and the split depends on nothing else; heldout is the expected share of documents held out. Where that would
    leave a split without documents, as with a single one, the last heldout of each document's tokens are held out.

    An epoch of "train" leaves out the rows that do not fill a batch (others each time); an epoch of "heldout" has
    every row once and fills the last batch with padding (segment 0), so that it measures all of the split.

    Raises UserError if the split has no documents, or no full batch of "train".
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        split: Split = "train",
        heldout: float = 0.05,
    ):
        if batch_size < 1 or seq_len < 1:
            raise UserError(f"data: batch_size {batch_size} and seq_len {seq_len} must be at least 1")
        if split not in ("train", "heldout"):
            raise UserError(f"data: split {split!r} is not one of train, heldout")
        if not 0 <= heldout < 1:
            raise UserError(f"data: heldout {heldout} is not in [0, 1)")
        self.dataset, self.batch_size, self.seq_len = dataset, batch_size, seq_len
        self.seed, self.split = seed, split
        lengths = np.diff(dataset.offsets)
        # Each document is cut in two: [0, cut) for training, [cut, length) held out.
        held = dataset.hashes < np.uint64(int(heldout * 2**64))
        whole = heldout == 0 or (held.any() and not held.all())
        cut = np.where(held, 0, lengths) if whole else lengths - np.ceil(lengths * heldout).astype(np.int64)
        self._begin: np.ndarray = cut if split == "heldout" else np.zeros_like(cut)
        self._end: np.ndarray = lengths if split == "heldout" else cut
        self._members = np.flatnonzero(self._begin < self._end)
        self._lengths = (self._end - self._begin)[self._members]
        self.tokens = int(self._lengths.sum())
        self.batch_tokens = batch_size * seq_len
        self.rows_per_epoch = -(-self.tokens // seq_len)
        full, rest = divmod(self.rows_per_epoch, batch_size)
        self.steps_per_epoch = full + bool(rest) if split == "heldout" else full
        if self.steps_per_epoch == 0:
            found = f"data {dataset.source!r}: {split} has {len(self._members)} of {dataset.documents} documents"
            if heldout == 0 and split == "heldout":
                raise UserError(f"{found}: data.heldout is 0; give a share above 0, or do without evaluation")
            works = f", or a data.batch_size of at most {self.rows_per_epoch}" if self.tokens else ""
            raise UserError(
                f"{found}, {self.tokens} tokens, but one batch of data.batch_size={batch_size} rows of "
                f"data.seq_len={seq_len} takes {batch_size * seq_len}; give more text{works}"
            )
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(self, step: int, rows: slice | Sequence[slice] = slice(None)) -> Batch:
        """Batch ``step`` (from 0), or the part of its B rows that ``rows`` selects: int32 [rows, T] by name (see pack).

        A process asks for its own rows, one run of them or several; what a row holds does not depend on who asks, and
        no other document is read.
        """
        if not isinstance(rows, slice):
            runs = [self.batch(step, run) for run in rows]
            return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        low, high, stride = rows.indices(self.batch_size)
        if stride != 1:
            raise ValueError(f"rows {rows} must be contiguous")
        order, _, first, start = self._window(step, low * self.seq_len)
        documents = (self.dataset.document(int(i))[self._begin[i] : self._end[i]] for i in order[first:])
        return pack(documents, self.seq_len, start, max(high - low, 0))

    def position(self, step: int) -> dict[str, int | str]:
        """Where batch ``step`` begins, the same for any number of processes and devices.

        step; epoch, and the token of it; document: the first one's hash in hex, and at: the token within it.
        """
        epoch, at = divmod(step, self.steps_per_epoch)
        order, _, first, start = self._window(step, 0)
        document = f"{int(self.dataset.hashes[order[first]]):016x}"
        return {"step": step, "epoch": epoch, "token": at * self.batch_tokens, "document": document, "at": start}

    def identity(self, step: int, rows: slice = slice(None)) -> str:
        """One line that names a batch in reports: the step that it is for (from 1), epoch, rows, first documents."""
        low, high, _ = rows.indices(self.batch_size)
        row = step % self.steps_per_epoch * self.batch_size
        what = f"rows {row + low}-{row + high - 1} of {self.rows_per_epoch}"
        return self._identity(step, what, low * self.seq_len, high * self.seq_len)

    def _identity(self, step: int, what: str, low: int, high: int) -> str:
        """The line for tokens ``low`` to ``high`` of the batch, which it calls ``what``."""
        order, ends, first, _ = self._window(step, low)
        epoch, at = divmod(step, self.steps_per_epoch)
        last = int(np.searchsorted(ends, at * self.batch_tokens + high, side="left"))
        inside = order[first : last + 1]
        names = [self.dataset.names[int(i)] for i in inside[:3]]
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"{self.split} step {step + 1}: epoch {epoch}, {what}, documents {', '.join(names)}{more}"

    def _window(self, step: int, low: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Where token ``low`` of batch ``step`` is.

        Returns the epoch's order of documents, where each ends in the sequence of all, the first one's place in that
        order, and the token's place within it.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, at = divmod(step, self.steps_per_epoch)
        order, ends = self._epoch(epoch)
        start = at * self.batch_tokens + low
        first = int(np.searchsorted(ends, start, side="right"))
        before = int(ends[first - 1]) if first else 0
        return order, ends, first, start - before

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        cached = self._order
        if cached is None or cached[0] != epoch:
            # Sorting raw words of a counter-based generator gives the same order in every numpy version.
            words = np.random.Philox(key=[self.seed % 2**64, epoch]).random_raw(len(self._members))
            permutation = np.argsort(words, kind="stable")
            cached = epoch, self._members[permutation], np.cumsum(self._lengths[permutation])
            self._order = cached
        return cached[1], cached[2]


def prefetch(
    loader: Loader, start: int, stop: int, rows: slice | Sequence[slice] = slice(None)
) -> Generator[tuple[int, Batch], None, None]:
    """(step, batch) for steps ``start`` to ``stop`` (left out), each made by a thread while the one before is used.

    Errors of the thread are raised here; closing the iterator, or leaving it unfinished, ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    steps = iter(range(start, stop))
    waiting: deque[tuple[int, Future[Batch]]] = deque()
    try:
        for step in itertools.islice(steps, _AHEAD):
            waiting.append((step, pool.submit(loader.batch, step, rows)))
        while waiting:
            step, future = waiting.popleft()
            batch = future.result()
            for following in itertools.islice(steps, 1):
                waiting.append((following, pool.submit(loader.batch, following, rows)))
            yield step, batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
