"""The checkpoint format, version 2: what ``manifest.json`` says (docs/checkpoint-format.md).

A manifest names logical arrays and the chunks that hold their bytes. It knows no mesh, no process
and no way of storing layers: a chunk is a box of a global logical array.
"""

from __future__ import annotations

import dataclasses
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from checkpoint.cells import DIGEST_BYTES, PARTS, Grid
from checkpoint.header import check_shape, is_file_name
from parallelism.errors import UserError

FORMAT = "jaxsys-checkpoint"
VERSION = 2  # of 1, chunks have no grid; all else is the same
MANIFEST = "manifest.json"
CHUNK_BYTES = 16 << 20

_TAIL = re.compile(rb'\n,"digest":"([0-9a-f]{32})"\}\n')
_DIGEST = re.compile(r"[0-9a-f]{32}")
_OTHER_STEP = re.compile(r"\.\./step-\d{8,}/")
_TAIL_BYTES = len('\n,"digest":""}\n') + 32

_NUMPY = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
_ML_DTYPES = (
    "bfloat16 float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu float4_e2m1fn int2 int4 uint2 uint4"
)
DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _NUMPY.split()} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_DTYPES.split() if hasattr(ml_dtypes, name)
}


class CorruptError(UserError):
    """Bytes of a checkpoint are missing or are not what was written."""


def without_advice(message: str) -> str:
    """What was wrong, of a message about a chunk that is good by now."""
    return message.removesuffix("; use another checkpoint")


