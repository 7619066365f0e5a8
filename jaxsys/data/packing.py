"""Documents packed into rows of fixed length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Keys tokens, targets, positions, segments: int32 [rows, T].
Batch = dict[str, np.ndarray]

NO_TARGET = -1


def pack(documents: Iterable[np.ndarray], seq_len: int, start: int = 0, rows: int | None = None) -> Batch:
    """Lay ``documents`` end to end and cut the sequence into rows of ``seq_len`` (T).

    documents: integer arrays [n], taken only as far as needed.
    start: where in the sequence the first row begins; rows: how many (None: to the end of the documents).

    Returns int32 [rows, T] each:
      tokens     0 where padded;
      targets    the next token of the same document, also where that lies in the next row; NO_TARGET at the end of a
                 document and where padded. So each token but a document's first is a target exactly once;
      segments   1, 2, ... by document within the row, 0 where padded;
      positions  0, 1, ... within the segment. They restart where a document is cut by the end of a row, because
                 attention does not cross rows.
    Only the end of the last rows is padded.
    """
    stop = None if rows is None else start + rows * seq_len
    pieces: list[np.ndarray] = []
    after = NO_TARGET
    at = 0
    for document in documents:
        low = max(start - at, 0)
        high = len(document) if stop is None else min(len(document), stop - at)
        if low < high:
            pieces.append(document[low:high])
            after = int(document[high]) if high < len(document) else NO_TARGET
        at += len(document)
        if stop is not None and at >= stop:
            break
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    ends = np.cumsum(lengths)
    n = int(ends[-1]) if pieces else 0
    if rows is None:
        rows = -(-n // seq_len)

    tokens = np.zeros(rows * seq_len, np.int32)
    targets = np.full(rows * seq_len, NO_TARGET, np.int32)
    begins = np.zeros((rows, seq_len), bool)
    if pieces:
        np.concatenate(pieces, out=tokens[:n], casting="unsafe")
        targets[: n - 1] = tokens[1:n]
        targets[ends - 1] = NO_TARGET
        targets[n - 1] = after
        begins.reshape(-1)[ends - lengths] = True
    begins[:, :1] = True
    column = np.arange(seq_len, dtype=np.int32)
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    segments.reshape(-1)[n:] = 0
    positions.reshape(-1)[n:] = 0
    shape = (rows, seq_len)
    return {
        "tokens": tokens.reshape(shape),
        "targets": targets.reshape(shape),
        "positions": positions.astype(np.int32),
        "segments": segments,
    }
