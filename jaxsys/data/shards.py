"""Tokenised text on disk: memory-mapped shards with document boundaries, made once and reused.

A dataset directory holds
  tokens-00000.bin ...  token ids, little-endian uint16 or uint32 by the size of the vocabulary, documents end to end;
                        no document spans two files
  offsets.npy           int64 [documents + 1], where each document begins in the sequence of all tokens
  hashes.npy            uint64 [documents], xxh3 of each document's UTF-8 text
  names.json            the documents' names
  index.json            source, tokenizer, counts, and every file's bytes and digest; written last
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from jaxsys.data.sources import Document, Documents
from jaxsys.tokenizer import Tokenizer
from parallelism.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 2**30

# Text handed to the tokenizer at once, in characters: enough to keep all cores busy.
_BATCH_CHARACTERS = 2**20

_REDO = "build_dataset makes it again"

# (bytes of text done, bytes of text in all, tokens written)
Progress = Callable[[int, int, int], None]


class Dataset:
    """A dataset directory, opened: every file is read once and compared with its digest.

    tokens, documents: how many. offsets, hashes: as in the directory. fingerprint: digest of all contents.
    Raises UserError naming the file that is missing, truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self.index: dict[str, Any] = json.loads((self.path / "index.json").read_bytes())
            if self.index["format"] != FORMAT:
                raise UserError(f"{self.path}: dataset format {self.index['format']} found, {FORMAT} expected; {_REDO}")
            files, shards = self.index["files"], self.index["shards"]
            self.source: str = self.index["source"]
            self.documents: int = self.index["documents"]
            self.tokens: int = self.index["tokens"]
            dtype = np.dtype(self.index["dtype"])
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no dataset there (index.json is missing)") from error
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path / 'index.json'}: damaged dataset index; {_REDO}") from error
        for name, entry in files.items():
            if damage := _damage(self.path / name, entry):
                raise UserError(f"{self.path / name}: dataset file {damage}; {_REDO}")
        self.offsets: np.ndarray = np.load(self.path / "offsets.npy", mmap_mode="r")
        self.hashes: np.ndarray = np.load(self.path / "hashes.npy", mmap_mode="r")
        # numpy maps no empty file; a shard has at least one document, which may have no tokens.
        self._shards = [
            np.memmap(self.path / s["file"], dtype, "r") if s["tokens"] else np.empty(0, dtype) for s in shards
        ]
        self._ends = np.cumsum([s["documents"] for s in shards])
        self.fingerprint = xxhash.xxh3_128_hexdigest("".join(f["digest"] for f in files.values()).encode())

    @functools.cached_property
    def names(self) -> list[str]:
        return json.loads((self.path / "names.json").read_bytes())

    def document(self, i: int) -> np.ndarray:
        """The tokens of document ``i``: a view [n] of the memory map."""
        shard = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        base = int(self.offsets[first])
        return self._shards[shard][int(self.offsets[i]) - base : int(self.offsets[i + 1]) - base]


def build_dataset(
    documents: Documents,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Dataset:
    """Tokenise ``documents`` into a directory under ``cache_dir``, or open the one made before.

    It is reused when the source's files (names, sizes, times), the tokenizer and the limit are the same. Each
    document is encoded as the tokenizer begins texts (with its bos token or not) and ends with its eos token, if it
    has one. The directory appears under its name only when complete; an error or an interrupt leaves nothing. One that
    is damaged is made again, with a warning that names the file.

    Raises UserError for a source without documents, as ``documents`` does, and when the disk refuses.
    """
    cache_dir = Path(cache_dir)
    key = xxhash.xxh3_64_hexdigest(f"{FORMAT} {documents.fingerprint} {tokenizer.fingerprint} {shard_bytes}".encode())
    slug = re.sub(r"[^A-Za-z0-9]+", "-", documents.spec)[-40:].strip("-")
    final = cache_dir / f"{slug}-{key}"
    temporary = cache_dir / f".{final.name}.{uuid.uuid4().hex[:8]}"
    damaged = temporary.with_suffix(".damaged")
    try:
        if final.is_dir():
            try:
                return Dataset(final)
            except UserError as error:
                logger.warning("%s", error)
            # Aside in one step: another process may have it open, or be doing the same.
            with contextlib.suppress(FileNotFoundError):
                final.rename(damaged)
        temporary.mkdir(parents=True)
        _write(temporary, documents, tokenizer, progress, shard_bytes)
        try:
            temporary.rename(final)
        except OSError:
            # Another process made the same one meanwhile.
            if not final.is_dir():
                raise
    except OSError as error:
        raise UserError(f"{cache_dir}: cannot write the dataset ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
    return Dataset(final)


def _write(
    directory: Path, documents: Documents, tokenizer: Tokenizer, progress: Progress | None, shard_bytes: int
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    names: list[str] = []
    hashes: list[int] = []
    offsets = [0]
    shards: list[dict[str, Any]] = []
    file: BinaryIO | None = None
    done = 0
    try:
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                raw = np.array(ids + end, dtype).tobytes()
                if file is None or (file.tell() and file.tell() + len(raw) > shard_bytes):
                    if file is not None:
                        file.close()
                    shards.append({"file": f"tokens-{len(shards):05}.bin", "documents": 0, "tokens": 0})
                    file = open(directory / shards[-1]["file"], "xb")  # noqa: SIM115 - closed below
                file.write(raw)
                count = len(raw) // dtype.itemsize
                shards[-1]["documents"] += 1
                shards[-1]["tokens"] += count
                offsets.append(offsets[-1] + count)
                text = document.text.encode()
                names.append(document.name)
                hashes.append(xxhash.xxh3_64_intdigest(text))
                done += len(text)
            if progress is not None:
                progress(min(done, documents.total_bytes), documents.total_bytes, offsets[-1])
    finally:
        if file is not None:
            file.close()
    if not names:
        raise UserError(f"data {documents.spec!r}: the source has no documents")
    np.save(directory / "offsets.npy", np.array(offsets, np.int64))
    np.save(directory / "hashes.npy", np.array(hashes, np.uint64))
    (directory / "names.json").write_text(json.dumps(names))
    files = {path.name: {"bytes": path.stat().st_size, "digest": _digest(path)} for path in sorted(directory.iterdir())}
    index = {
        "format": FORMAT,
        "source": documents.spec,
        "limit": documents.limit,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype.str,
        "documents": len(names),
        "tokens": offsets[-1],
        "shards": shards,
        "files": files,
    }
    (directory / "index.json").write_text(json.dumps(index, indent=1))
    if progress is not None:
        progress(documents.total_bytes, documents.total_bytes, offsets[-1])


def _batches(documents: Documents) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _damage(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of which the index says ``entry``."""
    if not path.is_file():
        return "is missing"
    if (found := path.stat().st_size) != entry["bytes"]:
        return f"has {found} bytes, {entry['bytes']} expected"
    return None if _digest(path) == entry["digest"] else "is damaged (its digest differs)"


def _digest(path: Path) -> str:
    state = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            state.update(block)
    return state.hexdigest()
