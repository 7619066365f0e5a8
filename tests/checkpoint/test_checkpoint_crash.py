"""Whatever a crash leaves of what was not synced, the last committed step is there and none is torn (``crash_model``).

The states that it may leave are made as directories and given to a new writer; ``check`` says what must hold of them.
"""

import ast
import contextlib
import errno
import functools
import inspect
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import jax
import pytest
from crash_checks import (
    CHUNK_BYTES,
    LAYOUT,
    SPECS,
    check,
    copy,
    meta,
    named,
    open_level,
    there,
    values,
    version_of,
    write,
    write_pieces,
)
from crash_model import SYNCING, Killed, Recorder, crashes, make_tree
from jax.sharding import SingleDeviceSharding

from checkpoint import Level, Manager, levels, open_checkpoint, storage
from checkpoint.levels import OpenLevel
from checkpoint.storage import LocalStore
from parallelism.errors import UserError

pytestmark = pytest.mark.usefixtures("quiet_reader")

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def on_device(arrays):
    return {name: jax.device_put(array, jax.devices()[0]) for name, array in arrays.items()}


class Recording:
    """An empty directory of which all is recorded. Names that are random otherwise are the same in each."""

    def __init__(self, root, monkeypatch):
        ids = itertools.count()
        uuid4 = lambda: types.SimpleNamespace(hex=f"{next(ids):08x}")  # noqa: E731
        monkeypatch.setattr(levels, "uuid", types.SimpleNamespace(uuid4=uuid4))
        self.root = Path(root)
        self.root.mkdir(parents=True)
        self.recorder = Recorder(root)
        self._monkeypatch = monkeypatch

    @contextlib.contextmanager
    def on(self):
        with self._monkeypatch.context() as m:
            self.recorder.install(m)
            yield self.recorder


