"""A dead, stopped, hung or failed process ends a job of real processes, whichever it is, and is named."""

import itertools
import os
import socket
import subprocess
import sys

import pytest

WORKER = """
import os, re, signal, sys, time
from parallelism.coordinator import default_coordinator
from parallelism.liveness import Limits, Watch
from parallelism.multihost import detect, start

what, who = sys.argv[1], int(sys.argv[2])
processes = start(detect(), 100)
with Watch(processes, Limits(dead=5, stuck=5, setup=60)) as watch:
    for step in range(1, 2000):
        watch.phase("batch", step)
        if step == 20 and processes.index == who:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "pause":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif what == "loop":
                while True:
                    pass
            elif what == "hold":
                re.match("(a+)+$", "a" * 60 + "b")  # never lets go of the interpreter
            elif what == "fail":
                raise ValueError("bad weather")
            elif what == "ask":
                watch.ask("SIGTERM")
            elif what == "differ":
                watch.launches.add("evaluate")
        watch.launches.add("train_step")
        watch.phase("gather", step)
        default_coordinator().gather("x", step)
        if watch.stops(step):
            print("stopped after", step, watch.reason, flush=True)
            break
        time.sleep(0.02)
"""
JOBS = [("kill", 0), ("pause", 1), ("loop", 1), ("hold", 1), ("fail", 1), ("ask", 1), ("differ", 1)]
MORE = [("kill", 1), ("pause", 0), ("loop", 0)]  # -m slow


def start_job(what, who):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_COUNT": "2", "PYTHONPATH": os.getcwd()}
    env = {**os.environ, **job, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-u", "-c", WORKER, what, str(who)],
            env={**env, "JAX_PROCESS_INDEX": str(i)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]


def outcomes(jobs):
    """(exit code, stdout, stderr) of both processes of each job; all jobs run at the same time."""
    found, running = {}, {job: start_job(*job) for job in jobs}
    try:
        for (what, who), processes in running.items():
            for i, process in enumerate(processes):
                if (what, i) != ("pause", who):  # that one stays until it is killed
                    process.wait(timeout=120)
    finally:
        for process in itertools.chain(*running.values()):
            process.kill()
    for job, processes in running.items():
        found[job] = [(p.returncode, *p.communicate()) for p in processes]
    return found


@pytest.fixture(scope="module")
def jobs():
    return outcomes(JOBS)


@pytest.mark.parametrize(("what", "who"), [("kill", 0), ("pause", 1)])
def test_a_dead_or_stopped_process_is_named_with_what_it_did(jobs, what, who):
    check_dead(jobs, what, who)


@pytest.mark.slow
def test_the_same_of_the_other_process():
    jobs = outcomes(MORE)
    check_dead(jobs, "kill", 1)
    check_dead(jobs, "pause", 0)
    check_hung(jobs, 0)


def check_dead(jobs, what, who):
    code, _, err = jobs[what, who][1 - who]
    assert code == 3, err
    assert f"process {1 - who} ends: process {who} of 2" in err and "it was in " in err
    assert ("is dead or stopped: no sign of life for" in err) or ("is gone: its port is closed" in err)


def test_an_endless_loop_is_named_with_its_stack(jobs):
    check_hung(jobs, 1)


def check_hung(jobs, who):
    (code, _, err), (other, _, others) = jobs["loop", who]
    assert (code, other) == (3, 3)
    for text in (err, others):
        assert f"process {who} of 2 hangs in batch (step 20): no progress for" in text
        assert "while others wait in gather (step 20)" in text
    assert "thread MainThread" in err and 'File "<string>"' in err


def test_a_process_that_holds_the_interpreter_dumps_its_stacks(jobs):
    (code, _, err), (_, _, held) = jobs["hold", 1]
    assert code == 3 and "process 1 of 2 is dead or stopped" in err
    assert "Timeout" in held and "match" in held


def test_a_failure_in_one_process_ends_the_others_with_its_reason(jobs):
    (code, _, err), (own, _, trace) = jobs["fail", 1]
    assert code == 3 and "process 1 of 2 failed in batch (step 20): ValueError: bad weather" in err
    assert own != 0 and "bad weather" in trace


def test_a_process_that_launches_something_else_is_named_with_both_programs(jobs):
    for code, _, err in jobs["differ", 1]:
        assert code == 3
        assert "process 1 of 2 launches evaluate where process 0 launches train_step (launch 20): all must" in err


def test_a_signal_in_one_process_stops_all_after_the_same_step(jobs):
    (code, out, _), (other, others, _) = jobs["ask", 1]
    assert (code, other) == (0, 0)
    assert out == others and out.endswith("SIGTERM (process 1)\n")
