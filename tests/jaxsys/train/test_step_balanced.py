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
def on_one_device(model, dtype):
    with x64(dtype == "float64"):
        return Setup(MODELS[model], dtype=dtype).grads(pack(documents(), sum(LENGTHS)))


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
    "local and split": ("context=4", "ring", 0.5, "llama", "listed", "float64"),
    "all split, windows": ("context=4", "all_gather", 1.0, "gemma2", "stacked", "float64"),
    "data and tensor too": ("data=2,context=2,tensor=2", "token_ring", 0.5, "gemma2", "listed", "float64"),
    "parameters over fsdp": ("fsdp=2,context=4", "all_to_all", 0.75, "llama", "stacked", "float64"),
    "all local": ("context=2", "ring", 0.0, "llama", "listed", "float32"),
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_the_documents_in_one_row_on_one_device(case):
    mesh, method, split, model, storage, dtype = CASES[case]
    expected, totals = on_one_device(model, dtype)
    with x64(dtype == "float64"):
        setup = Setup(MODELS[model], mesh, dtype=dtype, storage=storage, method=method)
        batch, size = arranged(setup.mesh, split)
        setup.step = dataclasses.replace(setup.step, split=size)
        found, sums = setup.grads(batch)
    assert sums["targets"] == totals["targets"]
    assert sums["loss"] == pytest.approx(totals["loss"], rel=TOLERANCE[dtype])
    assert_near(found, expected, TOLERANCE[dtype])
    if split == 0:
        (graph,) = (graph for graph in setup.graphs if graph.name == "grads")
        sent = {each.kind for each in collectives(graph.compiled.as_text(), setup.mesh)}
        assert "all-reduce" in sent and "collective-permute" not in sent