@pytest.fixture
def tmp_path():
    """In memory, where there is some: thousands of small files, and nothing there need last."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        yield Path(directory)


@pytest.fixture
def recording(tmp_path, monkeypatch):
    return Recording(tmp_path / "recorded", monkeypatch)


@pytest.fixture
def crashed(tmp_path, monkeypatch):
    """Makes the directory of a state, for as long as it is looked at."""

    @contextlib.contextmanager
    def made(tree):
        with tempfile.TemporaryDirectory(dir=tmp_path) as directory, monkeypatch.context() as m:
            m.setattr(os, "fsync", lambda fd: None)
            make_tree(root := Path(directory) / "root", tree)
            yield root

    return made


# -- a run: saves, promotions, retention, a step saved again

KEEP = {"runs/a/ram": 1, "runs/a/disk": 2}


def record_run(recording):
    """Saves through a manager; promises (level, step, version)."""
    root = recording.root
    with recording.on() as recorder:
        with Manager(
            [Level(Path(path).name, root / path, keep=keep) for path, keep in KEEP.items()], chunk_bytes=CHUNK_BYTES
        ) as manager:
            for step, version in [(1, 0), (2, 0), (3, 0), (3, 1), (4, 0)]:
                manager.save(step, on_device(values(step, version)), LAYOUT, meta(step, version)).wait()
                for path in KEEP:
                    recorder.mark((path, step, version))
            assert not manager.failures
        recorder.mark(None)
    return recorder.log


def check_run(log, crashed, seen=None):
    for path, keep in KEEP.items():
        check_level(log, crashed, path, keep, 0, seen)


def check_level(log, crashed, path, keep, start=0, seen=None):
    """seen: states of which it need not be checked again."""
    seen = set() if seen is None else seen
    for tree, marks in crashes(log, start=start):
        promised = tuple((step, version) for where, step, version in marks if where == path)
        part = {name.removeprefix(f"{path}/"): data for name, data in tree.items() if name.startswith(f"{path}/")}
        if (key := (keep, promised, frozenset(part.items()))) not in seen:
            seen.add(key)
            with crashed(part) as root:
                check(root, keep, promised)


def test_a_crash_at_any_moment_of_a_run_loses_and_tears_nothing(recording, crashed):
    check_run(record_run(recording), crashed)


# -- mending

DAMAGED, GOOD = "damaged", "good"


def record_mending(recording):
    """Two levels with the steps 1 and 2, which share chunks; of one a file is lost and in another a bit flips."""
    root = recording.root

    def harm(root):
        for step, keep in ((1, False), (2, True)):
            (file,) = (root / DAMAGED / f"step-{step:08d}").glob("data-*")
            data = bytearray(file.read_bytes())
            data[300] ^= 1
            file.write_bytes(data) if keep else file.unlink()

    with recording.on() as recorder:
        two = [Level(name, root / name) for name in (DAMAGED, GOOD)]
        with Manager(two, chunk_bytes=CHUNK_BYTES) as manager:
            for step in (1, 2):
                manager.save(step, on_device(values(step)), LAYOUT, meta(step)).wait()
            recorder.damage(harm)
            recorder.mark("damaged")
            one = SingleDeviceSharding(jax.devices()[0])
            manager.restore(layout=LAYOUT, shardings=dict.fromkeys(LAYOUT, one))
            recorder.mark("mended")
    return recorder.log


def check_mending(log, crashed, seen=None):
    start = next(at for at, op in enumerate(log) if op.what == "damaged") + 1
    for tree, marks in crashes(log, start=start):
        with crashed(tree) as root:
            good, damaged = open_level(root / GOOD), open_level(root / DAMAGED)
            others = [] if "mended" in marks else [good.open(2)]
            version_of(damaged.open(2, others))
            version_of(good.open(2))


def test_a_crash_while_a_step_is_mended_makes_nothing_worse_and_what_was_mended_lasts(recording, crashed):
    check_mending(record_mending(recording), crashed)


# -- a copy

TOKENIZER = b"words " * 100


def record_copy(recording):
    source = open_level(recording.root.parent / "source")
    for step in (1, 2):
        write(source, step)

    def add_files(directory):
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "words.json").write_bytes(TOKENIZER)

    with recording.on() as recorder:
        copy(source.where, recording.root / "new" / "out", add_files=add_files)
        recorder.mark("copied")
    return recorder.log


def check_copy(log, crashed, seen=None):
    for tree, marks in crashes(log):
        with crashed(tree) as root:
            out = root / "new" / "out"
            assert out.exists() or not marks
            if out.exists():
                version_of(open_checkpoint(out))
                assert (out / "tokenizer" / "words.json").read_bytes() == TOKENIZER
            write(level := open_level(root / "source"), 1)
            if not out.exists():
                copy(level.where, out)
                version_of(open_checkpoint(out))
            assert there(root / "new") == {f"out/{name}" for name in there(out)} | {"out"}


def test_a_copy_is_whole_or_not_there_after_a_crash_and_the_next_leaves_nothing_else(recording, crashed):
    check_copy(record_copy(recording), crashed)


# -- a kill or a failure at every operation, and then the power goes


class Strike:
    """A fault at operation ``at``. kill: the process ends there. once: that one fails. on: so does all after it.

    kinds: of the operations that were struck."""

    def __init__(self, how, at):
        self.how, self.at, self.count, self.kinds = how, at, 0, []

    def __call__(self, kind):
        self.count += 1
        if self.count <= self.at or (self.how == "once" and self.kinds):
            return
        self.kinds.append(kind)
        if self.how == "kill":
            raise Killed
        code = errno.EROFS if self.how == "on" else errno.EIO if kind == "sync" else errno.ENOSPC
        raise OSError(code, os.strerror(code))


def save_next(level, recorder):
    write(level, 2)
    recorder.mark(("a", 2, 0))


def save_again(level, recorder):
    write(level, 1, 1)
    recorder.mark(("a", 1, 1))


def mend(level, recorder):
    """Step 1, of which the file is lost."""
    with contextlib.ExitStack() as stack:
        good = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write(open_level(good), 1)
        reader = level.open(1, [open_level(good).open(1)])
        version_of(reader)
    assert level.mend(1, reader)


def lose_chunks(root):
    (file,) = (root / "a" / "step-00000001").glob("data-*")
    file.unlink()


KEEP_ONE = 1  # so that a step that does not last would be a reason to delete the only one
STRUCK = {"next": save_next, "again": save_again, "mend": mend}


def record_strike(recording, strike, doing):
    """Saves step 1, then does what the fault strikes; then, with no fault, a save that fails for no reason of the disk
    and step 3. Returns where in the log the fault was."""
    path = recording.root / "a"
    with recording.on() as recorder:
        level = open_level(path, KEEP_ONE)
        level.acquire("")
        write(level, 1)
        if doing is mend:
            recorder.damage(lose_chunks)
        else:
            recorder.mark(("a", 1, 0))
        start, recorder.fault = len(recorder.log), strike
        with contextlib.suppress(Killed, OSError):
            doing(level, recorder)
        recorder.fault = None
        if strike.how == "kill":
            level.store.release()
            level = open_level(path, KEEP_ONE)
            level.acquire("")
        with pytest.raises(ZeroDivisionError):
            write_pieces(level, 3, {}, list(SPECS.values()), (1 / 0 for _ in range(1)))
        recorder.mark(None)
        write(level, 3)
        recorder.mark(("a", 3, 0))
        assert there(path) == named(level)
        level.store.release()
    return start


def record_strikes(tmp_path, monkeypatch, how, what):
    """A log, and where in it the fault was, for each operation."""
    logs, at, struck = [], 0, True
    while struck:
        recording, strike = Recording(tmp_path / how / what / str(at) / "recorded", monkeypatch), Strike(how, at)
        start = record_strike(recording, strike, STRUCK[what])
        # After a loss there is no good step until the next save has returned.
        log = recording.recorder.log
        logs.append((log, len(log) - 1 if what == "mend" else start))
        at, struck = at + 1, bool(strike.kinds)
    return logs


@pytest.mark.parametrize("what", STRUCK)
@pytest.mark.parametrize("how", ["kill", "once", pytest.param("on", marks=pytest.mark.slow)])
def test_a_crash_after_a_kill_or_a_failure_loses_and_tears_nothing(tmp_path, monkeypatch, crashed, how, what):
    seen = set()
    logs = record_strikes(tmp_path, monkeypatch, how, what)
    assert len(logs) > 5
    for log, start in logs:
        check_level(log, crashed, "a", KEEP_ONE, start, seen)


# -- a full or a broken disk


@pytest.mark.parametrize("how", ["once", "on"])
def test_wherever_the_disk_fails_saving_goes_on_and_is_loud_and_leaves_nothing(tmp_path, monkeypatch, caplog, how):
    """A fault at every operation of a save, in either level: full or broken once, or read-only until the next save."""
    struck, failed = True, 0
    for at in itertools.count():
        if not struck:
            break
        recording, strike = Recording(tmp_path / str(at) / "recorded", monkeypatch), Strike(how, at)
        paths = {name: recording.root / name for name in ("ram", "disk")}
        caplog.clear()
        with (
            recording.on() as recorder,
            Manager([Level(name, path, keep=1) for name, path in paths.items()], chunk_bytes=CHUNK_BYTES) as manager,
        ):
            save = lambda step: manager.save(step, on_device(values(step)), LAYOUT, meta(step))  # noqa: E731
            save(1).wait()
            recorder.fault = strike
            save(2)
            manager.wait()
            recorder.fault = None
            struck = bool(strike.kinds)
            loud = [record for record in caplog.records if record.name.startswith("checkpoint.")]
            # An empty directory may stay without a word: the next save removes it.
            assert bool(loud) == bool(set(strike.kinds) - {"rmdir"})
            assert all(isinstance(each.error, UserError) for each in manager.failures)
            failed += len(manager.failures)
            missed = {each.level for each in manager.failures}
            for name, path in paths.items():
                level = open_level(path)
                last = level.steps()[-1]
                assert last == 2 or name in missed
                version_of(level.open(last))
            save(3).wait()
            for path in paths.values():
                level = open_level(path)
                assert level.steps() == [3] and there(path) == named(level)
                version_of(level.open(3))
    assert at > 30 and failed > 20


# -- every sync is needed


def syncs():
    """Where ``checkpoint.storage`` syncs: as ``file:line`` with the source of the call."""
    tree = ast.parse(inspect.getsource(storage))
    made_for_it = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name in SYNCING]
    inside = {id(node) for f in made_for_it for node in ast.walk(f)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in inside]
    names = {f"{prefix}{name}" for name in ("fsync", *SYNCING) for prefix in ("", "os.", "self.")}
    return {f"storage.py:{call.lineno}": ast.unparse(call) for call in calls if ast.unparse(call.func) in names}


def test_without_any_one_sync_a_crash_loses_or_tears_something(tmp_path, monkeypatch, crashed):
    logs = []
    for number, scenario in enumerate(
        [(record_mending, check_mending), (record_copy, check_copy), (record_run, check_run)]
    ):
        record, check_log = scenario
        logs.append((record(Recording(tmp_path / str(number) / "recorded", monkeypatch)), check_log))
    for what in STRUCK:
        for log, start in record_strikes(tmp_path, monkeypatch, "kill", what):
            logs.append((log, functools.partial(check_level, path="a", keep=KEEP_ONE, start=start)))
    calls = syncs()

    def site(op):
        """Bytes and names apart, but where all that there is to sync is synced."""
        line = op.site.partition(" ")[0]
        return line if "_settle_all" in calls.get(line, "") else op.site

    sites = {site(op) for log, _ in logs for op in log if op.site.startswith("storage.py")}
    assert {name.partition(" ")[0] for name in sites} == set(calls), "a sync that nothing here makes"
    assert not [name for name in sorted(sites) if not is_needed(name, site, logs, crashed)]


def is_needed(name, site, logs, crashed):
    seen = set()
    for log, check_log in logs:
        without = [op for op in log if site(op) != name]
        if len(without) < len(log):
            try:
                check_log(without, crashed, seen=seen)
            except Exception:
                return True
    return False


# -- a process that is really killed


@pytest.mark.parametrize("how", ["levels", "manager"])
@pytest.mark.parametrize("kills", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_a_process_killed_at_random_moments_loses_and_leaks_nothing(tmp_path, how, kills):
    program = [sys.executable, str(Path(__file__).with_name("kill_runs.py")), str(tmp_path), str(kills), "0", how]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "1"}
    run = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    committed, copies = map(int, run.stdout.split())
    assert committed > kills and (copies or how == "manager")


# -- threads


def test_what_another_thread_sweeps_is_never_a_step_that_is_being_committed(tmp_path, monkeypatch):
    """A later level lets go of a step, so that this one deletes, at the moment when the next step is committed here."""
    level = open_level(tmp_path / "a")
    level.acquire("")
    write(level, 1)
    level.pin(1)
    ready, looked, committed = threading.Event(), threading.Event(), threading.Event()
    put, names, sweep = LocalStore.put, LocalStore.names, OpenLevel._sweep

    def put_when_looked(*args):
        ready.set()
        assert looked.wait(30)
        put(*args)

    def names_before_the_commit(store):
        found = names(store)
        looked.set()
        committed.wait(0.5)  # in vain, where a commit has to wait for the sweep
        return found

    def sweep_in_the_middle(self):
        if threading.current_thread() is threading.main_thread():
            m.setattr(LocalStore, "names", names_before_the_commit)
        sweep(self)

    def save():
        write(level, 2)
        committed.set()

    writer = threading.Thread(target=save)
    with monkeypatch.context() as m:
        m.setattr(LocalStore, "put", put_when_looked)
        writer.start()
        assert ready.wait(30)
        m.setattr(OpenLevel, "_sweep", sweep_in_the_middle)
        level.unpin(1)
    writer.join()
    assert version_of(level.open(2)) == 0
