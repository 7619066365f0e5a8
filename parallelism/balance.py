"""Documents of uneven lengths over devices: which go whole to one, and which are split over the mesh axis ``context``.

The work of attention grows with the square of a document's length, that of everything else with the length. So each
device gets the same number of tokens, and documents such that attention's work is even too. A document that is whole
on one device sends nothing; a long one is split over the devices of its context group, each of which gets an early
and a late piece, an equal share of its triangle. Zeppelin (Chen et al. 2025), ByteScale (Ge et al. 2025) and FlexSP
(Wang et al. 2025) do this by changing process groups from batch to batch. Here the mesh stays, and with it the number
of programs: a device's tokens are a local region and a split region, whose size is one of a few.

All of it is host code, a function of lengths and sizes.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from parallelism.errors import UserError

EVEN = 1.05
"""How much more work than the others a device may have before a larger split region is taken."""

# The shortest documents, with this share of the tokens, are dealt by room alone: they make the numbers of tokens even.
# More of them would be missing where work is evened: at 0.25 small batches needed a third more split tokens.
_TAIL = 0.04


@dataclasses.dataclass(frozen=True)
class Grid:
    """The devices of a batch.

    groups: context groups; those of several microbatches count apart. pieces: devices of a group.
    room: tokens of a device.
    """

    groups: int
    pieces: int
    room: int

    @property
    def devices(self) -> int:
        return self.groups * self.pieces


class Runs(NamedTuple):
    """Runs of tokens that lie together, int64 [R] each.

    device: group * pieces + place in the group. place: of the first token among the device's.
    source: of the first token in the sequence of all documents. length: tokens.
    document: 0, 1, ... in that sequence. position: of the first token in its document.
    """

    device: np.ndarray
    place: np.ndarray
    source: np.ndarray
    length: np.ndarray
    document: np.ndarray
    position: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every token of a batch goes.

    split: size of the split region, the last ``split`` tokens of every device; the rest is its local region.
    runs: a document is one run in a local region, or up to 2 * pieces in the split regions of a group.
    cut: documents that fitted nowhere whole. Their parts are documents of their own.
    """

    grid: Grid
    split: int
    runs: Runs
    cut: int

    @property
    def work(self) -> np.ndarray:
        """Pairs of a query and a key that it sees, windows ignored: int64 [devices]."""
        first = self.runs.position
        pairs = _triangle(first + self.runs.length) - _triangle(first)
        return np.bincount(self.runs.device, pairs, self.grid.devices).astype(np.int64)

    @property
    def imbalance(self) -> float:
        """The work of the device with most over the mean."""
        work = self.work
        return float(work.max() / work.mean()) if work.any() else 1.0

    @property
    def tokens(self) -> int:
        return int(self.runs.length.sum())

    @property
    def padding(self) -> float:
        """Share of places without a token."""
        return 1 - self.tokens / (self.grid.devices * self.grid.room)

    @property
    def split_share(self) -> float:
        """Share of tokens that are in split regions."""
        inside = self.runs.place >= self.grid.room - self.split
        return float(self.runs.length[inside].sum() / max(self.tokens, 1))

    def arrange(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every place [groups, pieces * room]: the token that lies there, its document and its position.

        The token as its place in the sequence of all documents, int64, -1 for none; the document counted from 1 and 0
        for none, and the position in it, int32.
        """
        runs, places = self.runs, self.grid.devices * self.grid.room
        before = np.cumsum(runs.length) - runs.length

        def each(first: np.ndarray) -> np.ndarray:
            """first, first + 1, ... over each run."""
            return np.repeat(first - before, runs.length) + np.arange(self.tokens)

        at = each(runs.device * self.grid.room + runs.place)
        source = np.full(places, -1, np.int64)
        document, position = np.zeros(places, np.int32), np.zeros(places, np.int32)
        source[at] = each(runs.source)
        document[at] = np.repeat(runs.document + 1, runs.length)
        position[at] = each(runs.position)
        shape = (self.grid.groups, -1)
        return source.reshape(shape), document.reshape(shape), position.reshape(shape)


def split_sizes(shares: Iterable[float], grid: Grid) -> tuple[int, ...]:
    """The split regions of these shares of a device's tokens, in tokens, ascending.

    Raises UserError for one that is not a multiple of four tokens: ``token_ring`` sends halves of pieces.
    """
    sizes = []
    for share in sorted(set(shares)):
        size = share * grid.room
        if size % 4:
            raise UserError(
                f"a split share of {share} of the {grid.room} tokens of a device is {size:g} tokens, expected a "
                "multiple of 4: change the share, the rows or the mesh"
            )
        sizes.append(int(size))
    return tuple(sizes)


def plan(lengths: np.ndarray | Sequence[int], grid: Grid, sizes: Sequence[int]) -> Plan:
    """The plan with the smallest split region, of ``sizes``, that is even (``EVEN``) and cuts no document.

    lengths: tokens of each document, at least one. Even is relative to what can be had: to the mean, or, if no plan
    comes that near, to the share of the group that has the longest document; where no size reaches that, to the best of
    those that cut fewest. Raises UserError for documents that the devices cannot hold.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.sum() > grid.devices * grid.room:
        raise UserError(
            f"documents of {lengths.sum()} tokens for {grid.devices} devices of {grid.room}: expected at most "
            f"{grid.devices * grid.room}: give fewer documents or more room"
        )
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order]
    work = _triangle(longest)
    mean, least = work.sum() / grid.devices, _least(longest, work, grid)
    limit = EVEN * (mean if least <= EVEN * mean else least)
    tokens_before, work_before = np.cumsum(longest), np.cumsum(work)

    def possible(split: int) -> bool:
        """Whether the longest document that has to stay whole, at best, can be on one device, and the longest of all,
        if it cannot, in one group."""
        k = int(np.searchsorted(tokens_before, grid.devices * split, side="right"))
        if k == len(longest):
            return True
        if longest[0] > (grid.pieces * split if work[0] > limit or longest[0] > grid.room - split else np.inf):
            return False
        shared = (work_before[k] - work[k]) / grid.devices
        return bool(longest[k] <= grid.room - split and work[k] + shared <= limit)

    plans: list[Plan] = []
    for split in [size for size in sorted(sizes) if possible(size)] or sorted(sizes):
        plans.append(_laid_out(*_assigned(longest, work, grid, split), order, lengths, grid, split))
        if not plans[-1].cut and plans[-1].work.max() <= limit:
            return plans[-1]
    fewest = [each for each in plans if each.cut == min(other.cut for other in plans)]
    reached = EVEN * min(each.work.max() for each in fewest)
    return next(each for each in fewest if each.work.max() <= reached)


