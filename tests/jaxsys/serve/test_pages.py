"""The page allocator: never leaks, never hands out twice."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxsys.serve.pages import PageAllocator


class Allocations(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(24, 16)
        self.held: list[list[int]] = []

    @rule(n=st.integers(0, 30))
    def allocate(self, n):
        free = self.pages.free
        got = self.pages.allocate(n)
        if n > free:
            assert got is None
            assert self.pages.free == free
        else:
            assert len(got) == n
            self.held.append(got)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        self.pages.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_page_has_one_owner(self):
        held = [page for pages in self.held for page in pages]
        assert len(set(held)) == len(held)
        assert 0 not in held
        assert all(0 < page < 24 for page in held)
        assert self.pages.used == len(held)
        assert self.pages.free == 23 - len(held)


TestAllocations = Allocations.TestCase


def test_a_page_released_twice_is_an_error():
    pages = PageAllocator(4, 16)
    got = pages.allocate(2)
    pages.release(got)
    with pytest.raises(ValueError, match="not in use"):
        pages.release(got)


def test_positions_round_up_to_pages():
    pages = PageAllocator(4, 16)
    assert [pages.needed(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
