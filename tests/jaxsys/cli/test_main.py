"""How the program ends: signals, readers that go away, full disks, an environment that JAX does not start in."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsys.cli.main import COLLECTIVE_SECONDS, let_virtual_devices_wait, main

ROOT = Path(__file__).parents[3]
TWO_DEVICES = "--xla_force_host_platform_device_count=2"

# A model that says much and compiles nothing, and a word once it is asked.
FAKE = """
import sys, types
import jaxsys.llm
from jaxsys.cli.main import main
model = types.SimpleNamespace(
    engine=types.SimpleNamespace(graphs=[]), tokenizer=types.SimpleNamespace(eos_ids=()),
    submit=lambda prompts, *_, **__: [types.SimpleNamespace(made=1) for _ in prompts],
    pieces=lambda request: iter(["word "] * 100_000),
)
jaxsys.llm.load = lambda *_, **__: model
sys.exit(main(["generate", "--model", "some", "--prompt", "a", "--prompt", "b"]))
"""


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **variables}


def test_a_reader_that_goes_away_in_the_first_of_two_texts_is_not_an_error():
    with subprocess.Popen(
        [sys.executable, "-c", FAKE], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.read(5) == "word "
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in said and "rror" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_finds_no_room_is_one_line(tmp_path):
    (tmp_path / "graphs.json").write_text(json.dumps([]))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "jaxsys.cli.main", "graphs", tmp_path],
            env=environment(), stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "jaxsys: No space left on device: the output cannot be written; make room on the disk\n"


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="JAX would start")
@pytest.mark.parametrize(
    "variables", [{"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "gqu"}, {"JAX_NUM_CPU_DEVICES": "abc"}], ids=str
)
def test_an_environment_that_jax_does_not_start_in_is_one_line(tmp_path, variables):
    command = [sys.executable, "-m", "jaxsys.cli.main", "train", "--config", "llama_25m", "--set", f"run={tmp_path}"]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
    ((name, value),) = variables.items()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("jaxsys: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "JAX does not start with" in line and f"{name}={value}" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["train", "--config", "llama_25m", "--serve", "abc"],
            "--serve: found 'abc', expected a whole number; see jaxsys train",
        ),
        (["serve", "some", "--port=80a"], "--port: found '80a', expected a whole number; see jaxsys serve --help"),
        (["serve", "some", "--max_context", "9.5"], "--max-context: found '9.5', expected a whole number; see"),
        (["serve", "some", "--drain-seconds", "x"], "--drain-seconds: found 'x', expected a number; see jaxsys serve"),
    ],
)
def test_a_value_that_is_no_number_is_named(capsys, words, says):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"jaxsys: {says}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Missing subcommand: Expected one of"),
        (["serve"], "Missing from jaxsys serve: MODEL A run or checkpoint, "),
        (["reshard"], "Missing from jaxsys reshard: SOURCE A run, "),
        (["generate"], "Missing from jaxsys generate: --model STR A run or checkpoint, "),
        (["serve", "a", "b"], "Unrecognized options: b; see jaxsys serve --help"),
        (["serve", "a", "--dtype", "f16"], "--dtype: found 'f16', expected one of 'float32', 'bfloat16'; see jaxsys"),
        (["serve", "-p", "80", "a"], "unknown option of jaxsys serve '-p': "),
        (["serve", "a", "--port"], "--port: found no value, expected one; see jaxsys serve --help"),
    ],
)
def test_a_command_line_that_is_wrong_is_told_once(capsys, words, says):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"jaxsys: {says}") and said.count("\n") == 1


def interrupted(before=""):
    """How the program ends when the interrupt comes from its first heavy import, so that no clock decides. before:
    Python to run first."""
    code = (
        "import os, signal, sys, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background is born without
        f"{before}\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tyro':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from jaxsys.cli.main import entry\n"
        "entry()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_an_interrupt_while_modules_are_imported_ends_quietly():
    assert interrupted() == (130, "jaxsys: interrupted\n")


def test_an_interrupt_waits_for_nothing_that_threads_are_at():
    """A thread that never ends stands for a compile, which would crash in an interpreter that is taken down."""
    assert interrupted("threading.Thread(target=threading.Event().wait).start()") == (130, "jaxsys: interrupted\n")


@pytest.mark.parametrize(
    ("before", "flags"),
    [
        ({"JAX_NUM_CPU_DEVICES": "8"}, f"{COLLECTIVE_SECONDS}=600"),
        ({"XLA_FLAGS": TWO_DEVICES}, f"{TWO_DEVICES} {COLLECTIVE_SECONDS}=600"),
        ({"JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": f"{COLLECTIVE_SECONDS}=90"}, f"{COLLECTIVE_SECONDS}=90"),
        ({}, None),
    ],
    ids=str,
)
def test_virtual_devices_may_wait_for_each_other(before, flags, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(before))
    let_virtual_devices_wait()
    assert os.environ.get("XLA_FLAGS") == flags
