"""A small state of which every byte follows from step and version, saved without a device, and what must hold of it."""

from pathlib import Path

import numpy as np
from crash_model import is_lock

from checkpoint import Level, NativeSink, NativeSource, Rules, convert
from checkpoint.levels import OpenLevel
from checkpoint.storage import LocalStore, steps_in
from checkpoint.writer import Piece, blocks_of
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


def open_level(root, keep=2, zstd=None):
    return OpenLevel(Level("disk", root, keep=keep, zstd=zstd), LocalStore(root), SingleProcess())


def pieces(step, version=0, names=tuple(SPECS)):
    arrays = values(step, version)
    return [Piece(SPECS[name], (0,) * arrays[name].ndim, arrays[name]) for name in names]


def write(level, step, version=0, names=tuple(SPECS)):
    write_pieces(level, step, meta(step, version), [SPECS[name] for name in names], pieces(step, version, names))


def write_pieces(level, step, meta, specs, pieces):
    """As a manager does."""
    level.pin(step)
    try:
        level.write(step, meta, specs, blocks_of(pieces, CHUNK_BYTES))
    finally:
        level.unpin(step)


def version_of(reader):
    """Which version a checkpoint is of its step, having compared all of it."""
    step, version = reader.manifest.meta["is"]
    assert reader.manifest.step == step
    for name, expected in values(step, version).items():
        assert reader.read(name).tobytes() == expected.tobytes(), (step, version, name)
    return version


def named(level):
    """What the manifests of a level name, and the directories of that."""
    files = set().union(*(level._step(step).files for step in steps_in(level.store.names())))
    return files | {name.partition("/")[0] for name in files}


def there(root):
    return {path.relative_to(root).as_posix() for path in Path(root).rglob("*") if not is_lock(path.name)}


def check(root, keep, promised):
    """promised: (step, version) of all saves that had returned, in their order.

    The newest ``keep`` of the steps there are, or were promised, are there, not older than promised; all that are
    there are whole; a new writer leaves nothing but them, and can go on. Returns the step that it saves then.
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
    return following


def copy(source, destination, add_files=None):
    """The newest good step under ``source`` as a checkpoint of its own."""
    opened = NativeSource(source)
    chosen = Rules().apply(opened.arrays, opened.where)
    convert(opened, chosen, NativeSink(chosen, opened.step, opened.meta), destination, add_files=add_files)
