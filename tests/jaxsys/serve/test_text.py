"""Text that ends at a stop text, as tokens come."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from jaxsys.serve.text import Text


class Letters:
    """Each token is a letter; the last comes only at the end."""

    def __init__(self):
        self.last = ""

    def push(self, token):
        last, self.last = self.last, chr(token)
        return last

    def finish(self):
        return self.last


def grown(text, stops, least=0):
    """What is sure after each letter, and all of it."""
    grows, sure = Text(Letters, stops, least), []
    for letter in text:
        ended = grows.push(ord(letter))
        sure.append(grows.sure)
        if ended:
            break
    return sure, grows.finish()


def test_nothing_is_shown_that_a_stop_may_begin_with():
    sure, text = grown("one END two", ["END", "EN!"])
    assert text == "one "
    assert sure[-1] == "one "
    assert sure[6] == "one "  # EN has been seen
    assert grown("one EN", ["END"])[1] == "one EN"


def test_stops_count_from_the_least_number_of_tokens():
    assert grown("a.b.c", ["."])[1] == "a"
    assert grown("a.b.c", ["."], least=4)[1] == "a.b"  # the first came before and is text
    assert grown("ab.c", [".."])[1] == "ab.c"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_text_is_cut_at_the_stop_that_is_complete_first_and_only_grows(text, stops):
    sure, found = grown(text, stops)
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert found == text[: min(ends, default=(0, len(text)))[1]]
    for before, after in pairwise([*sure, found]):
        assert after.startswith(before)
