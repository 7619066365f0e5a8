"""Orbax checkpoints, read in place and written, through TensorStore; Orbax itself is not needed.

What Orbax calls an item is a directory: a tree of arrays as zarr (version 2 or 3) arrays, each under its path in the
tree with dots between the keys, in one OCDBT database or as a directory each, and ``_METADATA``, JSON that lists them.
A checkpoint of ``CheckpointManager`` is ``<root>/<step>/<item>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.header import ArrayHeader, Headers, bounded, check_shape, is_file_name, unique
from checkpoint.manifest import CHUNK_BYTES, Array, Chunk, CorruptError, check_coverage, digest, split
from checkpoint.storage import durable, new_directory
from parallelism.errors import UserError

METADATA = "_METADATA"
ITEM = "default"  # Orbax's name for the item of a checkpoint that has only one

Boxes = Iterable[tuple[tuple[int, ...], np.ndarray]]
"""(start, data): boxes of one array."""

_DATABASE = "manifest.ocdbt"
_STEP = re.compile(r"(?:.+_)?(\d+)")
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_DICT_KEY = 2  # of the kinds of keys in _METADATA: an entry of a dictionary
_CACHE_BYTES = 32 << 20  # of chunks read, for boxes that share one
_BATCH_BYTES = 16 << 20  # of writes in memory; TensorStore needs several times that


def find_item(path: Path) -> Path | None:
    """The item of an Orbax checkpoint that ``path`` means: itself, its only item, or that of its newest step.

    None if there is none. Raises UserError where there are several and none is called ``default``.
    """
    if (path / METADATA).is_file():
        return path
    inside = [p.parent for pattern in (f"*/{METADATA}", f"*/*/{METADATA}") for p in path.glob(pattern)]
    # Not those that are being written, here and by Orbax.
    inside = [p for p in inside if not re.search(r"(^|/)\.|\.orbax-checkpoint-tmp", p.relative_to(path).as_posix())]
    steps = {}
    for item in inside:
        child = path / item.relative_to(path).parts[0]
        if match := _STEP.fullmatch(child.name):
            steps[int(match[1])] = child
    if steps:
        return find_item(steps[max(steps)])
    items = sorted(p for p in inside if p.parent == path)
    if path / ITEM in items:
        return path / ITEM
    if len(items) > 1:
        raise UserError(f"{path}: holds {len(items)} items ({', '.join(p.name for p in items)}); give one: {items[0]}")
    return items[0] if items else None


class OrbaxDir(Headers[ArrayHeader]):
    """The arrays of an Orbax checkpoint: of an item, or of the newest step of a root of steps.

    Maps each name (keys and indices of the tree joined by dots) to its shape and dtype; numbers are arrays without
    dimensions. Strings and empty branches of the tree are not arrays and not here.
    path: the item's directory. meta: its ``custom_metadata``.

    Raises UserError if there is no such checkpoint, it is damaged, or TensorStore is missing. Damage to the bytes of
    an array is found by ``read`` as far as they have checksums: those of ``write_orbax`` do, those of Orbax do not.
    """

    def __init__(self, path: str | Path):
        ts = _tensorstore()
        item = find_item(Path(path))
        if item is None:
            old = " (Orbax wrote none before 2023: restore and save it with a newer one)"
            hint = old * (Path(path) / "checkpoint").is_file()
            raise UserError(f"{path}: not an Orbax checkpoint: {METADATA} is neither in it nor in its items{hint}")
        self.path = item
        where = item / METADATA
        try:
            metadata = json.loads(where.read_bytes(), object_pairs_hook=unique)
            names = _names(metadata["tree_metadata"])
            database = metadata.get("use_ocdbt", (item / _DATABASE).is_file())
            driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
            self.meta: dict[str, Any] = dict(metadata.get("custom_metadata") or {})
        except OSError as error:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptError(f"{where}: damaged ({type(error).__name__}: {error}); use another checkpoint") from error
        if database and not (item / _DATABASE).is_file():
            raise CorruptError(f"{item / _DATABASE} is missing; use another checkpoint")
        # Where chunks of zeros were not written (older versions of Orbax), a missing one is no damage.
        absent = not metadata.get("store_array_data_equal_to_fill_value")
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        opening = {}
        for name in names:
            if not database and not is_file_name(name):
                raise CorruptError(f"{where}: array {name!r:.80} names no directory; use another checkpoint")
            spec = {
                "driver": driver,
                "kvstore": _kvstore(item, name, database),
                "fill_missing_data_reads": absent,
                "recheck_cached_data": "open",
            }
            opening[name] = ts.open(spec, open=True, read=True, context=context)
        self._stores = {name: self._result(name, future) for name, future in opening.items()}
        self._arrays = {}
        for name, store in self._stores.items():
            dtype = store.dtype.numpy_dtype
            self._arrays[name] = ArrayHeader(tuple(store.shape), dtype)
            try:
                check_shape(name, tuple(store.shape), dtype.itemsize)
            except ValueError as error:
                raise CorruptError(f"{item}: {error}; use another checkpoint") from error

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
        """A new array in its own dtype: all of ``name``, or what ``box`` (one slice a dimension) selects.

        Reads the chunks that the box meets. Raises CorruptError if one is missing or damaged.
        """
        if name not in self._arrays:
            raise UserError(f"{self.path}: no array {name!r} among the {len(self)} there")
        selected = bounded(name, self._arrays[name].shape, box)
        return np.asarray(self._result(name, self._stores[name][selected].read(order="C")))

    def _result(self, name: str, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:  # TensorStore raises bare types
            raise CorruptError(f"{self.path}: array {name!r}: {_reason(error)}; use another checkpoint") from error


def write_orbax(
    directory: str | Path,
    arrays: Iterable[tuple[str, tuple[int, ...], np.dtype, Boxes]],
    meta: Mapping[str, Any],
    step: int | None = None,
    add_files: Callable[[Path], None] = lambda directory: None,
) -> Path:
    """Write a checkpoint that Orbax restores: ``directory`` as an item, for ``StandardCheckpointer`` and the like.

    step: write it as that step of ``directory``, the root of a ``CheckpointManager``, which may hold others.
    arrays: name, global shape, dtype, and boxes, each (start, data), that cover the array once. Names with dots become
    nested dictionaries. The first box's shape decides what is one chunk of the file, of at most 16 MiB.
    meta: JSON; Orbax's ``custom_metadata``, ``OrbaxDir.meta``. add_files: called with the item, to write other files.

    Takes boxes one by one, and besides them some 100 MiB of memory (300 where each thread has an arena of malloc's).
    All is read back and compared before it gets its name; after an error nothing is left. Returns the item's directory.
    Raises UserError if the directory exists, for names that make no tree, a dtype that TensorStore does not have, and
    when the disk refuses; CorruptError if the boxes do not cover an array; ValueError or TypeError if ``meta`` is no
    JSON.
    """
    ts = _tensorstore()
    final = Path(directory) if step is None else Path(directory) / str(step)
    json.dumps(meta, allow_nan=False)  # fails before anything is written
    with new_directory(final) as draft:
        item = draft if step is None else draft / ITEM
        item.mkdir(exist_ok=True)
        written = _write_arrays(ts, item, final, arrays)
        metadata = {
            "tree_metadata": {str(tuple(name.split("."))): _entry(name) for name in written},
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": dict(meta),
        }
        with durable(item / METADATA) as file:
            file.write(json.dumps(metadata).encode())
        if step is not None:
            with durable(draft / "_CHECKPOINT_METADATA") as file:
                file.write(json.dumps({"item_handlers": {ITEM: _HANDLER}}).encode())
        _verify(OrbaxDir(item), final, written)
        add_files(item)
    return final if step is None else final / ITEM


def _write_arrays(
    ts: Any, item: Path, final: Path, arrays: Iterable[tuple[str, tuple[int, ...], np.dtype, Boxes]]
) -> dict[str, list[Chunk]]:
    """Into the database of ``item``; returns what was written where, by array, with digests."""
    written: dict[str, list[Chunk]] = {}
    branches: dict[str, str] = {}  # of the tree, each with a name below it
    pending = _Pending(ts, final)
    for name, shape, dtype, boxes in arrays:
        parts = name.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts))}
        if not all(parts) or "/" in name:
            raise UserError(f"{final}: array {name!r}: expected keys with dots between them, and no '/'; rename it")
        if name in written:
            raise UserError(f"{final}: array {name!r} is given twice")
        if other := branches.get(name) or next(iter(above & written.keys()), None):
            raise UserError(f"{final}: arrays {name!r} and {other!r}: one is inside the other; rename one of them")
        branches |= dict.fromkeys(above, name)
        written[name] = []
        begun = False
        for start, data in boxes:
            if data.dtype != dtype:
                raise ValueError(f"array {name!r} of dtype {dtype} is given a box of {data.dtype}")
            if not data.size:
                continue
            if not begun:
                chunk = next(split(data.shape, dtype.itemsize, CHUNK_BYTES))[1]
                pending.create(item, name, shape, dtype, chunk)
                begun = True
            pending.write(start, data)
            raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            written[name].append(Chunk(start, data.shape, _DATABASE, 0, data.nbytes, digest(raw.data)))
        if not begun:
            pending.create(item, name, shape, dtype, tuple(max(1, n) for n in shape))
        check_coverage(name, Array(np.dtype(dtype), shape, (None,) * len(shape), tuple(written[name])), str(final))
    pending.flush()
    return written


class _Pending:
    """The array being written, by transactions of some size: the database gets a new version, synced, with each."""

    def __init__(self, ts: Any, final: Path):
        self._ts, self._final, self._name = ts, final, ""
        self._context = ts.Context()
        self._transaction = ts.Transaction(atomic=False)
        self._nbytes = 0
        self._store: Any = None

    def create(self, item: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]) -> None:
        codecs = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}]
        grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(item, name, True),
            "dtype": dtype.name,
            "store_data_equal_to_fill_value": True,
            "metadata": {"shape": list(shape), "chunk_grid": grid, "codecs": codecs},
        }
        self._name = name
        self._store = self._done(
            lambda: self._ts.open(spec, create=True, context=self._context, transaction=self._transaction)
        )

    def write(self, start: tuple[int, ...], data: np.ndarray) -> None:
        box = tuple(slice(a, a + n) for a, n in zip(start, data.shape, strict=True))
        self._done(lambda: self._store[box].write(data))
        self._nbytes += data.nbytes
        if self._nbytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        self._done(self._transaction.commit_async)
        self._transaction, self._nbytes = self._ts.Transaction(atomic=False), 0
        if self._store is not None:
            self._store = self._store.with_transaction(None).with_transaction(self._transaction)

    def _done(self, begin: Callable[[], Any]) -> Any:
        try:
            return begin().result()
        except Exception as error:  # TensorStore raises bare types
            raise UserError(f"cannot write {self._final}: at array {self._name!r}: {_reason(error)}") from error


def _verify(found: OrbaxDir, final: Path, written: Mapping[str, list[Chunk]]) -> None:
    """Raises UserError unless every box reads back as it was given."""
    for name, chunks in written.items():
        for chunk in chunks:
            box = tuple(slice(a, a + n) for a, n in zip(chunk.start, chunk.shape, strict=True))
            if digest(found.read(name, box).reshape(-1).view(np.uint8).data) != chunk.digest:
                raise UserError(f"{final} did not verify after writing: array {name!r}; check the disk")


def _names(tree: Mapping[str, Any]) -> list[str]:
    """Of the arrays. Raises ValueError and the like for entries that make no sense."""
    found = []
    for entry in tree.values():
        name = ".".join(str(key["key"]) for key in entry["key_metadata"])
        kind = entry["value_metadata"]["value_type"]
        if entry["value_metadata"]["skip_deserialize"] or kind == "string":
            continue
        if kind not in _ARRAYS:
            raise ValueError(f"{name!r} is of type {kind!r}, known are {', '.join(_ARRAYS)}")
        found.append((name, None))
    return list(unique(found))


def _entry(name: str) -> dict[str, Any]:
    """Of an array in ``tree_metadata``. Being numpy's, it needs no sharding; Orbax restores it to any asked for."""
    return {
        "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in name.split(".")],
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }


def _kvstore(item: Path, name: str, database: bool) -> dict[str, Any]:
    if not database:
        return {"driver": "file", "path": f"{item.absolute() / name}/"}
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item.absolute()}/"}, "path": f"{name}/"}


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise UserError(
            "Orbax checkpoints need TensorStore, which is not installed; install it with: pip install 'jaxsys[orbax]'"
        ) from error
    return tensorstore


def _reason(error: Exception) -> str:
    """What TensorStore says, on one line and without the specification that it appends."""
    return " ".join(str(error).split("[tensorstore_spec=")[0].split()) or type(error).__name__
