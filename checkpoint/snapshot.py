"""Device -> host in the background: the bytes that a save writes, taken before the next update overwrites them."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from checkpoint.cells import ALIGNMENT, aligned, pack_into
from checkpoint.shares import Bounds, Share, bounds_of
from checkpoint.writer import Block
from parallelism.layout import Layout

AHEAD = 2  # shards on their way from a device to the host
LOOK_SECONDS = 0.002  # between looks at whether devices are still at work
LATE_SECONDS = 0.2  # and whether what waits then has no time any more

Shares = Mapping[str, list[tuple[int, list[Share]]]]
"""What a process writes: by key, which of its shards (``addressable_data``) and the chunks of that."""


class Staging:
    """At most ``budget`` bytes of host memory between devices and writers, given back when none is in use.

    What is free and lies first is taken first: where writers keep up, little of it is ever touched. What is larger than
    the budget gets it all to itself, and no more. peak: the most bytes there were so far. thread: in which snapshots
    copy, one after the other: one that began before the last had all its room would hold up the writer that makes room
    for that.
    """

    def __init__(self, budget: int):
        self.budget, self.peak = budget, 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-snapshot")
        self._changed = threading.Condition()
        self._taken: list[_Room] = []  # as they lie
        self._memory: np.ndarray | None = None

    def take(self, nbytes: int, given_up: threading.Event) -> _Room | None:
        """Room for ``nbytes``; waits for it. None once ``given_up`` is set (see ``wake``)."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        with self._changed:
            while not given_up.is_set():
                if (start := self._start(size)) is not None:
                    if self._memory is None:
                        self._memory = aligned(max(self.budget, size))
                    room = _Room(self, start, start + size, self._memory[start : start + nbytes])
                    bisect.insort(self._taken, room, key=lambda room: room.start)
                    self.peak = max(self.peak, start + size)
                    return room
                self._changed.wait()
        return None

    def _start(self, size: int) -> int | None:
        """Where so many bytes are free; None if they are not, side by side."""
        at = 0
        for room in self._taken:
            if room.start - at >= size:
                return at
            at = room.stop
        length = self.budget if self._memory is None else len(self._memory)
        return at if at + size <= length or not self._taken else None

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def free(self, room: _Room) -> None:
        with self._changed:
            self._taken.remove(room)
            if not self._taken:
                self._memory = None
            self._changed.notify_all()


@dataclasses.dataclass(eq=False)
class _Room:
    """A piece of it: from start to stop, of which ``data`` was asked for."""

    staging: Staging
    start: int
    stop: int
    data: np.ndarray


