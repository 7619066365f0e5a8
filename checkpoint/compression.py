"""Chunks as zstd frames, where a level asks for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from parallelism.errors import UserError

WORTH = 0.95
"""A frame that is larger than this part of its chunk is not kept: the chunk is written as it is."""


def compressed(raw: np.ndarray, table: bytes, level: int) -> bytes | None:
    """A chunk and its table of digests as one frame; None where that saves next to nothing."""
    library = _library()
    frame = library.ZstdCompressor(level).compress(b"".join([raw.data, table]) if table else raw.data)
    return frame if len(frame) <= WORTH * (len(raw) + len(table)) else None


def decompress(frame: np.ndarray, into: np.ndarray) -> str | None:
    """Fill ``into`` from a frame; return what is wrong with it, if anything is."""
    library = _library()
    try:
        data = library.ZstdDecompressor().decompress(frame.data, max_output_size=len(into))
    except library.ZstdError as error:
        return str(error)
    if len(data) != len(into):
        return f"{len(data)} bytes in it, expected {len(into)}"
    into[:] = np.frombuffer(data, np.uint8)
    return None


def _library() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("a compressed checkpoint needs the package zstandard: pip install 'jaxsys[zstd]'") from error
    return zstandard
