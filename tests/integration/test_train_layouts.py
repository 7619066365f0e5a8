"""A run as 1 process x 8 devices, 2 x 4, 4 x 2: the same bits, resumed across, stopped and failing together."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from tiny_runs import ROOT, state_bytes, write_recipe

from checkpoint import open_checkpoint
from jaxsys.train.metrics import read

spec = importlib.util.spec_from_file_location("local_launch", ROOT / "scripts" / "launch" / "local.py")
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)

MESH = "data=2,slices=2,fsdp=2,tensor=2"


class Job:
    """``jaxsys train`` as ``count`` processes of ``devices`` devices each. before: Python to run first in each.

    optimised: compile as users do; else as ``tiny_models.quickly_compiled``, all of them at the same time.
    """

    def __init__(self, recipe, count, devices, *settings, before="", optimised=False):
        port = local.free_port()
        paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        code = f"import sys\n{before}\nfrom jaxsys.cli.main import entry\nentry()"
        words = [word for setting in settings for word in ("--set", setting)]
        quickly = {} if optimised else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, "train", "--config", recipe, *words],
                env={**os.environ, **quickly, "PYTHONPATH": paths, **local.variables(index, count, devices, port)},
                cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for index in range(count)
        ]  # fmt: skip

    def finish(self, *codes):
        """Standard error of each process; all end with these exit codes, all with 0 if none is given."""
        try:
            errors = [process.communicate(timeout=180)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert tuple(p.returncode for p in self.processes) == (codes or (0,) * len(self.processes)), errors
        return ["".join(f"{line}\n" for line in text.splitlines() if "[Gloo]" not in line) for text in errors]

    def wait_for_step(self, run, step):
        gone = threading.Event()
        while all(process.poll() is None for process in self.processes):
            if any(row["step"] >= step and "loss" in row for row in read(run)):
                return
            gone.wait(0.05)
        raise AssertionError([process.communicate()[1] for process in self.processes])


def losses(run):
    return {row["step"]: row["loss"] for row in read(run) if "loss" in row}


# ----------------------------------------------------------------------------------------------------- same results


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, material):
    """The run directory and each process's messages by layout; 4 x 2 resumes from the middle of 2 x 4."""
    root = tmp_path_factory.mktemp("layouts")
    recipe = write_recipe(root / "recipe.py", material)
    spied = (
        "from jaxsys.data import Loader\nbatch = Loader.batch\n"
        "def spy(self, step, rows=slice(None)):\n"
        "    if isinstance(rows, list): print('rows', self.split, step, rows, file=sys.stderr)\n"
        "    return batch(self, step, rows)\n"
        "Loader.batch = spy"
    )
    found = {}
    for count, devices in ((1, 8), (2, 4), (4, 2)):
        run = root / f"{count}x{devices}"
        if count == 4:
            shutil.copytree(root / "2x4", run)
            for path in (run / "checkpoints").glob("step-*"):
                if path.name > "step-00000002":
                    shutil.rmtree(path)
        settings = (f"run={run}", f"mesh={MESH}", "data.batch_size=8", "accumulate=2", "steps=4")
        found[count] = run, Job(recipe, count, devices, *settings, before=spied, optimised=True).finish()
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_state_are_the_same_bits_for_every_layout_of_processes(layouts, count):
    (one, _), (other, _) = layouts[1], layouts[count]
    assert losses(other) == losses(one) and list(losses(one)) == [1, 2, 3, 4]
    expected = state_bytes(one, 4)
    assert any(name.startswith("optimizer.nu.") for name in expected)
    assert state_bytes(other, 4) == expected
    assert [row["heldout_loss"] for row in read(other) if "heldout_loss" in row][-1:] == [
        row["heldout_loss"] for row in read(one) if "heldout_loss" in row
    ][-1:]


