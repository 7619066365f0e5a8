"""Any checkpoint into any mesh: the read plan and the load that follows it; and a checkpoint out of pieces."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from checkpoint.ahead import THREADS, in_order
from checkpoint.cells import ALIGNMENT, aligned, unpack, unpack_into
from checkpoint.manifest import CHUNK_BYTES, MANIFEST, Chunk, Manifest
from checkpoint.reader import Box, CheckpointReader, intersect, worth_reading
from checkpoint.shares import bounds_of
from checkpoint.storage import LocalFiles, durable, new_directory, place_of
from checkpoint.writer import ChunkWriter, Piece, blocks_of, data_file, manifest_of
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Region, Stored

Index = tuple[slice, ...]
"""The box of a stored array that one device holds, as in ``Shard.index``."""


class Move(NamedTuple):
    """Elements ``source`` of a chunk, their axes in this order, go to ``target`` of host piece number ``piece``."""

    piece: int
    source: tuple[slice, ...]
    target: tuple[slice | int, ...]
    order: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class ChunkRead:
    """One chunk, or those of its cells that are needed, read once, and everywhere that the elements go."""

    name: str
    chunk: Chunk
    moves: tuple[Move, ...]
    cells: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """What is read, with the table of digests."""
        if self.cells is None or self.chunk.grid is None:
            return self.chunk.stored_bytes
        table = self.chunk.whole_bytes - self.chunk.nbytes
        return self.chunk.nbytes // math.prod(self.chunk.grid) * len(self.cells) + table


@dataclasses.dataclass(frozen=True)
class ArrayPlan:
    """How to fill the pieces (distinct boxes) of one stored array.

    What has a digest is read whole: bytes_read exceeds bytes_needed where the boxes of the target cut through cells.
    """

    stored: Stored
    pieces: tuple[Index, ...]
    reads: tuple[ChunkRead, ...]
    bytes_needed: int

    @property
    def bytes_read(self) -> int:
        return sum(read.nbytes for read in self.reads)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where values of a logical array come from, when the checkpoint has them otherwise: renamed, fused, transposed.

    name: of an array of the checkpoint. order: its axes in the order of the logical array's (None: the same). start:
    where its first element then is in the logical array; None is the first. One that holds three fused arrays begins
    before the second of them: there the start is negative.
    """

    name: str
    start: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Box:
        """A box of the checkpoint's array as one of the logical array, of which parts may lie outside."""
        order = self.order if self.order is not None else range(len(start))
        begin = self.start if self.start is not None else (0,) * len(start)
        return tuple(start[d] + b for d, b in zip(order, begin, strict=True)), tuple(shape[d] for d in order)

    def back(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """An index of a logical array's axes as one of the checkpoint's."""
        return index if self.order is None else tuple(index[d] for d in np.argsort(self.order))


Origins = Mapping[str, Sequence[Origin]]
"""By logical name. An array that is not named comes from the one of its own name."""


def plan_array(
    manifest: Manifest, stored: Stored, pieces: tuple[Index, ...], origins: Origins | None = None
) -> ArrayPlan:
    """Which chunks fill these pieces of a stored array. Pure: no file is read.

    The manifest must hold every part with its shape (``check_match``).
    """
    regions: dict[str, list[tuple[int, Region]]] = {}
    needed = 0
    for number, index in enumerate(pieces):
        for region in stored.regions(index):
            regions.setdefault(region.logical.name, []).append((number, region))
    moves: dict[tuple[str, int], list[Move]] = {}
    for name, wanted in regions.items():
        start, stop = _corners([(region.start, region.size) for _, region in wanted])
        for origin in _origins(name, origins):
            array = manifest.arrays[origin.name]
            if not array.chunks:
                continue
            begin, end = _corners([origin.box(chunk.start, chunk.shape) for chunk in array.chunks])
            first, last = np.maximum(start[:, None], begin), np.minimum(stop[:, None], end)
            which, at = np.nonzero((first < last).all(-1))
            first, last = first[which, at], last[which, at]
            needed += int((last - first).prod(-1).sum()) * array.dtype.itemsize
            sources, targets = (_boxes(first - o, last - o) for o in (begin[at], start[which]))
            for w, a, source, inner in zip(which.tolist(), at.tolist(), sources, targets, strict=True):
                number, region = wanted[w]
                target = (*region.within[:1], *inner) if stored.stacked else inner
                moves.setdefault((origin.name, a), []).append(Move(number, origin.back(source), target, origin.order))
    reads = []
    for (name, a), own in moves.items():
        chunk = manifest.arrays[name].chunks[a]
        reads.append(ChunkRead(name, chunk, tuple(own), worth_reading(chunk, [move.source for move in own])))
    return ArrayPlan(stored, pieces, tuple(reads), needed)


def _corners(boxes: Sequence[Box]) -> tuple[np.ndarray, np.ndarray]:
    """The first corner of each box and the last, [boxes, dimensions] int64."""
    first = np.array([start for start, _ in boxes], np.int64)
    return first, first + np.array([shape for _, shape in boxes], np.int64)


def _boxes(first: np.ndarray, last: np.ndarray) -> Iterator[tuple[slice, ...]]:
    return (tuple(map(slice, *box)) for box in zip(first.tolist(), last.tolist(), strict=True))


def _origins(name: str, origins: Origins | None) -> Sequence[Origin]:
    return origins[name] if origins is not None and name in origins else (Origin(name),)


def _shape(index: Index, stored: Stored) -> tuple[int, ...]:
    return tuple(hi - lo for lo, hi in bounds_of(index, stored.shape))


def distinct_boxes(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, process: int | None = None
) -> tuple[Index, ...]:
    """The boxes that devices of a process (None: this one) hold, each once."""
    if process is None:
        indices = list(sharding.addressable_devices_indices_map(shape).values())
    else:
        whole = sharding.devices_indices_map(shape).items()
        indices = [index for device, index in whole if device.process_index == process]  # type: ignore[attr-defined]
    return tuple(tuple(slice(*b) for b in box) for box in dict.fromkeys(bounds_of(index, shape) for index in indices))


def check_match(
    manifest: Manifest,
    layout: Layout,
    where: str,
    *,
    partial: bool = False,
    cast: bool = False,
    origins: Origins | None = None,
) -> None:
    """Raise UserError unless the checkpoint holds the arrays of the layout, in shapes and dtypes that fit.

    partial: the checkpoint may hold more. cast: allow casts that lose bits (see ``castable``). origins: of arrays that
    the checkpoint has otherwise.
    """
    for name, given in (origins or {}).items():
        if not isinstance(given, Sequence) or not all(isinstance(origin, Origin) for origin in given):
            raise UserError(f"origins of array {name!r}: found {given!r}, expected a list such as [Origin('its name')]")
    if strange := sorted((origins or {}).keys() - layout.logical.keys()):
        raise UserError(f"origins are given of arrays that the model does not have: {_listed(strange)}; mend the names")
    sources = {origin.name for name in layout.logical for origin in _origins(name, origins)}
    missing = sorted(sources - manifest.arrays.keys())
    unused = sorted(manifest.arrays.keys() - sources)
    if missing or (unused and not partial):
        wrong = [
            f"{len(names)} {what} ({_listed(names)})"
            for names, what in ((missing, "missing from it"), ([] if partial else unused, "not in the model"))
            if names
        ]
        raise UserError(
            f"{where} does not match the model: {len(manifest.arrays)} arrays for {len(layout.logical)} of the model, "
            f"{' and '.join(wrong)}; restore with the model that wrote it"
        )
    for stored in layout.values():
        for part in stored.parts:
            found = _origins(part.name, origins)
            if origins is not None and part.name in origins:
                _check_origins(manifest, part, found, where)
            elif (shape := manifest.arrays[part.name].shape) != part.shape:
                raise UserError(
                    f"{where}: array {part.name!r} has shape {shape}, the model expects {part.shape}; "
                    "restore with the model that wrote it"
                )
            for dtype in {manifest.arrays[origin.name].dtype for origin in found}:
                if not (castable(dtype, stored.dtype) if cast else exact(dtype, stored.dtype)):
                    to = "use a float or integer dtype as it was" if cast else "ask for the cast or use that dtype"
                    raise UserError(
                        f"{where}: array {part.name!r} has dtype {dtype.name}, which does not go into "
                        f"{stored.dtype.name} without loss; {to}"
                    )


def check_width(layout: Layout) -> None:
    """Raise UserError for arrays of 64 bits where JAX would make 32 of them."""
    for key, stored in layout.items():
        if (found := jax.dtypes.canonicalize_dtype(stored.dtype)) != stored.dtype:
            raise UserError(
                f"array {key!r} is {stored.dtype.name}, of which JAX would make {found.name}, with other values: set "
                "JAX_ENABLE_X64=1 (jax_enable_x64), or give a layout of that dtype and ask for the cast"
            )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _check_origins(manifest: Manifest, part: Logical, origins: Sequence[Origin], where: str) -> None:
    """Raise UserError unless the origins fill the logical array, each element once."""
    boxes = []
    for origin in origins:
        shape = manifest.arrays[origin.name].shape
        order = tuple(range(len(shape))) if origin.order is None else origin.order
        start = (0,) * len(order) if origin.start is None else origin.start
        if sorted(order) != list(range(len(shape))) or len(start) != len(shape) or len(shape) != len(part.shape):
            raise UserError(
                f"{where}: array {origin.name!r} of shape {shape} cannot be an origin of {part.name!r} of shape "
                f"{part.shape} with order {origin.order} and start {origin.start}; give one number a dimension"
            )
        box = intersect(origin.box((0,) * len(shape), shape), ((0,) * len(part.shape), part.shape))
        boxes += [box] if box is not None else []
    filled = sum(math.prod(shape) for _, shape in boxes)
    twice = any(intersect(a, b) is not None for a, b in itertools.combinations(boxes, 2))
    if filled != math.prod(part.shape) or twice:
        what = "some twice" if twice else "and no more"
        raise UserError(
            f"{where}: the origins of array {part.name!r} ({_listed([o.name for o in origins])}) fill {filled} of its "
            f"{math.prod(part.shape)} elements, {what}; mend their starts and orders"
        )


def exact(source: np.dtype, target: np.dtype) -> bool:
    """Whether every value of ``source`` is a value of ``target``."""
    if source == target:
        return True
    if _is_float(target) and target.itemsize == 1:
        return False  # few of these casts are exact, and numpy calls more of them safe than are
    if np.can_cast(source, target, "safe"):
        return True
    # numpy knows of no safe casts between the ml_dtypes floats.
    if not (_is_float(source) and _is_float(target)):
        return False
    a, b = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return bool(
        a.nmant <= b.nmant
        and float(a.max) <= float(b.max)
        and float(a.smallest_subnormal) >= float(b.smallest_subnormal)
    )


def castable(source: np.dtype, target: np.dtype) -> bool:
    """Whether a cast is exact or only rounds: float to float, integer to integer."""
    return exact(source, target) or any(word in source.name and word in target.name for word in ("float", "int"))


def _is_float(dtype: np.dtype) -> bool:
    return "float" in dtype.name


def narrow(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``array`` in ``dtype``, rounded. Raises UserError, naming the array, if a finite value does not stay finite."""
    if exact(array.dtype, dtype):
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        out = array.astype(dtype)
    # Integers wrap, and some floats have no infinity: those are compared with the largest.
    info = ml_dtypes.finfo(dtype) if _is_float(dtype) else ml_dtypes.iinfo(dtype) if "int" in dtype.name else None
    beyond = np.isfinite(array) & ~np.isfinite(out)
    if info is not None and not (_is_float(dtype) and dtype.itemsize > 1):
        beyond |= (array > array.dtype.type(info.max)) | (array < array.dtype.type(info.min))
    if beyond.any():
        raise UserError(f"array {name!r} has values beyond {dtype.name}; use a dtype of wider range")
    return out


@dataclasses.dataclass(frozen=True)
class LoadMetrics:
    """Bytes of chunks that this process read, and those of them that its shards needed."""

    bytes_read: int
    bytes_needed: int


def load(
    reader: CheckpointReader,
    layout: Layout,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    partial: bool = False,
    cast: bool = False,
    origins: Origins | None = None,
) -> tuple[dict[str, jax.Array], LoadMetrics]:
    """Restore the arrays of ``layout`` into ``shardings`` (by stored key), whatever mesh and storage wrote them.

    Padding is filled with zeros. Each chunk that a shard of this process touches is read once and verified.
    partial: leave arrays that the layout does not name unread. cast: round to the layout's dtypes where they are
    narrower; otherwise only exact casts are made. origins: of arrays that the checkpoint has under another name, fused
    with others, in several, or transposed.
    Raises UserError if checkpoint and layout do not match or JAX would narrow 64 bits, CorruptError if a chunk is
    damaged, ValueError if a sharding is missing or shardings are no mapping.
    """
    if not isinstance(shardings, Mapping):
        raise ValueError(
            f"shardings: found a {type(shardings).__name__}, expected one for each key: dict.fromkeys(layout, sharding)"
        )
    check_width(layout)
    check_match(reader.manifest, layout, reader.where, partial=partial, cast=cast, origins=origins)
    if missing := layout.keys() - shardings.keys():
        raise ValueError(f"no shardings are given for {_listed(sorted(missing))}")
    arrays: dict[str, jax.Array] = {}
    metrics = LoadMetrics(0, 0)

    def found(stored: Stored) -> tuple[ArrayPlan, list[np.ndarray]]:
        boxes = distinct_boxes(stored.shape, shardings[stored.key])
        plan = plan_array(reader.manifest, stored, boxes, origins)
        return plan, fill(reader, plan)

    # Twice the threads: none is idle while another fills a larger array, before which its own cannot be taken.
    for plan, pieces in in_order(found, layout.values(), 2 * THREADS):
        arrays[plan.stored.key] = _placed(plan, pieces, shardings[plan.stored.key])
        metrics = LoadMetrics(metrics.bytes_read + plan.bytes_read, metrics.bytes_needed + plan.bytes_needed)
    return arrays, metrics


def _placed(plan: ArrayPlan, pieces: Sequence[np.ndarray], sharding: jax.sharding.Sharding) -> jax.Array:
    shape = plan.stored.shape
    by_box = {bounds_of(box, shape): piece for box, piece in zip(plan.pieces, pieces, strict=True)}
    return jax.make_array_from_callback(
        shape, sharding, lambda index: by_box[bounds_of(index, shape)], dtype=plan.stored.dtype
    )


def fill(reader: CheckpointReader, plan: ArrayPlan) -> list[np.ndarray]:
    """Carry out a plan: the host pieces, in the stored dtype, zero where padded."""
    dtype, shapes = plan.stored.dtype, [_shape(index, plan.stored) for index in plan.pieces]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    starts = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    # In one allocation, as a large one gets larger pages. JAX on CPU takes what is aligned as it is: the first program
    # that is to donate one makes the copy instead.
    memory = aligned(starts[-1])
    parts = zip(starts, sizes, shapes, strict=False)
    pieces = [memory[at : at + size].view(dtype).reshape(shape) for at, size, shape in parts]
    room = reader.room(read.chunk for read in plan.reads)
    for read in plan.reads:
        chunk, source = read.chunk, reader.manifest.arrays[read.name].dtype
        grid = chunk.grid or (1,) * len(chunk.shape)
        raw = reader.read_packed(read.name, chunk, read.cells, room)
        data: np.ndarray | None = None
        for move in read.moves:
            target = pieces[move.piece][(*move.target, ...)]  # a view, of a scalar too
            if source == dtype and move.order is None and unpack_into(target, raw, chunk.shape, grid, move.source):
                continue
            data = unpack(raw, chunk.shape, source, grid) if data is None else data
            part = data[move.source] if move.order is None else data[move.source].transpose(move.order)
            pieces[move.piece][move.target] = narrow(part, dtype, read.name)
    return pieces


def write(
    dst_dir: str | os.PathLike[str],
    step: int,
    meta: Mapping[str, Any],
    specs: Collection[Logical],
    pieces: Iterable[Piece],
    chunk_bytes: int = CHUNK_BYTES,
) -> Path:
    """Write ``pieces``, which cover the logical arrays ``specs``, as the new checkpoint directory ``dst_dir``.

    Holds one piece at a time; the result is verified before it gets its name, and after an error nothing is left.
    Raises UserError if ``dst_dir`` exists or is in an object store, and when the disk refuses.
    """
    dst = place_of(dst_dir)
    if not isinstance(dst, Path):
        raise UserError(f"{dst} is in an object store, expected a directory: copy it there (jaxsys checkpoint copy)")
    with new_directory(dst, sum(spec.nbytes for spec in specs)) as draft:
        with ChunkWriter(lambda name: durable(draft / name), lambda number: data_file(0)) as writer:
            for block in blocks_of(pieces, chunk_bytes):
                writer.add(block)
        with durable(draft / MANIFEST) as file:
            file.write(manifest_of(step, meta, specs, writer.chunks).encode())
        report = CheckpointReader(LocalFiles(draft)).verify()
        if not report.ok:
            raise UserError(f"{dst} did not verify after writing: {report.errors[0]}; check the disk")
    return dst
