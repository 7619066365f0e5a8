"""Serving against other engines in the same run: decode, prefill, and goodput under a mixed load.

    python scripts/bench/serve.py [--model llama-125m] [--dtype float32] [--rounds 3] [--peer vllm=PYTHON]

Every engine gets the same weights in the same precision and the same prompts of token ids, and makes the same number of
tokens, greedily. Contestants of one model and precision take turns. The peers are those of engines.py; one that is not
installed is a line, and so is one that fails. ``--peer`` names the interpreter that has one. Before them the
scheduler's own time is measured, after them the time from the start of a process to its first token.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from engines import CONTESTANTS, PEERS, WIDTH, Job
from measure import Ended, Quiet, Worker, machine
from models import MODELS, write_random

from jaxsys.malloc import restart_with_tunables
from jaxsys.models.config import ModelConfig

# What a request must keep to count: seconds to its first token, and a token after that on average.
FIRST, EACH = 1.0, 0.1


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is measured. alone, together: (tokens of the prompt, new tokens) of a sequence by itself, and of each of
    ``WIDTH``. long: tokens of a prompt. mixed: (median of the prompts, most new tokens) of requests that come at random
    for so many seconds, ``rates`` of them a second. starts: of a process.
    """

    alone: tuple[int, int] = (128, 32)
    together: tuple[int, int] = (64, 64)
    long: int = 512
    mixed: tuple[int, int] = (96, 48)
    rates: tuple[int, ...] = (2, 4, 8)
    seconds: float = 5.0
    starts: int = 2
    context: int = 1024


QUICK = Extent((12, 20), (12, 40), 40, (9, 30), rates=(20,), seconds=0.4, starts=1, context=64)


# ------------------------------------------------------------------------------------------------------- workloads


