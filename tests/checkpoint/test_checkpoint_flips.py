"""Damage of every kind, anywhere, is found; and made good, on disk too, where another level has the step."""

import contextlib
import itertools
import json
import os
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from crash_checks import LAYOUT, SPECS, meta, named, open_level, pieces, there, values, version_of, write, write_pieces
from crash_model import tree_of
from jax.sharding import SingleDeviceSharding

from checkpoint import Level, Manager, find_checkpoint
from checkpoint.manifest import MANIFEST, CorruptError, digest
from checkpoint.storage import directory_of
from parallelism.errors import UserError

pytestmark = pytest.mark.usefixtures("quiet_reader")

STEP = 2  # shares chunks with step 1


class Levels:
    """Two levels with the steps 1 and 2, of which the first is damaged and the second is good."""

    def __init__(self, root, zstd=None):
        self.root = root
        self.first, self.second = (open_level(root / name, zstd=zstd) for name in ("first", "second"))
        for level in (self.first, self.second):
            write(level, 1, names=["frozen"])  # no more than the next step shares
            write(level, STEP)
        self.good = tree_of(root)
        self.files = [Path(name) for name in sorted(self.first._step(STEP).files)]
        assert len({file.parent for file in self.files}) == 2

    def path(self, file):
        return self.root / "first" / file

    def undo(self):
        """The levels as they were."""
        for name in tree_of(self.root).keys() - self.good.keys():
            (self.root / name).unlink()
        for name, data in self.good.items():
            if data is not None:
                (self.root / name).write_bytes(data)

    def check_found(self):
        """Neither verification nor a restore takes the step, and no other way leads to it."""
        with pytest.raises(CorruptError):
            version_of(self.first.open(STEP))
        with contextlib.suppress(CorruptError):
            assert not self.first.open(STEP).verify().ok
        try:
            found = find_checkpoint(self.root / "first").name
        except UserError:
            found = None  # damage in a chunk that both steps share
        assert found in (None, directory_of(1))

    def check_made_good(self):
        """The step is read bitwise with the help of the second level, and what was damaged on disk is as it was."""
        reader = self.first.open(STEP, [self.second.open(STEP)])
        version_of(reader)
        assert self.first.mend(STEP, reader)
        assert tree_of(self.root) == self.good