def digest(data: Any) -> str:
    """xxh3_128 of a buffer, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of one global array (start and shape in elements) and the bytes of a file that hold it.

    grid: parts along each axis. Where there is one, the file has the elements cell by cell and after them a table of
    the cells' digests (``checkpoint.cells``), and ``digest`` is the table's; else it is that of the bytes.
    zstd: bytes and digest of the frame that the file has in place of all that, if it is compressed.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    digest: str
    grid: Grid | None = None
    zstd: tuple[int, str] | None = None

    def holds(self, digest: str, grid: Grid | None) -> bool:
        """Whether it is of these bytes, cell by cell."""
        return (self.digest, self.grid) == (digest, grid)

    @property
    def whole_bytes(self) -> int:
        """Of it and its table, if it has one."""
        return self.nbytes + (DIGEST_BYTES * math.prod(self.grid) if self.grid else 0)

    @property
    def stored_bytes(self) -> int:
        """What it takes in its file."""
        return self.whole_bytes if self.zstd is None else self.zstd[0]

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Array:
    """One logical array: its dtype, global shape, an axis name (or None) a dimension, and its chunks."""

    dtype: np.dtype
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: the step, free JSON ``meta``, and the arrays by logical name."""

    step: int
    meta: Mapping[str, Any]
    arrays: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def encode(self) -> bytes:
        """The bytes of ``manifest.json``. Raises TypeError or ValueError if ``meta`` is not JSON."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "meta": self.meta,
            "arrays": {
                name: {
                    "dtype": array.dtype.name,
                    "shape": array.shape,
                    "axes": array.axes,
                    "chunks": [chunk.to_json() for chunk in array.chunks],
                }
                for name, array in self.arrays.items()
            },
        }
        head = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()[:-1]
        return head + f'\n,"digest":"{digest(head)}"}}\n'.encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """Read and check the bytes of a manifest; ``where`` names it in errors.

        Raises CorruptError if the bytes are not what was written, UserError if this program cannot read them.
        """
        check_digest(data, where)
        try:
            return cls._from_body(json.loads(data, parse_float=_finite, parse_constant=_finite), where)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise CorruptError(f"{where} makes no sense ({type(e).__name__}: {e}); use another checkpoint") from e

    @classmethod
    def _from_body(cls, body: Mapping[str, Any], where: str) -> Manifest:
        if body.get("format") != FORMAT:
            raise UserError(f"{where} has format {body.get('format')!r}, expected {FORMAT!r}; is it another program's?")
        if body["version"] > VERSION:
            raise UserError(
                f"{where} has format version {body['version']}, newer than {VERSION}, the newest this program reads; "
                "upgrade the program"
            )
        if type(body["step"]) is not int or body["step"] < 0:
            raise TypeError(f"step {body['step']!r:.80}")
        arrays = {name: _decode_array(name, entry, where) for name, entry in body["arrays"].items()}
        return cls(body["step"], body["meta"], arrays)


def check_digest(data: bytes, where: str) -> None:
    """Raise CorruptError unless the bytes of a manifest are what was written."""
    head, tail = data[:-_TAIL_BYTES], _TAIL.fullmatch(data[-_TAIL_BYTES:])
    if tail is None:
        raise CorruptError(
            f"{where} is truncated or not a {FORMAT} manifest: it does not end in a digest; use another checkpoint"
        )
    if digest(head) != tail[1].decode():
        raise CorruptError(
            f"{where} is damaged: digest {digest(head)}, expected {tail[1].decode()}; use another checkpoint"
        )


def chunk_from_json(c: Mapping[str, Any]) -> Chunk:
    grid = tuple(c["grid"]) if "grid" in c else None
    place = c["file"], c["offset"], c["nbytes"]
    frame, frame_digest = c.get("zstd") or (0, "")
    zstd = (frame, frame_digest) if "zstd" in c else None
    chunk = Chunk(tuple(c["start"]), tuple(c["shape"]), *place, c["digest"], grid, zstd)
    numbers = (*chunk.start, *chunk.shape, chunk.offset, chunk.nbytes, *(grid or ()), frame)
    # Sums of three of them are offsets of 63 bits, too.
    if any(type(n) is not int or not 0 <= n < 2**61 for n in numbers):
        raise TypeError(f"a chunk has numbers that are not integers from 0 to 2**61: {c!r:.200}")
    if any(type(d) is not str or not _DIGEST.fullmatch(d) for d in (chunk.digest, *(zstd or ())[1:])):
        raise TypeError(f"a chunk has a digest that is not 32 hexadecimal digits: {c!r:.200}")
    return chunk


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.20} is not finite")
    return number


def _decode_array(name: str, entry: dict[str, Any], where: str) -> Array:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{where}: array {name!r} has dtype {entry['dtype']!r}, which is not known here; upgrade")
    check_shape(name, entry["shape"], DTYPES[entry["dtype"]].itemsize)
    if not all(isinstance(axis, str | None) for axis in entry["axes"]):
        raise TypeError(f"array {name!r} has the axes {entry['axes']!r:.80}")
    chunks = tuple(chunk_from_json(c) for c in entry["chunks"])
    array = Array(DTYPES[entry["dtype"]], tuple(entry["shape"]), tuple(entry["axes"]), chunks)
    check_coverage(name, array, where)
    return array


def is_chunk_file(file: Any) -> bool:
    """Whether a chunk may lie there: in a file beside the manifest, or beside that of another step of the same run."""
    if not isinstance(file, str):
        return False
    other = _OTHER_STEP.match(file)
    return is_file_name(file[other.end() :] if other else file)


def resolved(directory: str, file: str) -> tuple[str, str]:
    """The directory and name of what a chunk of a step in ``directory`` calls its file."""
    there, name = posixpath.split(posixpath.normpath(f"{directory}/{file}"))
    return there, name


def called(directory: str, there: str, name: str) -> str:
    """What a step in ``directory`` calls the file ``name`` in the directory ``there``: the inverse of ``resolved``."""
    return name if there == directory else f"../{there}/{name}"


def check_coverage(name: str, array: Array, where: str) -> None:
    """Raise CorruptError unless the chunks lie beside the manifest and hold every element of the array exactly once."""
    for chunk in array.chunks:
        if not is_chunk_file(chunk.file):
            raise CorruptError(
                f"{where}: array {name!r} has a chunk in {chunk.file!r}, not the name of a file beside the manifest or "
                "of another step; do not use this checkpoint"
            )
        inside = len(chunk.start) == len(chunk.shape) == len(array.shape) and all(
            lo >= 0 and n >= 1 and lo + n <= whole
            for lo, n, whole in zip(chunk.start, chunk.shape, array.shape, strict=True)
        )
        if chunk.grid is not None:
            inside &= len(chunk.grid) == len(chunk.shape) and all(
                g >= 1 and n % g == 0 for g, n in zip(chunk.grid, chunk.shape, strict=True)
            )
        if not inside or chunk.offset < 0 or chunk.nbytes != math.prod(chunk.shape) * array.dtype.itemsize:
            raise CorruptError(
                f"{where}: array {name!r} of shape {array.shape} has a chunk at {chunk.start} of shape {chunk.shape}"
                f"{f', grid {chunk.grid}' if chunk.grid else ''} and {chunk.nbytes} bytes, which does not fit; "
                "use another checkpoint"
            )
    elements = sum(math.prod(chunk.shape) for chunk in array.chunks)
    if elements != math.prod(array.shape):
        raise CorruptError(
            f"{where}: chunks of array {name!r} hold {elements} elements, expected {math.prod(array.shape)}; "
            "use another checkpoint"
        )
    if (pair := _overlap(array.chunks)) is not None:
        raise CorruptError(
            f"{where}: chunks of array {name!r} at {pair[0].start} and {pair[1].start} overlap; use another checkpoint"
        )


def _overlap(chunks: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two chunks that share an element, if there are any. All are not empty, and of one rank."""
    if len(chunks) < 2:
        return None
    start = np.array([c.start for c in chunks], np.int64)
    stop = start + np.array([c.shape for c in chunks], np.int64)
    # Sorted along the axis that is cut most often: a chunk meets only those that begin before it ends there.
    axis = max(range(start.shape[1]), key=lambda d: len(np.unique(start[:, d])))
    order = np.argsort(start[:, axis], kind="stable")
    start, stop = start[order], stop[order]
    rows = 256  # at once: [rows, chunks] truths in memory
    for first in range(0, len(chunks), rows):
        block = slice(first, first + rows)
        meets = slice(first, int(np.searchsorted(start[:, axis], stop[block, axis].max())))
        shared = (start[block, None] < stop[None, meets]) & (start[None, meets] < stop[block, None])
        one, other = np.nonzero(shared.all(-1))
        if (apart := one != other).any():
            i, j = one[apart][0], other[apart][0]
            return chunks[order[first + i]], chunks[order[first + j]]
    return None


