"""The pages: never leaked, never written by two, found again by what is in them."""

import pytest

from jaxsys.serve.pages import Move, Pages, root_of
from jaxsys.serve.request import Request
from jaxsys.serve.sampling import Sampling

ROOT = root_of(0)


def request(tokens):
    return Request(len(tokens), list(tokens), Sampling(4), 0)


def begin(pages, tokens, wanted=None):
    """A request that begins, and has computed all its tokens."""
    new = request(tokens)
    assert pages.begin(new, ROOT, pages.match(new, ROOT), wanted or pages.needed(len(tokens)))
    before, new.computed = new.computed, len(tokens)
    pages.computed(new, ROOT, before)
    return new, before


def test_positions_round_up_to_pages():
    assert [Pages(4, 16).needed(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_full_pages_are_shared_and_the_next_is_copied_as_far_as_it_is_alike():
    pages = Pages(20, 4)
    first, _ = begin(pages, range(10))
    second, there = begin(pages, [*range(9), 50])
    assert there == 9
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert pages.moves == [Move("copy", first.pages[2], second.pages[2])]
    assert pages.used == 4
    pages.end(first, ROOT)
    assert pages.used == 3
    pages.end(second, ROOT)
    assert (pages.used, pages.cached) == (0, 4)


def test_one_token_at_least_is_left_to_compute():
    pages = Pages(20, 4)
    first, _ = begin(pages, range(8))
    match = pages.match(request(range(8)), ROOT)
    assert ([e.page for e in match.full], match.tail.page, match.alike) == (first.pages[:1], first.pages[1], 3)


def test_pages_unused_longest_are_taken_first_and_the_last_of_a_request_before_its_first():
    pages = Pages(6, 4)
    old, _ = begin(pages, range(8))
    new, _ = begin(pages, range(100, 112))
    before = [*old.pages], [*new.pages]
    pages.end(old, ROOT)
    pages.end(new, ROOT)
    other = request(range(200, 212))
    assert pages.begin(other, ROOT, pages.match(other, ROOT), 3)
    assert other.pages == [before[0][1], before[0][0], before[1][2]]
    assert len(pages.match(request(range(100, 113)), ROOT).full) == 2


def test_what_is_pushed_out_comes_back_from_host_memory():
    pages = Pages(4, 4, slots=3)
    old, _ = begin(pages, range(12))
    pages.end(old, ROOT)
    other, _ = begin(pages, range(100, 112))
    out = [move.source for move in pages.moves]
    assert [move.kind for move in pages.moves] == ["out"] * 3
    assert pages.hosted == 3
    pages.end(other, ROOT)
    pages.moves.clear()
    again, there = begin(pages, range(12))
    assert there == 11  # two pages, and three tokens of the third
    loads = [move for move in pages.moves if move.kind == "in"]
    assert [move.source for move in loads] == [2, 1, 0]
    assert [move.target for move in loads] == again.pages
    assert sorted(out) == [1, 2, 3]


def test_host_memory_keeps_what_was_used_last():
    pages = Pages(3, 4, slots=2)
    for start in (0, 100, 200):
        one, _ = begin(pages, range(start, start + 8))
        pages.end(one, ROOT)
    assert pages.match(request(range(9)), ROOT).full == []
    assert len(pages.match(request(range(100, 109)), ROOT).full) == 2


def test_a_request_that_does_not_fit_changes_nothing():
    pages = Pages(5, 4)
    first, _ = begin(pages, range(9))
    pages.end(first, ROOT)
    more = request(range(40))
    assert not pages.begin(more, ROOT, pages.match(more, ROOT), 10)
    assert (pages.used, pages.cached, more.pages, more.computed) == (0, 3, [], 0)
    assert pages.begin(more, ROOT, pages.match(more, ROOT), 4)
    assert pages.used == 4


def test_pages_that_a_running_request_is_about_to_have_are_known():
    pages = Pages(20, 4)
    first = request(range(10))
    pages.begin(first, ROOT, pages.match(first, ROOT), 3)
    assert pages.match(request(range(12)), ROOT).computing is first
    assert pages.match(request(range(4)), ROOT).computing is None  # its only full page has the last token
    pages.end(first, None)
    assert pages.match(request(range(12)), ROOT).computing is None


def test_what_is_forgotten_is_not_found_and_its_pages_are_free():
    pages = Pages(8, 4, slots=4)
    running, _ = begin(pages, range(8))
    done, _ = begin(pages, range(100, 112))
    pages.end(done, ROOT)
    pages.forget(ROOT)
    assert (pages.cached, pages.used, pages.free) == (0, 2, 5)
    assert pages.match(request(range(9)), ROOT).full == []
    pages.end(running, None)
    assert (pages.used, pages.free, pages.cached) == (0, 7, 0)


def test_a_page_released_twice_is_an_error():
    pages = Pages(4, 16)
    one, _ = begin(pages, range(5))
    kept = list(one.pages)
    pages.end(one, None)
    one.pages = kept
    with pytest.raises(ValueError, match="not in use"):
        pages.end(one, None)
