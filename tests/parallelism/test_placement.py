"""What is to live in host memory, as text and as a choice of arrays."""

import pytest

from parallelism.errors import UserError
from parallelism.placement import Offload, spread


def test_what_to_offload_is_read_from_text():
    assert Offload.parse("") == Offload()
    assert Offload.parse("optimizer") == Offload(optimizer=1.0)
    found = Offload.parse(" optimizer = 0.25, parameters, activations = residual + gate ")
    assert found == Offload(0.25, True, ("residual", "gate"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser", r"unknown kind of array to offload 'optimiser': did you mean 'optimizer'"),
        ("optimizer=2", r"found optimizer=2, expected a share above 0 and at most 1"),
        ("optimizer=half", r"found optimizer=half, expected a share"),
        ("optimizer,optimizer", r"optimizer is given twice"),
        ("parameters=all", r"found 'parameters=all', expected parameters without a value"),
        ("activations", r"expected activations=NAME\+NAME"),
        ("activations=gate+gate", r"expected activations=NAME\+NAME"),
    ],
)
def test_text_that_says_nothing_possible_is_an_error(text, message):
    with pytest.raises(UserError, match=message):
        Offload.parse(text)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8, 1.0])
def test_a_share_is_spread_evenly(share):
    sizes = {f"k{i}": 10 + i % 3 for i in range(40)}
    chosen = spread(sizes, share)
    assert abs(sum(sizes[k] for k in chosen) - share * sum(sizes.values())) <= max(sizes.values()) / 2
    for start in range(0, 40, 10):
        part = [k for k in chosen if start <= int(k[1:]) < start + 10]
        assert abs(len(part) - 10 * share) <= 1
