"""Packing: invariants on random documents."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.data import NO_TARGET, pack

LENGTHS = st.lists(st.integers(0, 23), max_size=12)


def distinct(lengths):
    """Documents whose tokens are all different: document d, token i is 100 d + i + 1."""
    return [np.arange(n, dtype=np.uint16) + 100 * d + 1 for d, n in enumerate(lengths)]


def real(batch):
    return batch["segments"] > 0


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_every_token_appears_once_in_order(lengths, seq_len):
    documents = distinct(lengths)
    batch = pack(documents, seq_len)
    assert batch["tokens"][real(batch)].tolist() == [int(t) for d in documents for t in d]
    assert batch["tokens"].shape == (-(-sum(lengths) // seq_len), seq_len)
    assert all(array.dtype == np.int32 and array.shape == batch["tokens"].shape for array in batch.values())


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_targets_are_the_next_token_of_the_document(lengths, seq_len):
    batch = pack(distinct(lengths), seq_len)
    for token, target in zip(batch["tokens"][real(batch)], batch["targets"][real(batch)], strict=True):
        last = token % 100 == lengths[token // 100]
        assert target == (NO_TARGET if last else token + 1)
    assert (batch["targets"][~real(batch)] == NO_TARGET).all()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_segments_and_positions_restart_with_each_document_in_each_row(lengths, seq_len):
    batch = pack(distinct(lengths), seq_len)
    for tokens, segments, positions in zip(batch["tokens"], batch["segments"], batch["positions"], strict=True):
        seen: list[int] = []
        for token, segment, position in zip(tokens, segments, positions, strict=True):
            if segment == 0:
                assert (token, position) == (0, 0)
                continue
            if token // 100 not in seen:
                seen.append(token // 100)
                begin = token
            assert segment == len(seen)
            assert position == token - begin


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_padding_is_only_at_the_end(lengths, seq_len):
    flat = real(pack(distinct(lengths), seq_len)).reshape(-1)
    assert flat.sum() == sum(lengths)
    assert flat[: sum(lengths)].all()


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 6), st.integers(0, 8))
def test_some_rows_are_those_rows_of_all(lengths, seq_len, first, count):
    documents = distinct(lengths)
    whole, part = pack(documents, seq_len), pack(documents, seq_len, first * seq_len, count)
    for key, array in part.items():
        assert array.shape == (count, seq_len)
        rows = whole[key][first : first + count]
        np.testing.assert_array_equal(array[: len(rows)], rows)
        np.testing.assert_array_equal(array[len(rows) :], NO_TARGET if key == "targets" else 0)


def test_a_worked_example():
    batch = pack([np.array([1, 2, 3]), np.array([4, 5, 6, 7])], 4, rows=3)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4], [5, 6, 7, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[2, 3, -1, 5], [6, 7, -1, -1], [-1, -1, -1, -1]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 2], [1, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 0], [0, 1, 2, 0], [0, 0, 0, 0]])


def test_documents_beyond_the_rows_are_not_read():
    def stream():
        yield np.arange(10)
        raise AssertionError("read too far")

    assert pack(stream(), 5, rows=2)["tokens"].shape == (2, 5)
