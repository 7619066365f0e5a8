"""The launch scripts: a job of processes on this machine, and manifests whose variables are those that are read."""

import importlib.util
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from parallelism.multihost import detect

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
spec = importlib.util.spec_from_file_location("local_launch", LAUNCH / "local.py")
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)


def launch(code, *flags, processes=2):
    command = [
        sys.executable,
        LAUNCH / "local.py",
        "--processes",
        str(processes),
        *flags,
        "--",
        sys.executable,
        "-c",
        code,
    ]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


WHO = "import os; index = int(os.environ['JAX_PROCESS_INDEX'])\n"


def test_each_process_is_told_which_it_is_and_its_lines_say_so():
    code = WHO + "import sys; print(index, os.environ['JAX_NUM_CPU_DEVICES']); print('said', file=sys.stderr)"
    process = launch(code, "--devices", "3", processes=4)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == [f"[{i}] {i} 3" for i in range(4)]
    assert sorted(err.splitlines()) == [f"[{i}] said" for i in range(4)]


def test_the_exit_code_is_of_the_first_that_failed_and_no_process_stays():
    process = launch(WHO + "import sys, time; sys.exit(7) if index else time.sleep(1000)", "--grace", "0.2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert err.splitlines() == [
        "local.py: process 1 ended with exit code 7; process 0 gets 0.2 s to end",
        "local.py: process 0 did not end: killed",
    ]


def test_a_killed_process_is_told_as_a_shell_does():
    process = launch(WHO + "os.kill(os.getpid(), 9) if index else None")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "local.py: process 1 was ended by SIGKILL" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no signal for it")
def test_no_process_outlives_the_launcher_however_that_ends():
    process = launch(WHO + "import time; print(os.getpid(), flush=True); time.sleep(1000)")
    pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.kill()
    process.communicate(timeout=60)  # the pipes close when the last process that holds them is gone

    def runs(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    for _ in range(200):
        if not any(map(runs, pids)):
            return
        threading.Event().wait(0.05)
    raise AssertionError(pids)


def test_signals_go_to_all_processes():
    code = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('told'), sys.exit(0)))\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    process = launch(code)
    ready = [process.stdout.readline() for _ in range(2)]
    assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and sorted(out.splitlines()) == ["[0] told", "[1] told"]


def test_what_the_local_launcher_sets_is_what_is_read():
    found = detect(environment=local.variables(1, 4, 2, 1234))
    assert (found.coordinator, found.count, found.index) == ("127.0.0.1:1234", 4, 1)


def test_what_the_jobset_sets_is_what_is_read():
    text = (LAUNCH / "jobset.yaml").read_text()
    variables = dict(re.findall(r'\{name: (\w+), value: "([^"]+)"\}', text))
    pods = {int(n) for n in re.findall(r"(?:parallelism|completions): (\d+)", text)}
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    found = detect(environment={**pod, **variables})
    assert {found.count} == pods and found.index == 3
    # A pod's name is JobSet-replicatedJob-job-pod, its subdomain that of the JobSet.
    jobset, job = re.findall(r"^ *(?:- )?name: (\w+)$", text, re.MULTILINE)[:2]
    assert found.coordinator == f"{jobset}-{job}-0-0.{jobset}:8476"


def test_the_slurm_script_starts_processes_as_a_step_and_is_a_script():
    script = LAUNCH / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert re.search(r"^exec srun .*jaxsys train .*\"\$@\"$", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("flags", [["--processes", "0", "--", "true"], ["--processes", "2"]])
def test_a_launch_that_makes_no_sense_is_refused(flags):
    done = subprocess.run([sys.executable, LAUNCH / "local.py", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and "error:" in done.stderr


def test_a_program_that_is_not_there_is_one_line():
    command = [sys.executable, LAUNCH / "local.py", "--", "no-such-program", "train"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2 and "no-such-program: no such program" in done.stderr.splitlines()[-1]
