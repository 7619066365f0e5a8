"""Loss and every gradient equal one device: a pairwise covering set over mesh axes, families and options.

The full product of what can go together has tens of thousands of members; ``-m slow`` takes a second covering set.
"""

import dataclasses
import functools

import numpy as np
import pytest
from covering import pairwise
from tiny_models import EXPERTS, GEMMA2, LLAMA, ZERO, Setup, assert_near, packed_batch, x64

from jaxsys.models.config import Experts
from parallelism.sequence import METHODS

ROUTED = Experts(4, 2, 10, balance_loss=0.3, z_loss=0.1)
MODELS = {
    "llama": LLAMA,
    "gemma2": GEMMA2,
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", tie_embeddings=False, experts=ROUTED),
    "qwen3_moe": dataclasses.replace(LLAMA, family="qwen3_moe", qk_norm="head", experts=ROUTED),
    "shared": EXPERTS,
    "capacity": dataclasses.replace(
        EXPERTS, experts=dataclasses.replace(EXPERTS.experts, routing="sigmoid", capacity_factor=0.9, dense_layers=())
    ),
}
DENSE = ["llama", "gemma2"]
FACTORS = {
    "data": (1, 2),
    "fsdp": (1, 2, 4, 8),
    "tensor": (1, 2, 4),
    "context": (1, 2, 4),
    "expert": (1, 2, 4),
    "model": tuple(MODELS),
    "method": METHODS,
    "storage": ("listed", "stacked"),
    "remat": ("none", "full", "dots"),
    "accumulate": (1, 2),
    "zero": tuple(ZERO),
    "residual": ("context+tensor", "context"),
    "dtype": ("float64", "float32"),
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def valid(of):
    """Eight devices; a method where rows are split, experts over an axis where there are some."""
    devices = of["data"] * of["fsdp"] * of["tensor"] * of["context"] * of["expert"]
    methods = (of["context"] > 1) | (of["method"] == METHODS[0])
    return (devices == 8) & methods & ((of["expert"] == 1) | ~np.isin(of["model"], DENSE))


def cases():
    seen = []
    for seed, marks in ((2, ()), (3, pytest.mark.slow)):
        for case in pairwise(FACTORS, valid, seed):
            if case not in seen:
                seen.append(case)
                yield pytest.param(case, marks=marks, id="-".join(map(str, case.values())))


def summed(model, dtype, batch, mesh="", accumulate=1, **options):
    """Logical gradients of a whole batch, and {"loss", "targets"}."""
    with x64(dtype == "float64"):
        setup = Setup(MODELS[model], mesh, dtype=dtype, **options)
        placed = setup.place(batch, accumulate)
        graph = setup.graphs.compile("sums", setup.step.sums, setup.params, placed)
        grads, totals = graph(setup.params, placed)
        return setup.host(grads), {name: float(totals[name]) for name in ("loss", "targets")}


@functools.cache
def on_one_device(model, dtype):
    return summed(model, dtype, packed_batch(16))


@pytest.mark.parametrize("case", cases())
def test_loss_and_every_gradient_equal_one_device(case):
    options = dict(case)
    model, dtype, residual = (options.pop(name) for name in ("model", "dtype", "residual"))
    axes = {axis: options.pop(axis) for axis in ("data", "fsdp", "tensor", "context", "expert")}
    mesh = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
    rules = ZERO[options.pop("zero")]
    expected, totals = on_one_device(model, dtype)
    found, sharded = summed(
        model, dtype, packed_batch(16), mesh, activation_rules=f"residual={residual}", **rules, **options
    )
    assert sharded["targets"] == totals["targets"]
    assert sharded["loss"] == pytest.approx(totals["loss"], rel=TOLERANCE[dtype])
    assert_near(found, expected, TOLERANCE[dtype])


def test_every_pair_that_can_occur_is_covered():
    from itertools import combinations

    from covering import product

    possible, names = product(FACTORS, valid), list(FACTORS)
    chosen = [[FACTORS[name].index(case[name]) for name in names] for case in pairwise(FACTORS, valid, 2)]
    for a, b in combinations(range(len(names)), 2):
        assert {(r[a], r[b]) for r in chosen} == set(map(tuple, np.unique(possible[:, [a, b]], axis=0)))
