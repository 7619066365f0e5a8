"""Tokenised datasets on disk: contents, reuse, damage, interrupts."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

from jaxsys.data import Dataset, build_dataset, documents
from parallelism.errors import UserError
from tests.jaxsys.data.conftest import byte_tokenizer


class Counting:
    """A tokenizer that counts what it is asked to encode."""

    def __init__(self, tokenizer):
        self._tokenizer, self.encoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts, add_bos=None):
        self.encoded += len(texts)
        return self._tokenizer.encode_batch(texts, add_bos)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.txt").write_text(f"document {i} é" * (i + 1))
    return folder


def expected(folder, tokenizer):
    return [[*tokenizer.encode(p.read_text()), *tokenizer.eos_ids] for p in sorted(folder.iterdir())]


@pytest.mark.parametrize("shard_bytes", [1, 200, 2**30])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4")])
def test_documents_come_back_as_encoded_with_eos(tmp_path, text, shard_bytes, vocab_size, dtype):
    tokenizer = byte_tokenizer(vocab_size=vocab_size)
    dataset = build_dataset(documents(str(text)), tokenizer, tmp_path / "cache", shard_bytes=shard_bytes)
    want = expected(text, tokenizer)
    assert dataset.documents == len(want)
    assert dataset.tokens == sum(map(len, want))
    assert [dataset.document(i).tolist() for i in range(len(want))] == want
    assert dataset.document(0).dtype == np.dtype(dtype)
    assert dataset.names == [f"{i}.txt" for i in range(7)]
    hashes = [xxhash.xxh3_64_intdigest(p.read_bytes()) for p in sorted(text.iterdir())]
    assert dataset.hashes.tolist() == hashes
    shards = len(list(dataset.path.glob("*.bin")))
    assert (shards == 7) if shard_bytes == 1 else (shards == 1) == (shard_bytes == 2**30)


def test_without_eos_documents_are_just_their_text(tmp_path, text):
    tokenizer = byte_tokenizer(eos=False)
    dataset = build_dataset(documents(str(text)), tokenizer, tmp_path / "cache")
    assert dataset.document(2).tolist() == tokenizer.encode((text / "2.txt").read_text())


def test_the_second_build_tokenises_nothing(tmp_path, text, tokenizer):
    counting = Counting(tokenizer)
    first = build_dataset(documents(str(text)), counting, tmp_path / "cache")
    assert counting.encoded == 7
    second = build_dataset(documents(str(text)), counting, tmp_path / "cache")
    assert counting.encoded == 7
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)


@pytest.mark.parametrize("change", ["text", "tokenizer", "limit"])
def test_a_change_of_source_or_tokenizer_builds_anew(tmp_path, text, tokenizer, change):
    first = build_dataset(documents(str(text)), tokenizer, tmp_path / "cache")
    if change == "text":
        (text / "3.txt").write_text("changed")
    limit = 3 if change == "limit" else None
    second = build_dataset(
        documents(str(text), limit),
        byte_tokenizer(eos=False) if change == "tokenizer" else tokenizer,
        tmp_path / "cache",
    )
    assert second.path != first.path
    assert second.fingerprint != first.fingerprint


def test_progress_ends_complete(tmp_path, text, tokenizer):
    calls = []
    dataset = build_dataset(documents(str(text)), tokenizer, tmp_path, lambda *call: calls.append(call))
    total = sum(p.stat().st_size for p in text.iterdir())
    assert calls[-1] == (total, total, dataset.tokens)


def test_an_interrupt_leaves_nothing(tmp_path, text, tokenizer):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(documents(str(text)), tokenizer, tmp_path / "cache", interrupt)
    assert os.listdir(tmp_path / "cache") == []


def test_a_corrupt_file_stops_the_build_and_leaves_nothing(tmp_path, text, tokenizer):
    (text / "5.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"5\.txt"):
        build_dataset(documents(str(text)), tokenizer, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_named(text, tokenizer):
    with pytest.raises(UserError, match=r"0\.txt: cannot write the dataset"):
        build_dataset(documents(str(text)), tokenizer, text / "0.txt")


def test_two_builders_at_once_agree(tmp_path, text, tokenizer):
    other = []

    def build_too(*_):
        if not other:
            other.append(None)
            other[0] = build_dataset(documents(str(text)), tokenizer, tmp_path / "cache")

    dataset = build_dataset(documents(str(text)), tokenizer, tmp_path / "cache", build_too)
    assert dataset.path == other[0].path
    assert os.listdir(tmp_path / "cache") == [dataset.path.name]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def overwrite(path):
    path.write_bytes(b"\xff\x7f" * (path.stat().st_size // 2) + b"\x7f" * (path.stat().st_size % 2))


DAMAGE = {
    cut: r"has \d+ bytes, \d+ expected",
    overwrite: "is damaged",
    Path.unlink: "is missing",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["tokens-00000.bin", "offsets.npy", "hashes.npy", "names.json"])
def test_a_damaged_file_is_named_and_the_dataset_made_again(tmp_path, text, tokenizer, caplog, name, damage):
    counting = Counting(tokenizer)
    first = build_dataset(documents(str(text)), counting, tmp_path / "cache")
    damage(first.path / name)
    with pytest.raises(UserError, match=rf"{name}: dataset file {DAMAGE[damage]}"):
        Dataset(first.path)
    again = build_dataset(documents(str(text)), counting, tmp_path / "cache")
    assert counting.encoded == 14 and again.fingerprint == first.fingerprint
    assert [again.document(i).tolist() for i in range(7)] == expected(text, tokenizer)
    (line,) = caplog.messages
    assert name in line and "\n" not in line
    assert os.listdir(tmp_path / "cache") == [again.path.name]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 1}), json.dumps({"format": 99})])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        Dataset(tmp_path)


def test_no_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match="no dataset there"):
        Dataset(tmp_path / "nothing")
