"""Sampling settings are checked where they are made."""

import math

import pytest

from jaxsys.serve.request import Made, Request
from jaxsys.serve.sampling import Sampling
from parallelism.errors import UserError


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": -1},
        {"max_tokens": 2.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": 1e39},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-30},
        {"frequency_penalty": 1e39},
        {"presence_penalty": -1e39},
        {"logit_bias": {1: 1e39}},
        {"min_tokens": 17},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"seed": 2**32},
        {"stop": (-1,)},
        {"stop": (1.5,)},
        {"stop": 5},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named_in_one_line(settings):
    (name,) = settings
    with pytest.raises(UserError, match=name) as error:
        Sampling(**settings)
    assert "\n" not in str(error.value)


def test_a_request_finishes_at_a_stop_token_before_its_length():
    request = Request(1, [4], Sampling(2, stop=(9,)), seed=0)
    request.take(Made(8, -0.5), 3)
    assert request.finish_reason is None
    request.take(Made(9, -0.25), 4)
    assert (request.finish_reason, request.logprobs, request.versions) == ("stop", [-0.5, -0.25], [3, 4])
