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


class Words:
    """Each token is a text, which may be empty; the last may come only at the end."""

    def __init__(self, words, late):
        self.words, self.late = words, late

    def push(self, token):
        return "" if self.late and token == len(self.words) - 1 else self.words[token]

    def finish(self):
        return self.words[-1] if self.late and self.words else ""


def cut(words, stops, least):
    """Where the text of so many tokens ends: by brute force, a character after the other."""
    text, origins = "".join(words), [i + 1 for i, word in enumerate(words) for _ in word]
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending and origins[end - 1] >= least:
            return text[: end - max(map(len, ending))]
    return text


@given(
    st.lists(st.text("ab.", max_size=4), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=5), max_size=4),
    st.integers(0, 12),
    st.booleans(),
)
def test_a_stop_counts_if_a_token_from_the_least_on_completes_it(words, stops, least, late):
    text, sure = Text(lambda: Words(words, late), stops, least), [""]
    for i in range(len(words)):
        ended = text.push(i)
        sure.append(text.sure)
        if ended:
            break
    sure.append(text.finish())
    for before, after in pairwise(sure):
        assert after.startswith(before)
    assert sure[-1] == cut(words, stops, least)


def test_an_early_stop_is_text_though_another_held_it_back():
    words = [" Paris", ".", "\n\n", "The", " dog", "."]
    text = Text(lambda: Words(words, False), ["Paris.\n\nThe cat", "."], 4)
    assert [text.push(i) for i in range(len(words))] == [False] * 5 + [True]
    assert text.finish() == " Paris.\n\nThe dog"
