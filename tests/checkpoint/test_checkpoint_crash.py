"""Whatever a crash leaves of what was not synced, the last committed step is there and none is torn (``crash_model``).

The states that it may leave are made as directories and given to a new writer; ``check`` says what must hold of them.
"""

import ast
import contextlib
import errno
import functools
import inspect
import itertools
import logging
import os
import tempfile
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from crash_model import SYNCING, Killed, Recorder, crashes, is_lock, make_tree
from jax.sharding import SingleDeviceSharding

from checkpoint import Level, Manager, copy, levels, open_checkpoint, storage
from checkpoint.levels import OpenLevel
from checkpoint.storage import LocalStore, steps_in
from checkpoint.writer import Piece
from parallelism.coordinator import SingleProcess
from parallelism.layout import Layout, Logical, Stored

SPECS = {
    "frozen": Logical("frozen", (64,), np.dtype(np.float32), (None,)),
    "w": Logical("w", (64,), np.dtype(np.float32), (None,)),
    "count": Logical("count", (), np.dtype(np.int32), ()),
}
LAYOUT = Layout([Stored(s.name, s.shape, s.dtype, s.axes, (s,)) for s in SPECS.values()])
CHUNK_BYTES = 128


def values(step, version=0):
    """``frozen`` is the same in all steps."""
    line = np.arange(64, dtype=np.float32)
    count = np.asarray(100 * step + version, np.int32)
    return {"frozen": line + version, "w": line * step + version, "count": count}


def meta(step, version=0):
    return {"is": [step, version]}


def on_device(arrays):
    return {name: jax.device_put(array, jax.devices()[0]) for name, array in arrays.items()}


def open_level(root, keep=2):
    return OpenLevel(Level("disk", root, keep=keep), LocalStore(root), SingleProcess(), CHUNK_BYTES)


def write(level, step, version=0):
    pieces = [Piece(SPECS[name], (0,) * array.ndim, array) for name, array in values(step, version).items()]
    level.write(step, meta(step, version), list(SPECS.values()), pieces)


def version_of(reader):
    """Which version a checkpoint is of its step, having compared all of it."""
    step, version = reader.manifest.meta["is"]
    assert reader.manifest.step == step
    for name, expected in values(step, version).items():
        assert reader.read(name).tobytes() == expected.tobytes(), (step, version, name)
    return version


def named(level):
    """What the manifests of a level name, and the directories of that."""
    files = set().union(*(level._files_of(step) for step in steps_in(level.store.names())))
    return files | {name.partition("/")[0] for name in files}


def there(root):
    return {path.relative_to(root).as_posix() for path in Path(root).rglob("*") if not is_lock(path.name)}


def check(root, keep, promised):
    """promised: (step, version) of all saves that had returned, in their order.

    The newest ``keep`` of the steps there are, or were promised, are there, not older than promised; all that are
    there are whole; a new writer leaves nothing but them, and can go on.
    """
    level = open_level(root, keep)
    least = dict(promised)
    found = level.steps()
    missing = set(sorted({*found, *least})[-keep:]) - set(found)
    assert not missing, f"steps {missing} are lost"
    before = {step: version_of(level.open(step)) for step in found}
    for step, version in before.items():
        assert version >= least.get(step, 0), f"step {step} is an old version"
    level.acquire("")
    try:
        assert there(root) == named(level), "something is left over"
        assert {step: version_of(level.open(step)) for step in level.steps()} == before
        following = max([*found, *least], default=0) + 1
        write(level, following)
        after = {step: version_of(level.open(step)) for step in level.steps()}
        assert after == dict(sorted((before | {following: 0}).items())[-keep:])
        assert there(root) == named(level)
    finally:
        level.store.release()


@pytest.fixture(autouse=True)
def quiet(caplog):
    for name in ("checkpoint.reader", "checkpoint.levels"):
        caplog.set_level(logging.ERROR, name)


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
def recording(tmp_path, monkeypatch):
    return Recording(tmp_path / "recorded", monkeypatch)


@pytest.fixture
def crashed(monkeypatch):
    """Makes the directory of a state, for as long as it is looked at: in memory, as nothing there need last."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

    @contextlib.contextmanager
    def made(tree):
        with tempfile.TemporaryDirectory(dir=memory) as directory, monkeypatch.context() as m:
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
        copy(source.where, recording.root / "new" / "out", chunk_bytes=CHUNK_BYTES, add_files=add_files)
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
    """A fault at operation ``at``. kill: the process ends there. once: that one fails. on: so does all after it."""

    def __init__(self, how, at):
        self.how, self.at, self.count = how, at, 0

    def __call__(self, kind):
        self.count += 1
        if self.count > self.at and self.how == "kill":
            raise Killed
        if self.count > self.at and self.how == "on":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if self.count == self.at + 1:
            code = errno.EIO if kind == "sync" else errno.ENOSPC
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
            level.write(3, {}, list(SPECS.values()), (1 / 0 for _ in range(1)))
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
        at, struck = at + 1, strike.count > at
    return logs


@pytest.mark.parametrize("what", STRUCK)
@pytest.mark.parametrize("how", ["kill", "once", pytest.param("on", marks=pytest.mark.slow)])
def test_a_crash_after_a_kill_or_a_failure_loses_and_tears_nothing(tmp_path, monkeypatch, crashed, how, what):
    seen = set()
    logs = record_strikes(tmp_path, monkeypatch, how, what)
    assert len(logs) > 5
    for log, start in logs:
        check_level(log, crashed, "a", KEEP_ONE, start, seen)


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
