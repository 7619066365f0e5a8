"""``jaxsys train`` as processes: signals, resume, the compile cache, a disk that is really full."""

import json
import shutil
import signal
import subprocess
import threading

import pytest
from tiny_runs import start, write_recipe

from checkpoint import open_checkpoint
from jaxsys.train.metrics import read


@pytest.fixture
def recipe(tmp_path, material):
    return write_recipe(tmp_path / "recipe.py", material)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def train(recipe, *settings, flags=(), **options):
    return start("train", "--config", recipe, *(w for s in settings for w in ("--set", s)), *flags, **options)


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def wait_for_step(process, run, step):
    """Blocks until the run has recorded ``step``."""
    gone = threading.Event()
    while process.poll() is None:
        if any(row["step"] >= step and "loss" in row for row in read(run)):
            return
        gone.wait(0.05)
    raise AssertionError(process.communicate()[1])


def losses(run):
    return {row["step"]: row["loss"] for row in read(run) if "loss" in row}


LONG = ("steps=100000", "checkpoint.every=1000000", "eval_batches=0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_and_the_same_command_resumes(recipe, run, number):
    process = train(recipe, *LONG)
    wait_for_step(process, run, 2)
    process.send_signal(number)
    _, err = finish(process)
    (saved,) = [int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")]
    assert f"{number.name}: finishing the step" in err and f"resumes from step {saved}" in err
    assert max(losses(run)) == saved >= 2
    assert open_checkpoint(run / "checkpoints" / f"step-{saved:08}").verify().ok
    if number != signal.SIGTERM:  # after whichever signal, what resumes knows of no signal
        return

    process = train(recipe, *LONG)
    wait_for_step(process, run, saved + 1)
    process.send_signal(number)
    _, err = finish(process)
    assert f"resume: step {saved} from disk" in err
    assert sorted(losses(run)) == list(range(1, max(losses(run)) + 1))


HANG = """
import ctypes
from jaxsys.train.trainer import Trainer
mutex, c = ctypes.create_string_buffer(256), ctypes.CDLL(None)
def hang(*_):
    print("hanging", flush=True)
    while True:
        c.pthread_mutex_lock(mutex)  # no signal wakes the main thread, as when it waits for a device
Trainer._launch = hang
"""


def test_two_signals_at_once_are_two_although_the_main_thread_hangs(recipe):
    process = train(recipe, *LONG, before=HANG)
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGINT)
    threading.Event().wait(0.05)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=128 + signal.SIGINT)
    assert "SIGINT: finishing the step" in err


COUNT = """
import atexit, jax
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
atexit.register(lambda: print(*(seen.count("/jax/compilation_cache/cache_" + x) for x in ("misses", "hits"))))
"""


def test_the_second_start_of_a_job_compiles_nothing(recipe, run, tmp_path):
    """Counted by JAX itself, in the whole process; nobody says where the cache is but $JAXSYS_CACHE."""

    def job():
        cache = {"JAX_COMPILATION_CACHE_DIR": "", "JAXSYS_CACHE": str(tmp_path / "cache")}
        out, _ = finish(train(recipe, "mesh=fsdp=2", before=COUNT, **cache))
        return [int(n) for n in out.split()]

    misses, _ = job()
    assert misses > 0 and any((tmp_path / "cache" / "xla").iterdir())
    shutil.rmtree(run)
    misses, hits = job()
    assert misses == 0 and hits > 0
    assert all(row["cached"] for row in json.loads((run / "graphs.json").read_text()))
    misses, _ = job()  # resumed
    assert misses == 0


def test_profile_flag_and_graphs_command(recipe, run):
    finish(train(recipe, "eval_batches=0", flags=("--profile", "1:3")))
    assert list((run / "profile").rglob("*.xplane.pb"))
    out, _ = finish(start("graphs", run))
    assert out.splitlines()[0].split()[0] == "graph" and "train_step" in out
    out, _ = finish(start("graphs", run, "--json"))
    assert {row["name"] for row in json.loads(out)} == {"init", "init_optimizer", "finite", "train_step"}


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for about one checkpoint (of some 60 kB)."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_full_from_some_step_on(recipe, small_disk):
    run = small_disk / "run"
    settings = (f"run={run}", "optim.optimizer=sgd", "checkpoint.every=1", "checkpoint.keep=100", "steps=12")
    _, err = finish(train(recipe, *settings), code=1)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert "step-00000001" in kept and "step-00000012" not in kept
    assert "No space left on device" in err and "the last checkpoint FAILED" in err and "Traceback" not in err
    assert "step 12 of 12" in err

    for name in kept:
        assert open_checkpoint(run / "checkpoints" / name).verify().ok
