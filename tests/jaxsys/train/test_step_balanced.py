"""Documents arranged over a mesh give the loss and gradients that they have in rows on one device.

With half of the places in split regions they are in ``test_step_covering.py``; here are the ends.
"""

import dataclasses

import pytest
from tiny_models import GEMMA2, LLAMA, Setup, arranged, assert_near, packed_batch, x64

from parallelism.balance import Grid
from parallelism.collectives import collectives

MESH, ROOM = "context=4", 64


def both(model, share, **options):
    """Gradients and totals of the documents in rows on one device, the same of them arranged, and the graph."""
    batch = packed_batch()
    with x64():
        expected = Setup(model, dtype="float64").grads(batch)
        setup = Setup(model, MESH, dtype="float64", **options)
        batch = arranged(batch, Grid(1, 4, ROOM), share)
        setup.step = dataclasses.replace(setup.step, split=batch.pop("split"))
        found = setup.grads(batch)
    (graph,) = (graph for graph in setup.graphs if graph.name == "grads")
    return expected, found, {each.kind for each in collectives(graph.text, setup.mesh)}


def check(expected, found):
    assert found[1]["targets"] == expected[1]["targets"]
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-9)
    assert_near(found[0], expected[0], 1e-9)


def test_documents_that_are_all_split_are_seen_through_windows():
    expected, found, sent = both(GEMMA2, 1.0, method="all_gather", storage="stacked")
    check(expected, found)
    assert "all-gather" in sent


def test_documents_that_are_all_local_send_nothing_but_gradients():
    expected, found, sent = both(LLAMA, 0.0)
    check(expected, found)
    assert "all-reduce" in sent and "collective-permute" not in sent
