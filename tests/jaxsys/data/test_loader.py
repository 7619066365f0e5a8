"""The loader: purity, coverage, splits, and its errors."""

import re
import threading

import numpy as np
import pytest

from jaxsys.data import Loader, build_dataset, documents, prefetch
from parallelism.errors import UserError
from tests.jaxsys.data.conftest import byte_tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    (root / "text").mkdir()
    for i in range(60):
        text = "".join(chr(97 + i * j % 26) for j in range(37 * i % 89 + 1))
        (root / "text" / f"{i:02}.txt").write_text(f"{i:02}{text}")
    return build_dataset(documents(str(root / "text")), byte_tokenizer(), root / "cache", shard_bytes=500)


def make(dataset, **changes):
    return Loader(dataset, **({"batch_size": 8, "seq_len": 16, "seed": 3, "heldout": 0.3} | changes))


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[key], b[key]) for key in a)


def epoch_documents(loader, epoch):
    """The documents of an epoch's batches, put together from segments and positions."""
    found, current = [], []
    for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
        batch = loader.batch(step)
        keep = batch["segments"].reshape(-1) > 0
        for token, target in zip(batch["tokens"].reshape(-1)[keep], batch["targets"].reshape(-1)[keep], strict=True):
            current.append(int(token))
            if target == -1:
                found.append(tuple(current))
                current = []
    return found, current


def test_batch_is_a_function_of_seed_and_step(dataset):
    one, two = make(dataset), make(dataset)
    steps = range(2 * one.steps_per_epoch + 1)
    batches = [one.batch(step) for step in steps]
    for step in reversed(steps):
        assert same(two.batch(step), batches[step])


def test_rows_are_the_same_whoever_asks(dataset):
    loader = make(dataset)
    for step in (0, 3, loader.steps_per_epoch):
        whole = loader.batch(step)
        for hosts in (2, 4, 8):
            n = 8 // hosts
            parts = [make(dataset).batch(step, slice(h * n, (h + 1) * n)) for h in range(hosts)]
            assert same({key: np.concatenate([p[key] for p in parts]) for key in whole}, whole)


def test_batch_has_the_global_shape(dataset):
    for split in ("train", "heldout"):
        loader = make(dataset, split=split)
        for step in range(loader.steps_per_epoch):
            assert {array.shape for array in loader.batch(step).values()} == {(8, 16)}


def test_seeds_and_epochs_have_different_orders(dataset):
    loader = make(dataset)
    first = loader.batch(0)
    assert not same(first, make(dataset, seed=4).batch(0))
    assert not same(first, loader.batch(loader.steps_per_epoch))


def test_an_epoch_of_heldout_has_every_document_once(dataset):
    loader = make(dataset, split="heldout")
    every = {tuple(dataset.document(i).tolist()) for i in range(dataset.documents)}
    found, rest = epoch_documents(loader, epoch=0)
    assert rest == []
    assert sum(map(len, found)) == loader.tokens
    assert len(set(found)) == len(found)
    assert set(found) <= every


def test_an_epoch_of_train_leaves_out_less_than_a_batch(dataset):
    loader = make(dataset)
    found, rest = epoch_documents(loader, epoch=1)
    assert len(set(found)) == len(found)
    assert loader.tokens - sum(map(len, found)) - len(rest) < 8 * 16


def test_no_document_is_in_both_splits(dataset):
    train, heldout = make(dataset), make(dataset, split="heldout")
    assert train.tokens + heldout.tokens == dataset.tokens
    one, two = (set(epoch_documents(loader, 0)[0]) for loader in (train, heldout))
    assert one
    assert two
    assert not one & two


