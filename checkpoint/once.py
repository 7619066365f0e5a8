"""What several processes of a machine need from far away comes to it once, and the others take it from there."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from checkpoint.ahead import in_order
from checkpoint.cells import runs
from checkpoint.machine import machine
from checkpoint.manifest import Chunk
from checkpoint.reader import CheckpointReader, Part
from checkpoint.reshard import ArrayPlan
from parallelism.coordinator import Coordinator


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of a file that several processes of a machine need.

    owner: which of these gets them, into its memory from ``at`` on.
    """

    file: str
    start: int
    stop: int
    owner: int
    at: int


def shared_spans(plans: Sequence[Sequence[ArrayPlan]]) -> list[Span]:
    """What more than one of these processes reads, by the plans of each: who has least to get so far gets it."""
    chunks: dict[tuple[str, int], Chunk] = {}
    needs: dict[tuple[str, int], list[tuple[int, np.ndarray | None]]] = defaultdict(list)
    for process, own in enumerate(plans):
        for read in (read for plan in own for read in plan.reads):
            key = read.chunk.file, read.chunk.offset
            chunks[key] = read.chunk
            needs[key].append((process, read.cells))
    spans, loads = [], [0] * len(plans)
    for key in sorted(needs):
        chunk = chunks[key]
        count = 1 if chunk.grid is None or chunk.zstd is not None else math.prod(chunk.grid)
        wanted = np.zeros((len(plans), count), bool)
        for process, cells in needs[key]:
            wanted[process, slice(None) if cells is None else cells] = True
        takers = np.flatnonzero(wanted.any(axis=1)).tolist()
        if len(takers) < 2:
            continue
        ranges = [(0, chunk.stored_bytes)]
        if count > 1:
            cell = chunk.nbytes // count
            ranges = [(a * cell, b * cell) for a, b in runs(np.flatnonzero(wanted.sum(axis=0) > 1))]
            ranges.append((chunk.nbytes, chunk.whole_bytes))  # the table, which each of them needs
        owner = min(takers, key=loads.__getitem__)
        for start, stop in ranges:
            spans.append(Span(chunk.file, chunk.offset + start, chunk.offset + stop, owner, loads[owner]))
            loads[owner] += stop - start
    return spans


class OncePerMachine:
    """The processes of a job that share a machine. All of the job make it, and call it, together."""

    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator
        machines = coordinator.gather("machines", machine()) if coordinator.count > 1 else [""]
        self._group = [i for i, each in enumerate(machines) if each == machines[coordinator.index]]
        self._alone = len(set(machines)) == len(machines)  # in all processes the same

    @contextlib.contextmanager
    def reading(self, reader: CheckpointReader | None, plan: Callable[[int], Sequence[ArrayPlan]]) -> Iterator[None]:
        """What ``reader`` reads meanwhile, others of this machine do not read again.

        reader: of what is far away; None: this process reads nothing from there. plan: what a process, by its index,
        reads there. Where anything goes wrong, each reads for itself, and hears of it there.
        """
        if self._alone:
            yield
            return
        with contextlib.ExitStack() as stack:
            own, spans, good = -1, list[Span](), False
            if reader is not None and len(self._group) > 1:
                # Whatever it is, the others wait to hear; and what does not fit is for the restore to say.
                with contextlib.suppress(Exception):
                    spans = shared_spans([plan(process) for process in self._group])
                    own = os.memfd_create("checkpoint")
                    stack.callback(os.close, own)
                    self._get(reader, spans, own)
                    good = True
            where = None if reader is None else reader.where
            said = self._coordinator.gather("at hand", [where, os.getpid(), own, good])
            files: dict[int, int] = {}
            for number, process in enumerate(self._group):
                theirs, pid, fd, whole = said[process]
                if spans and theirs == where and whole:
                    with contextlib.suppress(OSError):  # a sandbox may not let it
                        files[number] = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                        stack.callback(os.close, files[number])
            self._coordinator.gather("at hand", None)  # all have opened what they need: it lasts as long as they do
            if reader is not None:
                reader.at_hand = _AtHand([span for span in spans if span.owner in files], files).parts
                stack.callback(setattr, reader, "at_hand", None)
            yield

    def _get(self, reader: CheckpointReader, spans: Sequence[Span], fd: int) -> None:
        """Fill this process's memory with its spans. Raises CorruptError, OSError."""
        index = self._group.index(self._coordinator.index)

        def get(span: Span) -> None:
            data = np.empty(span.stop - span.start, np.uint8)
            reader.fetch(span.file, span.start, data)
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:].data, span.at + done)

        for _ in in_order(get, (span for span in spans if span.owner == index)):
            pass


class _AtHand:
    """Spans that can be read from memory. files: of each owner."""

    def __init__(self, spans: Sequence[Span], files: dict[int, int]):
        self._files = files
        self._spans: dict[str, list[Span]] = defaultdict(list)
        for span in sorted(spans, key=lambda span: span.start):
            self._spans[span.file].append(span)

    def parts(self, file: str, start: int, stop: int) -> Iterator[Part]:
        at, spans = start, self._spans.get(file, [])
        for number in range(bisect.bisect_right(spans, start, key=lambda span: span.stop), len(spans)):
            span = spans[number]
            if span.start >= stop:
                break
            first, last = max(at, span.start), min(stop, span.stop)
            if first < last:
                if at < first:
                    yield at, first, None
                yield first, last, functools.partial(_fill, self._files[span.owner], span.at + first - span.start)
                at = last
        if at < stop:
            yield at, stop, None


def _fill(fd: int, at: int, buffer: np.ndarray) -> bool:
    done = 0
    while done < len(buffer):
        n = os.preadv(fd, [buffer[done:].data], at + done)
        if n == 0:
            return False
        done += n
    return True
