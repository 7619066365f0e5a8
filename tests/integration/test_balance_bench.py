"""Long-tailed batches: even for every seed, with at most a third of the bytes of rows that are all split."""

import time
from pathlib import Path

import pytest

from parallelism.balance import plan, split_sizes

MESHES, DISTRIBUTIONS = ("context=8", "data=2,context=4"), ("log-normal", "Pareto")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts" / "bench")
    import balance

    assert (*balance.MESHES,) == MESHES and (*balance.DISTRIBUTIONS,) == DISTRIBUTIONS
    return balance


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_seed_is_even_and_no_document_is_cut(bench, distribution, mesh):
    found = [each for each, _ in bench.plans(distribution, mesh)]
    assert len(found) == 20
    assert max(each.imbalance for each in found) <= 1.05
    assert max(each.cut for each in found) == 0
    assert max(each.padding for each in found) < 0.02


@pytest.mark.parametrize("rows", [8, 16])
def test_of_small_batches_every_one_is_even_that_any_plan_could_make_even(bench, rows):
    for mesh in MESHES:
        for distribution in DISTRIBUTIONS:
            grid = bench.grid_of(mesh, rows)
            best = [bench.limits(bench.draw(distribution, grid, seed), grid) for seed in range(bench.SEEDS)]
            found = [each for each, _ in bench.plans(distribution, mesh, rows)]
            for each, (imbalance, split) in zip(found, best, strict=True):
                assert (each.imbalance <= 1.05) == (imbalance <= 1.05) and each.cut == 0
                assert each.imbalance >= imbalance - 1e-3
                assert imbalance > 1.05 or each.split >= split * grid.room - grid.pieces
            if rows == 16 and mesh == MESHES[0]:
                assert max(each.split for each in found) <= grid.room / 3


@pytest.mark.parametrize("mesh", [MESHES[0], pytest.param(MESHES[1], marks=pytest.mark.slow)])
def test_compiled_attention_sends_at_most_a_third_for_every_seed(bench, mesh):
    most = max(each.split for distribution in DISTRIBUTIONS for each, _ in bench.plans(distribution, mesh))
    assert 0 < 3 * bench.sent(mesh, most) <= bench.sent(mesh, None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["all_gather", "token_ring", "all_to_all"])
def test_bytes_are_in_proportion_to_the_split_region_whatever_the_method(bench, method):
    mesh, room = MESHES[0], bench.grid_of(MESHES[0]).room
    rows = bench.sent(mesh, None, method)
    assert bench.sent(mesh, room // 4, method) == pytest.approx(rows / 4, rel=0.01)
    assert bench.sent(mesh, 0, method) == 0


def test_a_plan_takes_under_two_milliseconds_per_thousand_documents(bench):
    grid = bench.grid_of(MESHES[1])
    for distribution in DISTRIBUTIONS:
        lengths, seconds = bench.draw(distribution, grid, 0), []
        for _ in range(5):
            start = time.perf_counter()
            plan(lengths, grid, split_sizes(bench.SHARES, grid))
            seconds.append(time.perf_counter() - start)
        assert min(seconds) <= 0.002 * len(lengths) / 1000