def test_equal_texts_fall_on_one_side(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i // 2}")
    dataset = build_dataset(documents(str(tmp_path)), byte_tokenizer(), tmp_path / "cache")
    loaders = [Loader(dataset, 1, 4, split=split, heldout=0.5) for split in ("train", "heldout")]
    one, two = (set(epoch_documents(loader, 0)[0]) for loader in loaders)
    assert len(two) > 1
    assert not one & two


@pytest.mark.parametrize("texts", [["one long text " * 40], ["equal " * 30] * 2], ids=["one document", "equal ones"])
@pytest.mark.parametrize("heldout", [0.05, 0.7])
def test_too_few_documents_to_hold_out_whole_ones_are_cut(tmp_path, texts, heldout):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    dataset = build_dataset(documents(str(tmp_path)), byte_tokenizer(), tmp_path / "cache")
    train, held = (Loader(dataset, 1, 16, split=split, heldout=heldout) for split in ("train", "heldout"))
    assert held.tokens / dataset.tokens == pytest.approx(heldout, abs=0.01)
    assert train.tokens + held.tokens == dataset.tokens
    begins, rest = epoch_documents(train, 0)
    for begin, end in zip([*begins, *([tuple(rest)] if rest else [])], epoch_documents(held, 0)[0], strict=True):
        assert begin + end == tuple(dataset.document(0).tolist())


def test_the_order_is_pinned(dataset):
    # A change of these makes every resumed run see other data.
    firsts = [make(dataset, seed=seed).identity(0).partition("documents ")[2].split(", ")[:2] for seed in range(3)]
    assert firsts == [["01.txt", "35.txt"], ["06.txt", "10.txt"], ["42.txt", "41.txt"]]


def test_identity_names_epoch_rows_and_documents(dataset):
    loader = make(dataset)
    text = loader.identity(loader.steps_per_epoch + 1)
    assert f"step {loader.steps_per_epoch + 2}: epoch 1, rows 8-15 of {loader.rows_per_epoch}" in text
    batch = loader.batch(loader.steps_per_epoch + 1)
    assert ".txt" in text
    assert "\n" not in text
    starts = np.flatnonzero(batch["positions"].reshape(-1) == 0)
    # The second document of the batch begins with its number.
    second = batch["tokens"].reshape(-1)[starts[batch["segments"].reshape(-1)[starts] == 2][0] :][:2]
    assert byte_tokenizer().decode(second) + ".txt" in text


def test_too_little_text_for_a_batch_says_what_works(dataset):
    with pytest.raises(
        UserError, match=r"train has \d+ of 60 documents, \d+ tokens.* data.seq_len=160 takes 160000; give"
    ) as caught:
        make(dataset, batch_size=1000, seq_len=160)
    works = int(re.search(r"data.batch_size of at most (\d+)$", str(caught.value)).group(1))
    assert make(dataset, batch_size=works, seq_len=160).steps_per_epoch == 1


def test_an_empty_split_is_an_error(dataset):
    with pytest.raises(UserError, match=r"heldout has 0 of 60 documents: data\.heldout is 0; give a share above 0"):
        make(dataset, split="heldout", heldout=0.0)


def test_a_text_of_one_token_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    dataset = build_dataset(documents(str(tmp_path)), byte_tokenizer(eos=False), tmp_path / "cache")
    with pytest.raises(UserError, match=r"train has 0 of 1 documents, 0 tokens.*; give more text$"):
        Loader(dataset, 1, 1)


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 0}, {"seq_len": 0}, {"split": "test"}, {"heldout": 1.0}, {"heldout": -1}],
)
def test_arguments_out_of_range_are_named(dataset, changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        make(dataset, **changes)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_gives_the_batches_in_order_and_ends(dataset):
    loader = make(dataset)
    got = list(prefetch(loader, 3, 9, slice(2, 4)))
    assert [step for step, _ in got] == list(range(3, 9))
    assert all(same(batch, loader.batch(step, slice(2, 4))) for step, batch in got)
    assert threads() == []


def test_prefetch_ends_when_left_early(dataset):
    stream = prefetch(make(dataset), 0, 10**9)
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert threads() == []


def test_prefetch_raises_what_the_loader_raises(dataset):
    class Broken:
        def batch(self, step, rows):
            raise UserError(f"broken at {step}")

    with pytest.raises(UserError, match="broken at 5"):
        next(prefetch(Broken(), 5, 7))
    assert threads() == []


def test_several_runs_of_rows_are_those_of_the_whole_batch(dataset):
    loader = make(dataset)
    for step in (0, loader.steps_per_epoch):
        whole = loader.batch(step)
        runs = loader.batch(step, [slice(1, 3), slice(6, 8)])
        assert same(runs, {name: array[[1, 2, 6, 7]] for name, array in whole.items()})
