"""Plans for documents of uneven lengths: what holds for any lengths."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from parallelism import UserError
from parallelism.balance import Grid, _least, plan, split_sizes

SHARES = (0, 0.125, 0.25, 0.5, 1)


@st.composite
def problems(draw):
    grid = Grid(draw(st.integers(1, 3)), draw(st.integers(2, 4)), 8 * draw(st.integers(1, 12)))
    lengths = draw(st.lists(st.integers(1, draw(st.integers(1, 2 * grid.pieces * grid.room))), max_size=40))
    assume(sum(lengths) <= grid.devices * grid.room)
    shares = draw(st.lists(st.sampled_from((0, 0.5, 1)), min_size=1, unique=True))
    return lengths, grid, split_sizes(shares, grid)


@settings(deadline=None, max_examples=300)
@given(problems())
def test_every_token_lies_at_one_place_and_no_device_has_more_than_its_room(problem):
    lengths, grid, sizes = problem
    found = plan(lengths, grid, sizes)
    source, documents, positions = found.arrange()
    assert source.shape == documents.shape == positions.shape == (grid.groups, grid.pieces * grid.room)
    used = source >= 0
    assert sorted(source[used]) == list(range(sum(lengths)))
    assert not documents[~used].any() and not positions[~used].any() and documents[used].all()
    assert found.split in sizes
    assert found.tokens == sum(lengths) and found.padding == pytest.approx(1 - sum(lengths) / source.size)


@settings(deadline=None, max_examples=300)
@given(problems())
def test_a_document_is_whole_and_in_order_in_one_local_region_or_in_the_split_regions_of_one_group(problem):
    lengths, grid, sizes = problem
    found = plan(lengths, grid, sizes)
    source, documents, positions = found.arrange()
    group, column = np.indices(source.shape)
    device, split = column // grid.room, column % grid.room >= grid.room - found.split
    real = np.repeat(np.arange(len(lengths)), lengths)
    parts = np.zeros(len(lengths), int)
    for document in range(1, documents.max(initial=0) + 1):
        inside = documents == document
        tokens = np.argsort(source[inside])
        assert (np.diff(source[inside][tokens]) == 1).all()
        np.testing.assert_array_equal(positions[inside][tokens], np.arange(inside.sum()))
        assert len(set(group[inside])) == len(set(split[inside])) == 1
        if not split[inside].any():
            assert len(set(device[inside])) == 1
        (of,) = set(real[source[inside]])
        parts[of] += 1
    assert (parts[np.array(lengths, int) > 0] >= 1).all() and (parts > 1).sum() == found.cut


@settings(deadline=None, max_examples=200)
@given(problems())
def test_the_work_of_a_device_is_the_pairs_that_its_queries_see(problem):
    lengths, grid, sizes = problem
    found = plan(lengths, grid, sizes)
    source, _, positions = found.arrange()
    seen = np.where(source >= 0, positions + 1, 0).reshape(grid.devices, grid.room).sum(1)
    np.testing.assert_array_equal(found.work, seen)
    assert found.imbalance == pytest.approx(seen.max() / seen.mean() if seen.any() else 1)


@settings(deadline=None, max_examples=200)
@given(problems())
def test_no_plan_that_cuts_nothing_has_less_work_at_most_than_the_bound(problem):
    lengths, grid, sizes = problem
    found = plan(lengths, grid, sizes)
    longest = np.sort(np.array(lengths, np.int64))[::-1]
    bound = _least(longest, longest * (longest + 1) // 2, grid)
    if not found.cut:
        # Halves of a document differ by a token at most: its devices' shares by as much as it is long.
        assert found.work.max() >= bound - sum(lengths)


@settings(deadline=None, max_examples=50)
@given(problems())
def test_the_same_documents_give_the_same_plan(problem):
    one, two = (plan(*problem).arrange() for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(2, 5), st.integers(1, 2))
def test_where_everything_is_split_each_device_of_a_group_has_an_equal_share(lengths, pieces, groups):
    room = -(-sum(lengths) // pieces)
    grid = Grid(groups, pieces, room + -room % 4)
    found = plan(lengths, grid, [grid.room])
    tokens = np.bincount(found.runs.device, found.runs.length, grid.devices).reshape(groups, pieces)
    assert (np.ptp(tokens, axis=1) <= 1).all()
    # A token more or less at the end of a document's half is a position of work.
    assert (np.ptp(found.work.reshape(groups, pieces), axis=1) <= 2 * sum(lengths)).all()


def test_documents_that_fit_stay_whole_and_send_nothing():
    found = plan([100] * 16, Grid(2, 4, 200), [0, 200])
    assert (found.split, found.imbalance, found.cut, found.split_share) == (0, 1.0, 0, 0.0)


def test_a_document_longer_than_a_device_is_split_in_the_smallest_region_that_holds_it():
    grid = Grid(1, 4, 256)
    found = plan([300, *[60] * 10], grid, split_sizes(SHARES, grid))
    assert found.split == 128 and found.cut == 0
    _, documents, _ = found.arrange()
    assert [(documents[0, i * 256 :][:256] == 1).sum() for i in range(4)] == [75] * 4


def test_documents_that_fit_nowhere_are_cut_and_counted():
    grid = Grid(2, 2, 16)
    found = plan([40, 20], grid, [0, 16])
    assert found.cut == 1 and found.tokens == 60


def test_no_documents_are_a_batch_of_padding():
    found = plan([], Grid(1, 2, 8), [0])
    assert (found.tokens, found.padding, found.imbalance, found.split_share) == (0, 1.0, 1.0, 0.0)


def test_too_many_tokens_are_refused():
    with pytest.raises(UserError, match=r"documents of 65 tokens for 4 devices of 16: expected at most 64"):
        plan([40, 25], Grid(2, 2, 16), [0])


def test_a_share_that_is_no_multiple_of_four_tokens_is_refused():
    with pytest.raises(UserError, match=r"split share of 0\.125 of the 48 tokens of a device is 6 tokens, .* of 4"):
        split_sizes((0, 0.125), Grid(1, 2, 48))