def arrivals(extent: Extent, vocabulary: int, rate: float, seed: int) -> list[Job]:
    """A Poisson process of prompts of mixed lengths, the same for everybody."""
    draw, now, jobs = random.Random(seed), 0.0, []
    for _ in range(round(rate * extent.seconds)):
        now += draw.expovariate(rate)
        prompt, most = extent.mixed
        length = min(max(round(draw.lognormvariate(0.0, 0.7) * prompt), 4), 3 * prompt)
        tokens = draw.randint(most // 3, most)
        jobs.append(Job(now, draw.choices(range(vocabulary), k=length), tokens))
    return jobs


def workloads(extent: Extent, vocabulary: int, seed: int) -> dict[str, list[Job]]:
    """Everything that is there at once, by name; other prompts for every seed, so that nothing is known already."""
    draw = random.Random(seed)

    def job(prompt: int, tokens: int) -> Job:
        return Job(0.0, draw.choices(range(vocabulary), k=prompt), tokens)

    return {
        "decode, 1": [job(*extent.alone)],
        f"decode, {WIDTH}": [job(*extent.together) for _ in range(WIDTH)],
        f"prefill, {extent.long}": [job(extent.long, 1)],
    }


def tokens_per_second(jobs: Sequence[Job]) -> float:
    """Of a prompt if one token was made of it; else of new tokens while all jobs make some, NaN if they never did."""
    if all(job.tokens == 1 for job in jobs):
        return sum(len(job.prompt) for job in jobs) / max(job.times[0] for job in jobs)
    begin, end = max(job.times[0] for job in jobs), min(job.times[-1] for job in jobs)
    made = sum(begin < at <= end for job in jobs for at in job.times)
    return made / (end - begin) if made else math.nan


def kept(job: Job) -> bool:
    """Whether a request had its tokens in time."""
    if not job.done:
        return False
    each = (job.times[-1] - job.times[0]) / max(job.tokens - 1, 1)
    return job.times[0] - job.at <= FIRST and each <= EACH


def goodput(jobs: Sequence[Job], rate: float) -> float:
    """Requests/s that were served in time, of ``rate`` that came."""
    return rate * sum(map(kept, jobs)) / len(jobs)


# --------------------------------------------------------------------------------------------------------- running


def command(name: str, dtype: str, weights: Path, context: int, pythons: dict[str, str]) -> list[str]:
    # -E: a PYTHONPATH for jaxsys would put this repository's packages before the peer's.
    python = [pythons[name], "-E"] if name in pythons else [sys.executable]
    worker = ["--worker", name, "--dtype", dtype, "--weights", str(weights), "--context", str(context)]
    return [*python, str(Path(__file__).with_name("engines.py")), *worker]


def served(worker: Worker, jobs: Sequence[Job], *, live: bool = False, warm: bool = True) -> list[Job]:
    """The jobs as a worker served them. live: they come over time, and what can no longer be in time is given up."""
    until = jobs[-1].at + FIRST + EACH * max(job.tokens for job in jobs) if live else 1e9
    asked = [(job.at, job.prompt, job.tokens) for job in jobs]
    answer = json.loads(worker.ask(json.dumps({"jobs": asked, "live": live, "until": until, "warm": warm})))
    return [dataclasses.replace(job, made=m, times=t) for job, (m, t) in zip(jobs, answer, strict=True)]


class Group:
    """The contestants of one model and one precision, and what they reached."""

    def __init__(self, weights: Path, dtype: str, pythons: dict[str, str], extent: Extent, names: Sequence[str]):
        self.extent, self.dtype = extent, dtype
        self.vocabulary = json.loads((weights / "config.json").read_text())["vocab_size"]
        self.found: dict[str, dict[str, list[float]]] = {}
        self.made: dict[str, list[list[int]]] = {}
        self.starts: list[float] = []
        self._workers: dict[str, Worker] = {}
        self._commands = {
            name: command(name, dtype, weights, extent.context, pythons)
            for name in names
            if dtype in CONTESTANTS[name].dtypes
        }

    def measure(self, rounds: int, quiet: bool) -> None:
        for name in self._commands:
            try:
                self._workers[name] = self._begin(name)
            except OSError as error:
                self._out(name, str(error))
        for name in list(self._workers):
            with self._or_out(name) as worker:
                version = worker.ask()
                if not version:
                    raise Ended(f"{CONTESTANTS[name].package} is not installed under {self._commands[name][0]}")
                print(f"{name}: {version}", file=sys.stderr)
        with Quiet(list(self._workers.values())) if quiet else contextlib.nullcontext():
            for seed in range(rounds + 1):  # the first, a short one, does not count
                for name in list(self._workers):
                    self._turn(name, seed)
            for rate in self.extent.rates:
                jobs = arrivals(self.extent, self.vocabulary, rate, rate)
                for name in list(self._workers):
                    with self._or_out(name) as worker:
                        found = goodput(served(worker, jobs, live=True), rate)
                        self.found[name][f"goodput, {rate}/s"] = [found]
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        for _ in range(self.extent.starts if "jaxsys" in self.found else 0):
            self._start()

    def _begin(self, name: str) -> Worker:
        return Worker(f"{name} {self.dtype}", self._commands[name], tempfile.TemporaryFile("w+"))

    @contextlib.contextmanager
    def _or_out(self, name: str):
        """A worker that is out of the race if it ends."""
        try:
            yield self._workers[name]
        except Ended as reason:
            self._out(name, str(reason))
            self._workers.pop(name).close()

    def _out(self, name: str, reason: str) -> None:
        print(f"{name}, {self.dtype}: not measured: {reason}", file=sys.stderr)
        self.found.pop(name, None)

    def _turn(self, name: str, seed: int) -> None:
        with self._or_out(name) as worker:
            for what, jobs in workloads(self.extent, self.vocabulary, seed).items():
                if not seed:
                    served(worker, [dataclasses.replace(job, tokens=min(job.tokens, 4)) for job in jobs])
                    continue
                jobs = served(worker, jobs)
                self.found.setdefault(name, {}).setdefault(what, []).append(tokens_per_second(jobs))
                if len(jobs) == WIDTH:
                    self.made[name] = [job.made for job in jobs]

    def _start(self) -> None:
        """From the start of a process to its first token; what it compiles is in the cache."""
        begin = time.perf_counter()
        self._workers["jaxsys"] = self._begin("jaxsys")
        with self._or_out("jaxsys") as worker:
            worker.ask()
            served(worker, [Job(0.0, [7] * 16, 1)], warm=False)
            self.starts.append(time.perf_counter() - begin)
            worker.close()

    def table(self) -> str:
        """Markdown: median, and how many times that jaxsys has. Last, jaxsys beside the best peer."""
        if not self.found:
            return f"{self.dtype}: nothing was measured"
        ours, columns = self.found.get("jaxsys"), list(next(iter(self.found.values())))
        lines = [
            f"| {self.dtype} | " + " | ".join(columns) + " | the same tokens |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for name, found in self.found.items():
            cells = [self._cell(what, found[what]) for what in columns]
            same = ""
            if ours is not None:
                if name != "jaxsys":
                    cells = [f"{c} {_ratio(ours[what], found[what])}" for c, what in zip(cells, columns, strict=True)]
                alike = sum(a == b for a, b in zip(self.made[name], self.made["jaxsys"], strict=True))
                same = f"{alike} of {WIDTH}"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {same} |")
        peers = [name for name in self.found if name in PEERS]
        if peers and ours is not None:
            best = {what: max(peers, key=lambda name: statistics.median(self.found[name][what])) for what in columns}
            cells = [f"{_ratio(ours[what], self.found[name][what])} ({name})" for what, name in best.items()]
            lines.append("| jaxsys / the best peer | " + " | ".join(cells) + " | |")
        if self.starts:
            seconds = ", ".join(f"{each:.1f}" for each in self.starts)
            lines += ["", f"jaxsys, process start to first token: {seconds} s"]
        return "\n".join(lines)

    def _cell(self, what: str, values: Sequence[float]) -> str:
        digits = 2 if what.startswith("goodput") else 1
        text = f"{statistics.median(values):,.{digits}f}"
        if len(values) > 1:
            text += f" ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
        return text


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the rounds' ratios."""
    if not all(theirs):
        return "-"
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}x"


# ------------------------------------------------------------------------------------------------------- scheduler


def scheduler_milliseconds(ordering: str, queued: int = 10_000, steps: int = 200) -> list[float]:
    """The scheduler's own time for each of so many batches while so many requests wait. ordering: fcfs or fair."""
    from jaxsys.serve.engine import FAST
    from jaxsys.serve.pages import Pages
    from jaxsys.serve.policies import FairShare, FirstComeFirstServed
    from jaxsys.serve.request import Request
    from jaxsys.serve.sampling import Sampling
    from jaxsys.serve.scheduler import Scheduler
    from jaxsys.serve.simulate import SimulatedExecutor

    draw = random.Random(0)
    policy = {"fcfs": FirstComeFirstServed, "fair": FairShare}[ordering]()
    scheduler, executor = Scheduler([Pages(1025, 64)], FAST, 4, ordering=policy), SimulatedExecutor(64)
    for i in range(queued + 4 * steps):
        prompt = draw.choices(range(50), k=draw.randint(16, 256))
        scheduler.add(Request(len(prompt), prompt, Sampling(max_tokens=32), seed=i, client=str(i % 100)))
    found = []
    for _ in range(steps):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        made = executor.run(plan)
        ran = time.perf_counter()
        scheduler.advance(plan, made)
        found.append(1e3 * (time.perf_counter() - ran + planned - begin))
    assert scheduler.queued >= queued
    return found


# ------------------------------------------------------------------------------------------------------------ main


def interpreters(peers: Sequence[str]) -> dict[str, str]:
    """Of each ``NAME=PYTHON``; exits with a line if one cannot be."""
    pythons = {}
    for peer in peers:
        name, _, python = peer.partition("=")
        if name not in PEERS or not os.access(python, os.X_OK):
            sys.exit(f"--peer {peer}: expected NAME=PYTHON, NAME one of {', '.join(PEERS)}, PYTHON an interpreter")
        pythons[name] = python
    return pythons


def write_weights(model: str, directory: Path) -> None:
    """A Hugging Face directory, in float32, of a model as jaxsys.load takes it, or random."""
    from jaxsys.console import Console
    from jaxsys.export import Asked, reshard

    if model == "tiny":
        write_random(ModelConfig("llama", 300, 64, 2, 2, 1, 32, 96, max_seq_len=QUICK.context), directory)
    elif model in MODELS:
        write_random(MODELS[model], directory)
    else:
        reshard(model, directory, Asked("hf"), Console())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        action="append",
        help=f"as jaxsys.load takes it; random weights: {', '.join(MODELS)}; repeatable. "
        "Default: smollm2-135m-instruct and llama-125m",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="repeatable; default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=list(CONTESTANTS), action="append", help="repeatable; default: all")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help="the interpreter that has a peer; repeatable"
    )
    parser.add_argument(
        "--quick", action="store_true", help="whether everything runs: a tiny model, on a busy machine too"
    )
    options = parser.parse_args()
    pythons = interpreters(options.peer)
    extent = QUICK if options.quick else Extent()
    models = ["tiny"] if options.quick else options.model or ["smollm2-135m-instruct", "llama-125m"]
    names = options.engine or list(CONTESTANTS)
    begin = time.perf_counter()
    for ordering in ("fcfs", "fair"):
        found = scheduler_milliseconds(ordering, steps=20 if options.quick else 200)
        print(
            f"scheduler, {ordering}, 10,000 requests wait: {statistics.median(found):.2f} ms a batch, "
            f"{max(found):.2f} at most"
        )
    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            weights = Path(directory) / "hf"
            write_weights(model, weights)
            for dtype in options.dtype or ["float32", "bfloat16"]:
                group = Group(weights, dtype, pythons, extent, names)
                group.measure(1 if options.quick else options.rounds, quiet=not options.quick)
                print(f"\n{model}, tokens/s and requests/s, {machine()}\n\n{group.table()}", flush=True)
    print(f"\n{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    restart_with_tunables()
    main()
