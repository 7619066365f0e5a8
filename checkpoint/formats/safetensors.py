"""safetensors files in the layout of Hugging Face model directories: read in place, written as a stream.

The format: https://huggingface.co/docs/safetensors. A file is an 8-byte little-endian header length, a JSON header
(padded with spaces) and the arrays, each one byte range. Files are read here through a memory map, because the
library's numpy interface knows no float8 and its writer wants all arrays at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import struct
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoint.header import ArrayHeader, Headers, check_disjoint, check_shape, is_file_name, unique
from parallelism.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The header comes before data whose amount is unknown while it streams, so its room is reserved; a header that
# outgrows the room closes the shard.
_HEADER_ROOM = 256 * 1024


@dataclasses.dataclass(frozen=True)
class ArrayInfo(ArrayHeader):
    """One array: its shape, dtype, file, and its first byte there."""

    file: Path
    start: int


class SafetensorsDir(Headers[ArrayInfo]):
    """The arrays of a ``.safetensors`` file, or of a directory with a single file or a sharded index.

    Maps each name to its ArrayInfo; only headers are read until ``read``. metadata: of the first file's header. Raises
    UserError if a file is missing, truncated or damaged, if the index and the files disagree, and if two files hold one
    name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        index = self.path / INDEX
        listed: dict[str, str] = {}
        if self.path.is_file():
            files = [self.path]
        elif (self.path / SINGLE).is_file():
            files = [self.path / SINGLE]
        elif index.is_file():
            listed = _weight_map(index)
            files = [self.path / name for name in sorted(set(listed.values()))]
        else:
            raise UserError(f"{self.path}: no safetensors weights: neither {SINGLE} nor {INDEX} is there")
        self._arrays: dict[str, ArrayInfo] = {}
        self.files = files
        self.metadata: Any = None
        for file in files:
            if not file.is_file():
                raise UserError(f"{index}: names {file.name}, which is not there; fetch the missing file")
            arrays, metadata = _read_header(file)
            self.metadata = self.metadata or metadata
            for name, info in arrays.items():
                if name in self._arrays:
                    raise UserError(f"{self.path}: array {name!r} is in {self._arrays[name].file.name} and {file.name}")
                self._arrays[name] = info
        for name, shard in listed.items():
            if name not in self._arrays or self._arrays[name].file.name != shard:
                raise UserError(f"{index}: array {name!r} is not in {shard}, where the index has it")

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
        """A new array in its own dtype: all of ``name``, or what ``box`` (one slice a dimension) selects.

        Safe to use from several threads.
        """
        info = self._arrays.get(name)
        if info is None:
            raise UserError(f"{self.path}: no array {name!r} among the {len(self)} there")
        # Mapped for this read alone: what a mapping has read counts as memory of the process as long as it is there.
        raw = np.memmap(info.file, np.uint8, "r", info.start, info.nbytes) if info.nbytes else None
        array = np.ndarray(info.shape, info.dtype, buffer=raw)
        return np.array(array if box is None else array[box], order="C")