class Snapshot:
    """The chunks that this process writes of a state, copied off the devices in a thread, through staging memory.

    The constructor returns at once. Copies are made in the order of ``arrays``, so put the group that is updated first
    first, as far as there is room; ``blocks`` makes room. Do not donate an array before ``wait`` has returned for
    its key: the copy of an array that was deleted fails, and ``wait`` and ``blocks`` raise that failure.

    On CPU a numpy view of a jax.Array shares its buffer, and a view that is alive turns the donation of that array into
    a copy without a word: none is kept.

    shares: what this process writes (``checkpoint.shares``). moved: when, of ``time.monotonic``, a writer was last done
    with a chunk.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], shares: Shares, staging: Staging):
        self._keys = frozenset(arrays)
        self._staging = staging
        self._queue = deque((key, arrays[key].addressable_data(at), own) for key in arrays for at, own in shares[key])
        self._changed = threading.Condition()
        self._copied = set(self._keys - {key for key, _, _ in self._queue})
        self._ready: deque[tuple[Block, _Room]] = deque()
        self._error: Exception | None = None
        self._finished, self._given_up = False, threading.Event()
        self.copy_seconds = 0.0
        self.stalled_seconds = 0.0
        self.moved = time.monotonic()
        staging.thread.submit(self._copy)

    def wait(
        self,
        keys: Iterable[str] | None = None,
        busy: Callable[[], bool] = lambda: False,
        late: Callable[[], bool] = lambda: False,
    ) -> float:
        """Block until the arrays of ``keys`` (None: all) are copied, or given up; return the seconds that held up.

        busy: whether devices are still at work on what is needed besides: until they are not, nothing is held up.
        late: asked now and then; whether to give the snapshot up (``release``) rather than to wait longer.
        """
        began: float | None = None
        wanted = self._keys if keys is None else frozenset(keys)
        if unknown := wanted - self._keys:
            raise ValueError(f"no such keys in the snapshot: {sorted(unknown)[:3]}")
        with self._changed:
            while not (wanted <= self._copied or self._finished):
                if began is None and not busy():
                    began = time.perf_counter()
                self._changed.wait(LOOK_SECONDS if began is None else LATE_SECONDS)
                if began is not None and late():
                    break
            seconds = 0.0 if began is None else time.perf_counter() - began
            self.stalled_seconds += seconds
            copied = wanted <= self._copied
            if not copied and self._finished:
                self._raise()
        if not copied:
            self.release()
        return seconds

    def blocks(self) -> Iterator[Block]:
        """The chunks in the order of copying, each as soon as it is there; its memory is used again after the next.

        One that was not taken whole, because the loop over them ended in an error, is the first of the next loop.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._finished)
                self._go_on()
                if not self._ready:
                    self._raise()
                    return
                block, room = self._ready[0]
            yield block
            with self._changed:
                self._go_on()
                self._ready.popleft()
                self.moved = time.monotonic()
            self._staging.free(room)

    def release(self) -> None:
        """Copy no more, and let go of what was copied."""
        self._given_up.set()
        self._staging.wake()
        with self._changed:
            rooms, self._ready = [room for _, room in self._ready], deque()
        for room in rooms:
            self._staging.free(room)

    def _go_on(self) -> None:
        if self._given_up.is_set():  # and its memory may be another's
            raise RuntimeError("the save was given up")

    def _raise(self) -> None:
        if self._error:
            raise RuntimeError(f"snapshot failed: {self._error}") from self._error

    def _copy(self) -> None:
        # Only host memory and device-to-host copies here: no jnp operation, no indexing of a jax.Array.
        began = time.perf_counter()
        coming: deque[tuple[str, Any, list[Share]]] = deque()
        view: np.ndarray | None = None
        data: Any = None
        try:
            while (self._queue or coming) and not self._given_up.is_set():
                while self._queue and len(coming) < AHEAD:
                    key, data, shares = self._queue.popleft()
                    coming.append((key, _on_the_way(data), shares))
                key, data, shares = coming.popleft()
                view = np.asarray(data)
                for share in shares:
                    self._stage(view[share.within], share)
                # The trainer may donate as soon as it hears of the copy: drop what refers to the buffer first.
                view = data = None
                if not any(key == later for later, *_ in (*coming, *itertools.islice(self._queue, 1))):
                    with self._changed:
                        self._copied.add(key)
                        self._changed.notify_all()
        except Exception as e:
            self._error = e
        finally:
            self._queue.clear()
            coming.clear()
            view = data = None  # an error that is kept keeps this frame
            with self._changed:
                if self._given_up.is_set() and self._error is None:
                    self._copied = set(self._keys)  # nobody wants them any more
                self.copy_seconds = time.perf_counter() - began
                self._finished = True
                self._changed.notify_all()

    def _stage(self, data: np.ndarray, share: Share) -> None:
        """Put one chunk into staging memory, in the order of its file."""
        room = self._staging.take(share.nbytes, self._given_up)
        if room is None:
            return
        pack_into(room.data, np.asarray(data), share.grid)
        block = Block(share.logical, share.start, share.shape, share.grid, room.data)
        with self._changed:
            if not self._given_up.is_set():
                self._ready.append((block, room))
                self._changed.notify_all()
                return
        self._staging.free(room)


def by_shard(arrays: Mapping[str, jax.Array], shares: Mapping[str, list[tuple[Bounds, list[Share]]]]) -> Shares:
    """Shares with the place of a shard in place of its box."""
    found = {}
    for key, own in shares.items():
        places: dict[Bounds, int] = {}
        for at, shard in enumerate(arrays[key].addressable_shards if own else ()):
            places.setdefault(bounds_of(shard.index, arrays[key].shape), at)
        found[key] = [(places[box], chunks) for box, chunks in own]
    return found


def check_arrays(arrays: Mapping[str, jax.Array], layout: Layout) -> None:
    """Raises ValueError unless ``arrays`` are jax arrays with the keys, shapes and dtypes of ``layout``."""
    if arrays.keys() != layout.keys():
        raise ValueError(f"arrays and layout differ in keys: {sorted(arrays.keys() ^ layout.keys())[:3]}")
    for key, array in arrays.items():
        if not isinstance(array, jax.Array):
            raise ValueError(f"{key}: found {type(array).__name__}, expected a jax array (see jax.device_put)")
        if (array.shape, array.dtype) != (layout[key].shape, layout[key].dtype):
            raise ValueError(
                f"{key}: array is {array.dtype}{list(array.shape)}, "
                f"its layout says {layout[key].dtype}{list(layout[key].shape)}"
            )


def _on_the_way(data: jax.Array) -> jax.Array:
    """The same array, its copy to the host begun; the host keeps that only as long as what is returned.

    An array keeps its copy to the host, and a shard lives as long as the array that it is of.
    """
    if next(iter(data.devices())).platform != "cpu":
        data = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
        data.copy_to_host_async()
    return data
