"""Device -> host in the background: the bytes that a save writes, taken before the next update overwrites them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from checkpoint.writer import Piece
from parallelism.layout import Layout, Logical


class Snapshot:
    """Host copies of the shards that this process writes (``replica_id == 0``), without padding.

    The constructor returns at once; a thread copies in the order of ``arrays``, so put the group
    that is updated first first. Do not donate an array before ``wait`` has returned for its key: the
    copy of an array that was deleted fails, and ``wait`` and ``pieces`` raise that failure.

    The copies own their bytes. On CPU a numpy view of a jax.Array shares its buffer, and a view that
    is alive turns the donation of that array into a copy without a word.

    Raises ValueError unless ``arrays`` are jax arrays with the keys, shapes and dtypes of ``layout``.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], layout: Layout):
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
        self._layout = layout
        self._queue = {
            key: [(shard.index, shard.data) for shard in array.addressable_shards if shard.replica_id == 0]
            for key, array in arrays.items()
        }
        for shards in self._queue.values():
            for _, data in shards:
                data.copy_to_host_async()
        self._changed = threading.Condition()
        self._copied: set[str] = set()
        self._pieces: list[Piece] = []
        self._error: Exception | None = None
        self._finished = False
        self.copy_seconds = 0.0
        self.stalled_seconds = 0.0
        threading.Thread(target=self._copy, name="checkpoint-snapshot", daemon=True).start()

    @property
    def specs(self) -> list[Logical]:
        """Every logical array of the state, with the dtype in which it is stored."""
        return stored_specs(self._layout)

    def wait(self, keys: Iterable[str] | None = None) -> float:
        """Block until the arrays of ``keys`` (None: all) are copied; return the seconds that took."""
        began = time.perf_counter()
        wanted = set(self._layout if keys is None else keys)
        if unknown := wanted - self._layout.keys():
            raise ValueError(f"no such keys in the snapshot: {sorted(unknown)[:3]}")
        with self._changed:
            self._changed.wait_for(lambda: wanted <= self._copied or self._error)
            seconds = time.perf_counter() - began
            self.stalled_seconds += seconds
            if not wanted <= self._copied:
                self._raise()
        return seconds

    def pieces(self) -> Iterator[Piece]:
        """The pieces in the order of copying, each as soon as it is there."""
        at = 0
        while (piece := self._piece(at)) is not None:
            yield piece
            at += 1

    def _piece(self, at: int) -> Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._pieces) > at or self._finished)
            if at < len(self._pieces):
                return self._pieces[at]
            self._raise()
            return None

    def release(self) -> None:
        """Let go of the host copies."""
        with self._changed:
            self._pieces = []

    def _raise(self) -> None:
        if self._error:
            raise RuntimeError(f"snapshot failed: {self._error}") from self._error

    def _copy(self) -> None:
        # Only host memory and device-to-host copies here: no jnp operation, no indexing of a jax.Array.
        began = time.perf_counter()
        try:
            for key in list(self._queue):
                pieces = []
                for index, data in self._queue.pop(key):
                    view = np.asarray(data)
                    for region in self._layout[key].regions(index):
                        own = np.array(view[region.within], order="C", copy=True)
                        logical = dataclasses.replace(region.logical, dtype=own.dtype)
                        pieces.append(Piece(logical, region.start, own))
                    # The trainer may donate as soon as it hears of the copy: drop what refers to the buffer first.
                    del view, data
                with self._changed:
                    self._pieces += pieces
                    self._copied.add(key)
                    self._changed.notify_all()
        except Exception as e:
            self._error = e
        finally:
            self._queue.clear()
            with self._changed:
                self.copy_seconds = time.perf_counter() - began
                self._finished = True
                self._changed.notify_all()


def stored_specs(layout: Layout) -> list[Logical]:
    """The logical arrays of a layout with the dtype of the stored array: what a checkpoint of it holds."""
    return [dataclasses.replace(part, dtype=stored.dtype) for stored in layout.values() for part in stored.parts]
