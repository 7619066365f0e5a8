"""Documents arranged over a mesh give the loss and gradients that they have side by side on one device."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_models import MODELS, Setup, assert_near, x64

from jaxsys.data import NO_TARGET, pack
from parallelism.balance import Grid, plan
from parallelism.collectives import collectives

LENGTHS = (5, 31, 2, 9, 1, 17, 12, 3, 8, 20, 6, 4)
PLACES = 192


@functools.cache
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 67, length) for length in LENGTHS]


@functools.cache
def on_one_device(model):
    with x64():
        return Setup(MODELS[model], dtype="float64").grads(pack(documents(), sum(LENGTHS)))


def arranged(mesh, split):
    """The documents as a batch of that mesh."""
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    grid = Grid(groups, mesh.shape["context"], PLACES // groups // mesh.shape["context"])
    line = {name: array[0] for name, array in pack(documents(), sum(LENGTHS)).items()}
    found = plan(LENGTHS, grid, [int(split * grid.room)])
    assert found.cut == 0 and found.split == split * grid.room
    source, segments, positions = found.arrange()
    batch = {
        "tokens": np.where(source < 0, 0, line["tokens"][source]),
        "targets": np.where(source < 0, NO_TARGET, line["targets"][source]),
        "segments": segments,
        "positions": positions,
    }
    return batch, found.split


CASES = {
    "local and split": ("context=4", "ring", 0.5, "llama", "listed"),
    "all split, windows": ("context=4", "all_gather", 1.0, "gemma2", "stacked"),
    "data and tensor too": ("data=2,context=2,tensor=2", "token_ring", 0.5, "gemma2", "listed"),
    "parameters over fsdp": ("fsdp=2,context=4", "all_to_all", 0.75, "llama", "stacked"),
    "all local": ("context=2", "ring", 0.0, "llama", "listed"),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_documents_in_one_row_on_one_device(case):
    mesh, method, split, model, storage = CASES[case]
    expected, totals = on_one_device(model)
    with x64():
        setup = Setup(MODELS[model], mesh, dtype="float64", storage=storage, method=method)
        batch, size = arranged(setup.mesh, split)
        setup.step = dataclasses.replace(setup.step, split=size)
        found, sums = setup.grads(batch)
    assert sums["targets"] == totals["targets"]
    assert sums["loss"] == pytest.approx(totals["loss"], rel=1e-9)
    assert_near(found, expected, 1e-9)
    if split == 0:
        (graph,) = (graph for graph in setup.graphs if graph.name == "grads")
        sent = {each.kind for each in collectives(graph.compiled.as_text(), setup.mesh)}
        assert "all-reduce" in sent and "collective-permute" not in sent
