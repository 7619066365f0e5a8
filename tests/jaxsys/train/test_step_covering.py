"""A train step equals one device: loss, gradients, parameters and optimizer state, over meshes, families and more.

By default a pairwise covering set. With ``-m slow`` the full product of meshes, families, methods of context
parallelism and storage, each with other options drawn at random, the same ones in every run.
"""

import functools
from itertools import combinations

import numpy as np
import pytest
from covering import cases, pairwise, product
from step_cases import CONSTRAINTS, METHODS, MODELS, OPTIONS, check, config_of

from jaxsys.train.abstract import AbstractRun
from parallelism.errors import UserError

LARGEST = {"data": 8, "fsdp": 8, "tensor": 8, "context": 4, "expert": 4}
"""Rows of 16 tokens split into four at most, and one of the models has four experts."""


def factors(largest):
    sizes = {axis: tuple(n for n in (1, 2, 4, 8) if n <= most) for axis, most in largest.items()}
    return {**sizes, "model": tuple(MODELS), "method": METHODS, **OPTIONS}


# Larger sizes differ little in kind, and leave no room for a second axis.
PAIRWISE = factors({**LARGEST, "data": 2, "fsdp": 4, "tensor": 4})
EVERY = factors(LARGEST)
MULTIPLIED = (*LARGEST, "model", "method", "storage")
"""What is multiplied out under ``-m slow``."""


def eight_devices(data, fsdp, tensor, context, expert):
    return data * fsdp * tensor * context * expert == 8


ALL = (eight_devices, *CONSTRAINTS)
COVERING = pairwise(PAIRWISE, ALL, seed=18)


def named(case):
    return pytest.param(case, id="-".join(str(value) for value in case.values()))


@pytest.mark.parametrize("case", map(named, COVERING))
def test_a_step_equals_one_device(case):
    check(case)


@functools.cache
def full_product():
    """A member of every combination of what is multiplied."""
    rows, names = product(EVERY, ALL), list(EVERY)
    rows = np.random.default_rng(0).permutation(rows)
    _, first = np.unique(rows[:, [names.index(name) for name in MULTIPLIED]], axis=0, return_index=True)
    return cases(EVERY, rows[np.sort(first)])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(634))
def test_a_step_of_the_full_product_equals_one_device(number):
    check(full_product()[number])


def test_every_pair_that_can_occur_is_covered():
    possible, names = product(PAIRWISE, ALL).astype(int), list(PAIRWISE)
    chosen = np.array([[PAIRWISE[name].index(case[name]) for name in names] for case in COVERING])
    for a, b in combinations(range(len(names)), 2):
        found, expected = (np.bincount(rows[:, a] * 16 + rows[:, b], minlength=256) > 0 for rows in (chosen, possible))
        np.testing.assert_array_equal(found, expected, f"{names[a]} and {names[b]}")


PLAIN = {name: values[0] for name, values in PAIRWISE.items()} | {"dtype": "float32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "parameters"}, "offload parameters with remat=none"),
        ({"batches": "documents"}, r"data\.split_shares .* context=1 splits no document"),
        ({"batches": "documents", "context": 2, "model": "capacity"}, r"data\.split_shares .* and .*capacity_factor"),
        ({"model": "qwen3_moe", "expert": 8}, "the model's 4 experts do not divide"),
        ({"context": 8}, "16 tokens"),
    ],
)
def test_what_the_set_leaves_out_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as refused:
        config = config_of(**{**PLAIN, **changes})
        AbstractRun(config, config.model)
    assert "\n" not in str(refused.value)