def _least(longest: np.ndarray, work: np.ndarray, grid: Grid) -> float:
    """Work that some device has in any plan: only one group can share the longest document, and what the others have no
    room for is with it, at best the shortest documents."""
    if not len(longest):
        return 0.0
    beside = longest.sum() - (grid.groups - 1) * grid.pieces * grid.room - longest[0]
    shortest = int(np.searchsorted(np.cumsum(longest[:0:-1]), beside, side="right"))
    return float(work[0] + work[len(work) - shortest :].sum()) / grid.pieces


def _triangle(length: np.ndarray) -> np.ndarray:
    """Pairs of a query and a key not after it."""
    return length * (length + 1) // 2


# ---------------------------------------------------------------------------------------------------------- assignment


def _assigned(
    longest: np.ndarray, work: np.ndarray, grid: Grid, split: int
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Where each document goes: a device, or ``devices`` + group where it is split, or -1 where it is cut.

    longest: tokens, descending; work: of each. Also returns the parts of those that are cut: (document, first token,
    tokens, where it goes).
    """
    where = np.full(len(longest), -1)
    gaps, rooms = [grid.pieces * split] * grid.groups, [grid.room - split] * grid.devices
    if split == grid.room:
        dealt = _dealt(longest, work, [0.0] * grid.groups, gaps)
        where[dealt >= 0] = grid.devices + dealt[dealt >= 0]
    else:
        inside, group, loads = _filled(longest, work, gaps)
        where[inside] = grid.devices + group
        rest = np.flatnonzero(where < 0)
        own = [load / grid.pieces for load in loads for _ in range(grid.pieces)]
        where[rest] = _dealt(longest[rest], work[rest], own, rooms)
    space, parts = rooms + gaps, []
    for i in np.flatnonzero(where < 0).tolist():
        left = int(longest[i])
        if max(gaps := space[grid.devices :]) >= left:
            where[i] = grid.devices + gaps.index(max(gaps))
            space[where[i]] -= left
            continue
        while left:
            bin = space.index(max(space))
            size = min(space[bin], left)
            parts.append((i, int(longest[i]) - left, size, bin))
            space[bin] -= size
            left -= size
    return where, parts


def _filled(longest: np.ndarray, work: np.ndarray, gaps: list[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The longest documents that fit into ``gaps``, each to the bin of least work that has a gap for it.

    Returns which documents, the bin of each, and the work of each bin. Gaps become less in place.
    """
    ascending = -longest
    loads, chosen, bins = [0] * len(gaps), [], []
    i = 0
    while (i := max(i, int(np.searchsorted(ascending, -max(gaps))))) < len(longest):
        length = int(longest[i])
        _, bin = min((loads[b], b) for b, gap in enumerate(gaps) if gap >= length)
        loads[bin] += int(work[i])
        gaps[bin] -= length
        chosen.append(i)
        bins.append(bin)
        i += 1
    return np.array(chosen, np.int64), np.array(bins, np.int64), loads


def _dealt(longest: np.ndarray, work: np.ndarray, loads: Sequence[float], rooms: list[int]) -> np.ndarray:
    """A bin for each document, -1 for none, so that both work and tokens come out even. Rooms become less in place.

    loads: work that the bins have already. The longest documents go to the bin that would have the least work if its
    room were filled with the shortest ones (the longest-processing-time rule of Graham 1969, with what the rest will
    bring); the shortest then go where most room is.
    """
    cumulative = np.cumsum(longest)
    head = int(np.searchsorted(cumulative, (1 - _TAIL) * cumulative[-1])) if len(longest) else 0
    density = work[head:].sum() / max(longest[head:].sum(), 1)
    keys = [load + density * room for load, room in zip(loads, rooms, strict=True)]
    first = _in_turn(longest[:head], work[:head] - density * longest[:head], keys, rooms)
    rest = _in_turn(longest[head:], longest[head:], [-room for room in rooms], rooms)
    return np.array(first + rest, np.int64)


def _in_turn(lengths: np.ndarray, weights: np.ndarray, keys: Sequence[float], rooms: list[int]) -> list[int]:
    """Each document to the bin of least key that has room for it, -1 for none; the key then grows by its weight."""
    heap = [(key, bin) for bin, key in enumerate(keys)]
    heapq.heapify(heap)
    bins = []
    full: list[tuple[int, float, int]] = []  # bins without room, by the most room: documents get shorter
    for length, weight in zip(lengths.tolist(), weights.tolist(), strict=True):
        while full and -full[0][0] >= length:
            heapq.heappush(heap, heapq.heappop(full)[1:])
        while heap and rooms[heap[0][1]] < length:
            key, bin = heapq.heappop(heap)
            heapq.heappush(full, (-rooms[bin], key, bin))
        if heap:
            key, bin = heap[0]
            heapq.heapreplace(heap, (key + weight, bin))
            rooms[bin] -= length
            bins.append(bin)
        else:
            bins.append(-1)
    return bins


# -------------------------------------------------------------------------------------------------------------- layout


def _laid_out(
    where: np.ndarray,
    parts: list[tuple[int, int, int, int]],
    order: np.ndarray,
    lengths: np.ndarray,
    grid: Grid,
    split: int,
) -> Plan:
    """The plan of an assignment: ``where`` and ``parts`` by place in ``order``, the documents by length."""
    begins = np.cumsum(lengths) - lengths
    whole = np.flatnonzero(where >= 0)
    cut = np.array(parts, np.int64).reshape(-1, 4)
    source = np.concatenate([begins[order[whole]], begins[order[cut[:, 0]]] + cut[:, 1]])
    length = np.concatenate([lengths[order[whole]], cut[:, 2]])
    bins = np.concatenate([where[whole], cut[:, 3]])
    by_source = np.argsort(source)
    source, length, bins = source[by_source], length[by_source], bins[by_source]
    document = np.arange(len(source))

    local = np.flatnonzero(bins < grid.devices)
    local = local[np.argsort(bins[local], kind="stable")]
    device = bins[local]
    own = Runs(device, _offsets(length[local], device), source[local], length[local], document[local], 0 * device)

    shared = np.flatnonzero(bins >= grid.devices)
    shared = shared[np.argsort(bins[shared], kind="stable")]
    pieces = _pieces(source[shared], length[shared], bins[shared] - grid.devices, document[shared], grid, split)
    runs = Runs(*(np.concatenate(pair) for pair in zip(own, pieces, strict=True)))
    return Plan(grid, split, runs, len(np.unique(cut[:, 0])))


def _offsets(sizes: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Where each begins among those of its bin; bins are ascending."""
    before = np.cumsum(sizes) - sizes
    return before - before[np.searchsorted(bins, bins)] if len(sizes) else before


def _pieces(
    source: np.ndarray, length: np.ndarray, group: np.ndarray, document: np.ndarray, grid: Grid, split: int
) -> Runs:
    """Documents [J] split over their groups, which are ascending: each into 2n pieces, device i has i and 2n - 1 - i.

    What does not divide goes round the devices, so that those of a group never differ by more than one token.
    """
    n = grid.pieces
    turn = (np.arange(n) - _offsets(length, group)[:, None]) % n
    tokens = length[:, None] // n + (turn < length[:, None] % n)  # [J, n]
    early = (tokens + 1) // 2
    sizes = np.concatenate([early, (tokens - early)[:, ::-1]], axis=1)  # [J, 2n]
    position = np.cumsum(sizes, axis=1) - sizes
    before = np.cumsum(tokens, axis=0) - tokens
    before = before - before[np.searchsorted(group, group)] if len(length) else before
    place = grid.room - split + np.concatenate([before, (before + early)[:, ::-1]], axis=1)
    member = np.concatenate([np.arange(n), np.arange(n)[::-1]])
    device = group[:, None] * n + member
    runs = Runs(device, place, source[:, None] + position, sizes, document[:, None] + 0 * sizes, position)
    return Runs(*(array[sizes > 0] for array in runs))