def test_four_processes_resume_what_two_saved(layouts):
    run, (lead, *_) = layouts[4]
    assert f"resume: step 2 from disk, onto mesh {MESH}" in lead
    assert len(list((run / "checkpoints" / "step-00000004").glob("data-*.bin"))) == 4


def test_stages_may_lie_on_different_processes(tmp_path, material):
    """Two stages a process: activations cross between the second and the third, and the bits are those of one."""
    recipe = write_recipe(tmp_path / "recipe.py", material)
    found = []
    for count, devices in ((1, 4), (2, 2)):
        run = tmp_path / f"{count}x{devices}"
        settings = (f"run={run}", "mesh=stage=4", "model.n_layers=5", "data.batch_size=8", "accumulate=4", "steps=2")
        Job(recipe, count, devices, *settings).finish()
        found.append((losses(run), state_bytes(run, 2)))
    assert found[0] == found[1] and list(found[0][0]) == [1, 2]


def test_only_process_0_prints_and_records(layouts):
    for run, (lead, *others) in layouts.values():
        assert "train 4/4 loss" in lead and (run / "graphs.json").exists()
        for text in others:
            assert [line for line in text.splitlines() if not line.startswith("rows ")] == []
        rows = [row["step"] for row in read(run) if "loss" in row]
        assert rows == sorted(set(rows))


def test_each_process_makes_only_the_rows_that_its_devices_hold(layouts):
    """Eight rows in two microbatches over data=2 x fsdp=2: a row a shard, of every microbatch."""

    def rows(text):
        return {line.partition("[")[2] for line in text.splitlines() if line.startswith("rows train 2 ")}

    assert rows(layouts[1][1][0]) == {"slice(0, 8, None)]"}
    assert [rows(text) for text in layouts[2][1]] == [
        {"slice(0, 2, None), slice(4, 6, None)]"},
        {"slice(2, 4, None), slice(6, 8, None)]"},
    ]
    assert [rows(text) for text in layouts[4][1]] == [
        {f"slice({i}, {i + 1}, None), slice({i + 4}, {i + 5}, None)]"} for i in range(4)
    ]


# -------------------------------------------------------------------------------------------------- ending together

QUICK = ("mesh=fsdp=2", "checkpoint.every=1000000", "eval_batches=0")
LIMITS = ("liveness.dead=4", "liveness.stuck=5")


@pytest.fixture
def recipe(tmp_path, material):
    return write_recipe(tmp_path / "recipe.py", material)