def _read_header(path: Path) -> tuple[dict[str, ArrayInfo], Any]:
    """The arrays of a file, and its metadata."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= size - 8:
                raise UserError(
                    f"{path}: truncated safetensors file, or none: {size} bytes hold no header; fetch it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}, expected an object")
        metadata = header.pop("__metadata__", None)
        arrays = {name: _array_info(path, name, entry, 8 + length) for name, entry in header.items()}
        check_disjoint({name: (info.start, info.start + info.nbytes) for name, info in arrays.items()})
    except OSError as error:
        raise UserError(f"{path}: cannot read the safetensors file ({error.strerror})") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged safetensors header ({error}); fetch the file again") from error
    last = max(arrays.items(), key=lambda item: item[1].start + item[1].nbytes, default=None)
    if last is not None and (end := last[1].start + last[1].nbytes) > size:
        raise UserError(
            f"{path}: truncated safetensors file: array {last[0]!r} ends at byte {end}, the file at {size}; "
            "fetch it again"
        )
    return arrays, metadata


def _array_info(path: Path, name: str, entry: Any, base: int) -> ArrayInfo:
    """One entry of a header; ``base`` is where the arrays begin. Raises ValueError for one that makes no sense."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        raise ValueError(f"array {name!r} lacks one of {', '.join(keys)}")
    code, shape, offsets = (entry[key] for key in keys)
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(f"{path}: array {name!r} has dtype {code!r:.80}, supported are {', '.join(DTYPES)}")
    check_shape(name, shape, DTYPES[code].itemsize)
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int] or not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"array {name!r} lies at {offsets!r:.80}, expected a start and an end in bytes")
    info = ArrayInfo(tuple(shape), DTYPES[code], path, base + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(f"array {name!r} of shape {shape} and dtype {code} has {offsets[1] - offsets[0]} bytes")
    return info


def _weight_map(index: Path) -> dict[str, str]:
    try:
        listed = dict(json.loads(index.read_bytes(), object_pairs_hook=unique)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: damaged index, no readable 'weight_map'; fetch the file again") from error
    if not listed:
        raise UserError(f"{index}: the index lists no arrays; fetch the file again")
    for name, file in listed.items():
        if not is_file_name(file):
            raise UserError(f"{index}: array {name!r} is in {file!r:.80}, expected the name of a file beside the index")
    return listed


def write_safetensors(
    directory: str | os.PathLike[str],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``arrays`` as ``model.safetensors``, or as shards with an index once they pass ``max_shard_bytes``.

    Holds one array at a time in memory. Files appear under their names only when all are complete, the index last;
    after an error or an interrupt none is left. ``metadata`` goes into each header, beside ``{"format": "pt"}``, by
    which transformers accepts the file. Returns the weight files written, in order.

    Raises UserError if the directory holds weights already, for a name given twice, a dtype outside DTYPES, and when
    the file system refuses (a full disk, no permission).
    """
    directory = Path(directory)
    taken = sorted(p.name for p in directory.glob("*.safetensors")) + [INDEX] * (directory / INDEX).exists()
    if taken:
        raise UserError(f"{directory}: holds weights already ({taken[0]}); choose another directory or remove them")
    tag = uuid.uuid4().hex[:8]
    shards: list[_Shard] = []
    shard_of: dict[str, int] = {}
    index_temporary = directory / f".{INDEX}.{tag}"
    finals: list[Path] = []
    complete = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, array in arrays:
            if name in shard_of:
                raise UserError(f"{directory}: array {name!r} is given twice")
            if array.dtype not in CODES:
                raise UserError(f"{directory}: array {name!r} has dtype {array.dtype}, safetensors has no such type")
            if not shards or not shards[-1].has_room(name, array, max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(directory / f".shard-{len(shards)}.{tag}", metadata))
            shards[-1].add(name, array)
            shard_of[name] = len(shards) - 1
        if not shards:
            shards.append(_Shard(directory / f".shard-0.{tag}", metadata))
        shards[-1].close()
        count = len(shards)
        finals = [directory / (SINGLE if count == 1 else shard_name(i, count)) for i in range(count)]
        if count > 1:
            total = sum(shard.nbytes for shard in shards)
            weight_map = {name: finals[i].name for name, i in shard_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            index_temporary.write_text(json.dumps(index, indent=2) + "\n")
        for shard, final in zip(shards, finals, strict=True):
            shard.path.rename(final)
        if count > 1:
            index_temporary.rename(directory / INDEX)
        complete = True
        return finals
    except OSError as error:
        raise UserError(f"{directory}: cannot write the weights ({error.strerror})") from error
    finally:
        for shard in shards:
            shard.discard()
        for path in [index_temporary, *([] if complete else finals)]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05}-of-{count:05}.safetensors"


class _Shard:
    """One file being written: arrays at the end as they come, the header into its reserved room on ``close``."""

    def __init__(self, path: Path, metadata: Mapping[str, str] | None):
        self.path = path
        self.nbytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        self._header_bytes = len(json.dumps(self._header))
        self._file = open(path, "xb")  # noqa: SIM115 - closed by close() or discard()
        self._file.seek(8 + _HEADER_ROOM)

    def _entry(self, array: np.ndarray) -> dict[str, Any]:
        offsets = [self.nbytes, self.nbytes + array.nbytes]
        return {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}

    def has_room(self, name: str, array: np.ndarray, max_bytes: int) -> bool:
        entry = len(json.dumps({name: self._entry(array)}))
        return self.nbytes + array.nbytes <= max_bytes and self._header_bytes + entry <= _HEADER_ROOM

    def add(self, name: str, array: np.ndarray) -> None:
        self._header[name] = self._entry(array)
        self._header_bytes += len(json.dumps({name: self._header[name]}))
        if array.nbytes:
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.nbytes += array.nbytes

    def close(self) -> None:
        self._file.seek(0)
        header = json.dumps(self._header).encode()
        self._file.write(struct.pack("<Q", _HEADER_ROOM) + header.ljust(_HEADER_ROOM))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
