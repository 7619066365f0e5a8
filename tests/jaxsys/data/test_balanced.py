"""Balanced batches: whole documents, arranged; every token once, as a function of (seed, step)."""

import numpy as np
import pytest

from jaxsys.data import NO_TARGET, BalancedLoader, build_dataset, documents, prefetch
from jaxsys.data.balanced import FILL, REPORTED
from parallelism.balance import Grid
from tests.jaxsys.data.conftest import byte_tokenizer

GRID, SEQ_LEN, ROWS = Grid(2, 2, 128), 64, 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("balanced")
    (root / "text").mkdir()
    for i in range(80):
        (root / "text" / f"{i:02}.txt").write_text(f"{i:02}" + "abcdefghij" * (i * i % 11))
    return build_dataset(documents(str(root / "text")), byte_tokenizer(), root / "cache")


def make(dataset, seed=3):
    return BalancedLoader(dataset, ROWS, SEQ_LEN, seed, 0.1, GRID, (0, 64, 128))


def documents_of(batch):
    """(tokens, targets) of each document of a batch, in order."""
    found = []
    for document in range(1, batch["segments"].max() + 1):
        inside = batch["segments"] == document
        order = np.argsort(batch["positions"][inside])
        found.append((batch["tokens"][inside][order].tolist(), batch["targets"][inside][order].tolist()))
    return found


def test_an_epoch_has_its_documents_in_order_each_token_a_target_of_the_one_before(dataset):
    loader = make(dataset)
    tokens, targets = [], []
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        assert {batch[name].shape for name in ("tokens", "targets", "segments", "positions")} == {(2, 256)}
        assert {batch[name].dtype for name in ("tokens", "targets", "segments", "positions")} == {np.dtype("int32")}
        for ids, following in documents_of(batch):
            assert len(ids) <= SEQ_LEN
            tokens += ids
            targets += following
        assert (batch["segments"] > 0).sum() == int(FILL * ROWS * SEQ_LEN)
    order, _ = loader._epoch(0)
    expected = np.concatenate([dataset.document(int(i)) for i in order])[: len(tokens)].tolist()
    assert tokens == expected
    assert [(a, b) for a, b in zip(targets[:-1], tokens[1:], strict=True) if a != b and a != NO_TARGET] == []
    assert targets.count(NO_TARGET) <= len(order)


def test_padding_is_no_token_and_no_target(dataset):
    batch = make(dataset).batch(1)
    empty = batch["segments"] == 0
    assert empty.any()
    assert not batch["tokens"][empty].any() and (batch["targets"][empty] == NO_TARGET).all()


def test_documents_shorter_than_a_row_stay_whole(dataset):
    loader = make(dataset)
    lengths = sorted(len(ids) for step in range(3) for ids, _ in documents_of(loader.batch(step)))
    whole = {len(dataset.document(i)) for i in range(dataset.documents)}
    # Cut are those longer than a row, and one at each end of a batch.
    odd = [n for n in lengths if n not in whole and n != SEQ_LEN and n + SEQ_LEN not in whole]
    assert len(odd) <= 2 * 3


def test_a_batch_is_a_function_of_seed_and_step_and_its_rows_are_the_same_whoever_asks(dataset):
    one, two = make(dataset), make(dataset)
    steps = range(2 * one.steps_per_epoch)
    batches = [one.batch(step) for step in steps]
    for step in reversed(steps):
        again = two.batch(step)
        assert again.keys() == batches[step].keys()
        assert all(np.array_equal(again[name], value) for name, value in batches[step].items())
    part = one.batch(1, slice(1, 2))
    assert np.array_equal(part["tokens"], batches[1]["tokens"][1:]) and part["split"] == batches[1]["split"]
    assert not np.array_equal(make(dataset, seed=4).batch(0)["tokens"], batches[0]["tokens"])
    assert [step for step, _ in prefetch(one, 1, 3)] == [1, 2]


def test_a_batch_says_how_even_it_is(dataset):
    batch = make(dataset).batch(0)
    assert set(REPORTED) < batch.keys() and batch["split"] in (0, 64, 128)
    assert 1 <= batch["imbalance"] < 1.2
    assert batch["padding"] == pytest.approx((batch["segments"] == 0).mean())


def test_identity_names_tokens_and_documents(dataset):
    loader = make(dataset)
    text = loader.identity(loader.steps_per_epoch + 1)
    assert f"step {loader.steps_per_epoch + 2}: epoch 1, tokens 504-1007 of {loader.tokens}, documents " in text
    assert ".txt" in text
