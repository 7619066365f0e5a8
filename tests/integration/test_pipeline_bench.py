"""The benchmark of pipelines runs: the step without stages, the baseline, and one through stages."""

from pathlib import Path

import pytest
from tiny_models import quickly_compiled


@pytest.mark.parametrize("name", ["without stages", "shift buffer", "1f1b, recompute"])
def test_a_step_of_the_benchmark(monkeypatch, name):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts" / "bench")
    import pipeline

    with quickly_compiled():
        assert pipeline.step_of(name, pipeline.QUICK, 4, 4)() > 0