def test_sigterm_to_one_process_saves_and_stops_all_after_the_same_step(recipe, tmp_path):
    job = Job(recipe, 2, 1, "steps=100000", *QUICK)
    job.wait_for_step(tmp_path / "run", 2)
    job.processes[1].send_signal(signal.SIGTERM)
    lead, other = job.finish()
    (saved,) = [int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert max(losses(tmp_path / "run")) == saved
    assert f"SIGTERM (process 1): all stop after step {saved}" in lead and f"resumes from step {saved}" in lead
    assert "SIGTERM: finishing the step" in other


HANG = """
import jax
from jaxsys.data import Loader
from jaxsys.train.trainer import Trainer
launch = Trainer._launch
def hang(self, batches, step):
    while step == 3 and jax.process_index() == 1:
        pass
    return launch(self, batches, step)
Trainer._launch = hang
"""


def test_a_process_that_hangs_in_the_loop_ends_the_run_and_is_named(recipe):
    lead, other = Job(recipe, 2, 1, *QUICK, *LIMITS, before=HANG).finish(3, 3)
    for text in (lead, other):
        assert "process 1 of 2 hangs in launching (step 4): no progress for" in text
    assert "while others wait in waiting for the devices" in lead and "in hang" in lead


LOOP = "while step == 3 and jax.process_index() == 1:\n        pass"
KILL = HANG.replace(LOOP, "if step == 3 and jax.process_index() == 1:\n        import os; os.kill(os.getpid(), 9)")


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_loop_ends_the_run_and_is_named(recipe):
    lead, _ = Job(recipe, 2, 1, *QUICK, *LIMITS, before=KILL).finish(3, -9)
    assert re.search(
        r"process 1 of 2 is dead or stopped: no sign of life for \d+ s .*it was in [a-z ]+ \(step \d\)", lead
    )
    assert "Traceback" not in lead


FULL = """
import errno, jax, os
from checkpoint.writer import ChunkWriter
def add(self, block):
    if jax.process_index() == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
ChunkWriter.add = add
"""


def test_a_disk_that_is_full_ends_all_with_the_reason(recipe):
    for text in Job(recipe, 2, 1, "steps=1", *QUICK, before=FULL).finish(1, 1):
        assert "step 1 was not saved" in text or "No space left" in text
        assert "stack trace" not in text and "is gone" not in text and "Traceback" not in text


SLOW = """
import jax, time
from jaxsys.train.launch import Launcher
prepare = Launcher.prepare
def slow(self, *args):
    time.sleep(40 * jax.process_index())
    return prepare(self, *args)
Launcher.prepare = slow
"""


@pytest.mark.slow
def test_a_process_that_compiles_longer_than_collectives_wait_is_waited_for(recipe):
    Job(recipe, 2, 1, "mesh=fsdp=2", "steps=1", before=SLOW).finish(0, 0)


DIFFER = """
import jax
from jaxsys.train.trainer import Trainer
launch = Trainer._launch
def differ(self, batches, step):
    if step == 3 and jax.process_index() == 1:
        self.finite_graph({**self.params, **self.opt_state})
    return launch(self, batches, step)
Trainer._launch = differ
"""


@pytest.mark.slow
def test_a_process_that_launches_another_program_ends_the_run_and_is_named_with_both(recipe):
    for text in Job(recipe, 2, 1, *QUICK, "steps=100000", before=DIFFER).finish(3, 3):
        assert "process 1 of 2 launches finite where process 0 launches train_step (launch 6): all must launch" in text


@pytest.mark.slow
@pytest.mark.parametrize("where", ["_compile", "_checkpoint"])
def test_a_process_that_is_killed_while_it_compiles_or_saves_is_named_and_checkpoints_stay_whole(
    recipe, tmp_path, where
):
    kill = f"""
import jax
from jaxsys.train.trainer import Trainer
method = Trainer.{where}
def killed(self, *args, **kwargs):
    if jax.process_index() == 1 and getattr(self, "step", 0) != 2:
        import os; os.kill(os.getpid(), 9)
    return method(self, *args, **kwargs)
Trainer.{where} = killed
"""
    before = kill if where == "_checkpoint" else kill.replace(' and getattr(self, "step", 0) != 2', "")
    lead, _ = Job(recipe, 2, 1, "mesh=fsdp=2", "eval_batches=0", *LIMITS, before=before).finish(3, -9)
    assert re.search(r"process 1 of 2 is dead or stopped: no sign of life for \d+ s .*it was in ", lead)
    kept = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == (["step-00000002"] if where == "_checkpoint" else [])
    assert all(open_checkpoint(path).verify().ok for path in kept)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_with_the_reason(recipe):
    for text in Job(recipe, 2, 1, *QUICK, "optim.learning_rate=1e38").finish(2, 2):
        assert "there is no good checkpoint: lower the learning rate" in text


CHANGED = "import os\nif os.environ['JAX_PROCESS_INDEX'] == '1':\n    sys.argv += ['--set', 'optim.learning_rate=1']"


def test_processes_whose_configurations_differ_are_told_before_they_compile(recipe):
    for text in Job(recipe, 2, 1, *QUICK, before=CHANGED).finish(2, 2):
        # Where one has ended before the other says so, JAX's own line on that may come first.
        said = (
            "jaxsys: configuration key optim.learning_rate: process 1 has 1.0, process 0 has 0.003: expected the same"
        )
        assert any(line.startswith(said) for line in text.splitlines()), text
