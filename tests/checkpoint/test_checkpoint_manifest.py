"""The format: encoding, damage, and cutting boxes into chunks."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import Level, Manager
from checkpoint.manifest import DTYPES, Array, Chunk, CorruptError, Manifest, digest, split
from parallelism.errors import UserError

CHUNK = Chunk((0, 0), (2, 3), "data-00000.bin", 0, 12, "0" * 32)
MANIFEST = Manifest(
    7, {"config": {"lr": 0.1}, "text": "é"}, {"a": Array(DTYPES["bfloat16"], (2, 3), ("x", None), (CHUNK,))}
)


def redigest(body):
    """Encode a changed body with a right digest, as another version of the program would."""
    head = json.dumps({k: v for k, v in body.items() if k != "digest"}).encode()[:-1]
    return head + f'\n,"digest":"{digest(head)}"}}\n'.encode()


def test_manifest_round_trips():
    assert Manifest.decode(MANIFEST.encode(), "m") == MANIFEST


def test_manifest_is_plain_json():
    body = json.loads(MANIFEST.encode())
    assert body["arrays"]["a"]["dtype"] == "bfloat16"
    assert body["meta"] == {"config": {"lr": 0.1}, "text": "é"}


def test_every_flipped_bit_of_a_manifest_is_found():
    data = MANIFEST.encode()
    for position in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[position] ^= 1 << bit
            with pytest.raises(CorruptError):
                Manifest.decode(bytes(bad), "m")


def test_every_truncation_of_a_manifest_is_found():
    data = MANIFEST.encode()
    for n in range(len(data)):
        with pytest.raises(CorruptError):
            Manifest.decode(data[:n], "m")


def test_newer_version_says_upgrade():
    with pytest.raises(UserError, match=r"version 9, newer than 1.*upgrade") as e:
        Manifest.decode(redigest({**json.loads(MANIFEST.encode()), "version": 9}), "m")
    assert not isinstance(e.value, CorruptError)


def test_foreign_format_is_refused():
    with pytest.raises(UserError, match="'other'"):
        Manifest.decode(redigest({**json.loads(MANIFEST.encode()), "format": "other"}), "m")


@pytest.mark.parametrize("change", [{"chunks": []}, {"shape": [2, 2]}, {"dtype": "float32"}])
def test_chunks_that_do_not_fill_the_array_are_found(change):
    body = json.loads(MANIFEST.encode())
    body["arrays"]["a"] |= change
    with pytest.raises(CorruptError, match="'a'"):
        Manifest.decode(redigest(body), "m")


def test_meta_that_is_not_json_is_refused():
    with pytest.raises(ValueError):
        Manifest(1, {"loss": math.nan}, {}).encode()


def test_dtypes_are_known_by_their_numpy_names():
    assert DTYPES["bfloat16"] == ml_dtypes.bfloat16
    assert all(dtype.name == name for name, dtype in DTYPES.items())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([1, 2, 4]), st.integers(1, 200))
def test_split_cuts_row_major_bytes_into_runs_within_the_limit(shape, itemsize, limit):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    parts = [
        numbers[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].ravel()
        for start, size in split(tuple(shape), itemsize, limit)
    ]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, int), *parts]), numbers.ravel())
    assert all(0 < part.size * itemsize <= max(limit, itemsize) for part in parts)


def test_the_reader_in_the_format_document_reads_what_is_saved(tmp_path, h):
    text = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    scope = {}
    exec(text.split("```python")[1].split("```")[0], scope)
    state = h.make_state()
    with Manager([Level("disk", tmp_path)], chunk_bytes=40) as manager:
        manager.save(1, state.arrays, state.layout, {}).wait()
    h.assert_same({name: scope["read"](tmp_path / "step-00000001", name) for name in state.logical}, state.logical)