def split(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box along its first axes into (start, shape) boxes of at most ``limit`` bytes, in row-major order.

    Each is contiguous in the row-major bytes of the whole. A single element is never cut; an empty box has none.
    """
    if 0 in shape:
        return
    axis, inner = 0, math.prod(shape) * itemsize
    while axis < len(shape) and inner > limit:
        inner //= shape[axis]
        axis += 1
    if axis == 0:
        yield (0,) * len(shape), shape
        return
    # Axes before ``axis - 1`` are cut into single rows, ``axis - 1`` into runs of rows, the rest stay whole.
    cut, rows = axis - 1, max(1, limit // inner)
    rows = _even_rows(shape[cut], rows)
    rest = shape[axis:]
    for outer in np.ndindex(*shape[:cut]):
        for row in range(0, shape[cut], rows):
            run = min(rows, shape[cut] - row)
            yield (*outer, row, *(0,) * len(rest)), (*(1,) * cut, run, *rest)


def _even_rows(length: int, most: int) -> int:
    """How many rows a run has, so that all runs are alike: at most ``most``, and not below half of that for it."""
    fewest = -(-length // most)
    parts = next((n for n in range(fewest, min(2 * fewest, length) + 1) if length % n == 0), None)
    return length // parts if parts else (most // PARTS * PARTS or most)