@pytest.fixture(scope="module", params=[None, 3], ids=["plain", "zstd"])
def module_levels(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setattr("checkpoint.cells.CELL_BYTES", 16 if request.param is None else 128)  # tables do not compress
        found = Levels(tmp_path_factory.mktemp("flips"), request.param)
        chunks = [c for array in found.first.open(STEP).manifest.arrays.values() for c in array.chunks]
        assert any(c.zstd for c in chunks) == bool(request.param)
        yield found


@pytest.fixture
def levels(module_levels):
    yield module_levels
    module_levels.undo()


def flip(path, at):
    """The bit number ``at`` of a file."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at // 8)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << at % 8]), at // 8)


def flips(levels, count, seed):
    """(file, bit) of so many places, evenly over all bytes of the step."""
    rng = random.Random(seed)
    sizes = [8 * levels.path(file).stat().st_size for file in levels.files]
    for _ in range(count):
        file = rng.choices(levels.files, sizes)[0]
        yield file, rng.randrange(8 * levels.path(file).stat().st_size)


def test_of_a_thousand_flipped_bits_all_are_found_and_made_good(levels):
    places = set()
    for file, at in flips(levels, 1000, seed=0):
        flip(levels.path(file), at)
        levels.check_found()
        if file.name == MANIFEST:
            version_of(levels.second.open(STEP))
            flip(levels.path(file), at)
        else:
            levels.check_made_good()
        places.add(file)
    assert places == set(levels.files)


def test_a_manager_restores_in_spite_of_any_flipped_bit_and_leaves_both_levels_good(levels, caplog):
    sharding = SingleDeviceSharding(jax.devices()[0])
    flipped = [(file, at) for file in levels.files for each, at in flips(levels, 60, seed=3) if each == file]
    assert {file for file, _ in flipped} == set(levels.files)
    for file, at in flipped:
        flip(levels.path(file), at)
        two = [Level(name, levels.root / name, zstd=levels.first.level.zstd) for name in ("first", "second")]
        with Manager(two) as manager:
            restored = manager.restore(layout=LAYOUT, shardings=dict.fromkeys(LAYOUT, sharding))
            assert restored.step == STEP and not manager.failures
            assert [report.ok for report in manager.verify()] == [True, True]
        for name, expected in values(STEP).items():
            assert np.asarray(restored.arrays[name]).tobytes() == expected.tobytes()
        assert there(levels.root / "first") == named(open_level(levels.root / "first"))
        if file.name == MANIFEST:  # the step has new files
            assert "damaged manifest and is written again" in caplog.text
            caplog.clear()
            levels.undo()
        assert tree_of(levels.root) == levels.good


def test_a_manifest_that_cannot_be_read_or_written_ends_no_restore(levels, caplog):
    """As on a disk with a bad sector: here it is a directory."""
    path = levels.path(f"{directory_of(STEP)}/{MANIFEST}")
    path.unlink()
    path.mkdir()
    with Manager([Level(name, levels.root / name) for name in ("first", "second")]) as manager:
        sharding = SingleDeviceSharding(jax.devices()[0])
        restored = manager.restore(layout=LAYOUT, shardings=dict.fromkeys(LAYOUT, sharding))
    assert (restored.step, restored.source) == (STEP, "second")
    assert f"step {STEP} in {levels.root / 'first'} stays damaged: [Errno" in caplog.text
    path.rmdir()


def test_no_box_is_ever_read_wrong(levels):
    """Not all of a chunk is read for a box: what is, is right, or the damage is found."""
    rng, outcomes = random.Random(1), []
    expected = {name: levels.second.open(STEP).read(name) for name in SPECS}
    data = [file for file in levels.files if file.name != MANIFEST]
    for _ in range(300):
        path = levels.path(rng.choice(data))
        at = rng.randrange(8 * path.stat().st_size)
        flip(path, at)
        name, start = rng.choice(["frozen", "w"]), rng.randrange(60)
        box = (slice(start, start + 4),)
        try:
            outcomes.append("right")
            assert levels.first.open(STEP).read(name, box).tobytes() == expected[name][box].tobytes()
        except CorruptError:
            outcomes[-1] = "found"
        flip(path, at)
    assert min(outcomes.count("right"), outcomes.count("found")) > 20


def test_every_byte_of_every_file_has_a_digest(levels):
    used = {}
    for step in (1, STEP):
        for array in levels.first.open(step).manifest.arrays.values():
            for chunk in array.chunks:
                file = os.path.normpath(f"{directory_of(step)}/{chunk.file}")
                used.setdefault(file, set()).update(range(chunk.offset, chunk.offset + chunk.stored_bytes))
    files = {f"{directory}/{name}" for directory, names in levels.first.store.names().items() for name in names}
    assert used.keys() == {file for file in files if not file.endswith(MANIFEST)}
    for file, offsets in used.items():
        assert offsets == set(range(levels.path(file).stat().st_size)), file


def test_a_file_cut_anywhere_is_found_and_made_good(levels):
    rng = random.Random(2)
    for file in levels.files:
        size = levels.path(file).stat().st_size
        for length in {0, size - 1, *(rng.randrange(size) for _ in range(10))}:
            os.truncate(levels.path(file), length)
            levels.check_found()
            if file.name != MANIFEST:
                levels.check_made_good()
            levels.undo()


def test_a_missing_file_is_found_and_made_good(levels):
    for file in levels.files:
        levels.path(file).unlink()
        if file.name == MANIFEST:
            assert levels.first.steps() == [1] and find_checkpoint(levels.root / "first").name == directory_of(1)
        else:
            levels.check_found()
            levels.check_made_good()
        levels.path(file).write_bytes(levels.good[f"first/{file}"])


def test_a_directory_with_all_that_is_shared_is_made_good(levels):
    """As when the only file that was left of an older step is lost, and a writer removed the empty directory."""
    (shared,) = [file for file in levels.files if file.parent.name != directory_of(STEP)]
    manifest = levels.path(shared.parent / MANIFEST)
    kept = manifest.read_bytes()
    for path in (manifest, levels.path(shared)):
        path.unlink()
    levels.path(shared.parent).rmdir()
    levels.check_found()
    reader = levels.first.open(STEP, [levels.second.open(STEP)])
    version_of(reader)
    assert levels.first.mend(STEP, reader)
    version_of(levels.first.open(STEP))
    manifest.write_bytes(kept)


def test_files_that_changed_places_are_found_and_made_good(levels):
    for one, other in itertools.combinations(levels.files, 2):
        for file, twin in ((one, other), (other, one)):
            levels.path(file).write_bytes(levels.good[f"first/{twin}"])
        levels.check_found()
        if MANIFEST not in (one.name, other.name):
            reader = levels.first.open(STEP, [levels.second.open(STEP)])
            version_of(reader)
            levels.first.mend(STEP, reader)
            version_of(levels.first.open(STEP))
        levels.undo()


def test_a_zeroed_page_is_found_and_made_good(levels):
    for file in levels.files:
        good = levels.good[f"first/{file}"]
        for at in range(0, len(good), 512):
            page = good[at : at + 512]
            if any(page):
                levels.path(file).write_bytes(good[:at] + bytes(len(page)) + good[at + 512 :])
                levels.check_found()
                if file.name != MANIFEST:
                    levels.check_made_good()
                levels.undo()


@pytest.mark.parametrize("chunks", ["own", "shared"])
def test_an_older_steps_manifest_in_place_of_the_new_is_found(levels, tmp_path, chunks):
    if chunks == "shared":  # so that all that the older one names is there
        levels = Levels(tmp_path)
        for step in (3, 4):
            write_pieces(levels.first, step, meta(STEP), list(SPECS.values()), pieces(STEP))
        old, new = (levels.path(f"{directory_of(step)}/{MANIFEST}") for step in (3, 4))
        new.write_bytes(old.read_bytes())
        with pytest.raises(CorruptError, match="holds step 3, expected 4"):
            levels.first.open(4)
        assert find_checkpoint(levels.root / "first").name == directory_of(3)
    else:
        levels.path(f"{directory_of(STEP)}/{MANIFEST}").write_bytes(levels.good[f"first/{directory_of(1)}/{MANIFEST}"])
        levels.check_found()


def test_a_manifest_with_a_right_digest_and_a_wrong_one_of_a_chunk_is_found(levels):
    path = levels.path(f"{directory_of(STEP)}/{MANIFEST}")
    body = json.loads(path.read_bytes())
    del body["digest"]
    for array, field in itertools.product(sorted(SPECS), ("digest", "offset")):
        edited = json.loads(json.dumps(body))
        chunk = edited["arrays"][array]["chunks"][0]
        chunk[field] = chunk[field][::-1] if field == "digest" else chunk[field] + 1
        head = json.dumps(edited, separators=(",", ":")).encode()[:-1]
        path.write_bytes(head + f'\n,"digest":"{digest(head)}"}}\n'.encode())
        levels.check_found()
        if field == "digest":  # no level has a chunk with that
            with pytest.raises(CorruptError):
                version_of(levels.first.open(STEP, [levels.second.open(STEP)]))
