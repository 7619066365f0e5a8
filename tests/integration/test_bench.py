"""What the benchmarks have of their own: models of random weights, and workers."""

import dataclasses
import sys
from pathlib import Path

import pytest
from tiny_runs import MODEL

from jaxsys.hub import resolve
from jaxsys.models.pretrained import Pretrained
from jaxsys.tokenizer import Tokenizer

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)


def test_a_model_of_random_weights_is_written_and_opens_the_same_each_time(tmp_path):
    from models import write_random

    config = dataclasses.replace(MODEL, n_heads=3)
    for name in ("one", "two"):
        write_random(config, tmp_path / name)
    source = resolve(tmp_path / "one")
    assert Pretrained.open(source).config == config and Tokenizer.of(source).encode("tokens")
    one, two = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_worker_shares_an_accelerators_memory():
    from measure import Worker

    code = "import os; input(); print('answer', 1 if os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false' else 0)"
    worker = Worker("test", [sys.executable, "-c", code])
    assert worker.measure() == 1
    worker.close()


def test_a_worker_that_ends_says_why(tmp_path):
    from measure import Ended, Worker

    with open(tmp_path / "log", "w+") as log:
        worker = Worker("test", [sys.executable, "-c", "input(); raise RuntimeError('no such kernel')"], log)
        with pytest.raises(Ended, match="the worker of test ended with exit code 1: RuntimeError: no such kernel"):
            worker.ask()
        worker.close()
