"""What lies in a place, whether it is good, mending, copying and collecting; a kill at every step of both."""

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoint import Level, Manager, Place, collect, copy_steps, find_place, list_steps, root_of, verify
from checkpoint import copying as copying_module
from checkpoint.levels import OpenLevel
from checkpoint.manifest import CorruptError, digest
from checkpoint.reader import CheckpointReader
from checkpoint.storage import LocalFiles, LocalStore
from checkpoint.writer import Piece, blocks_of
from parallelism.coordinator import SingleProcess
from parallelism.errors import UserError
from parallelism.layout import Logical

ROOT = Path(__file__).parents[2]
SPEC = {name: Logical(name, (8, 8), np.dtype(np.float32), ("embed", None)) for name in "abcd"}
STEP = "step-{:08d}"


def save(root, zstd=None, **steps):
    """save(root, s10="aab") writes step 10, in which arrays a, b, c have the values of these letters."""
    level = OpenLevel(Level("disk", root, keep=None, zstd=zstd), LocalStore(root), SingleProcess())
    level.acquire("")
    for step, letters in steps.items():
        specs = [SPEC[name] for name, _ in zip("abcd", letters, strict=False)]
        pieces = [Piece(spec, (0, 0), value(x)) for spec, x in zip(specs, letters, strict=True)]
        level.write(int(step[1:]), {"config": {"x": letters}}, specs, blocks_of(pieces, 128))
    level.store.release()
    return Path(root)


def value(letter):
    return np.random.default_rng(ord(letter)).integers(0, 9, (8, 8)).astype(np.float32)


def check(path, letters):
    """The step holds these values, every chunk of it good."""
    reader = CheckpointReader(LocalFiles(Path(path)))
    assert reader.verify().ok and reader.manifest.meta == {"config": {"x": letters}}
    for name, letter in zip("abcd", letters, strict=False):
        np.testing.assert_array_equal(reader.read(name), value(letter))


@pytest.fixture
def root(tmp_path):
    """Step 1 has a, b and c, step 2 another c, step 3 another b."""
    return save(tmp_path / "run" / "checkpoints", s1="xxx", s2="xxy", s3="xzy")


def data_file(root, step):
    (found,) = (root / STEP.format(step)).glob("data-*")
    return found


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def disk(root):
    return sum(len(raw) for raw in tree(root).values())


def edit_manifest(path, edit):
    """Change a manifest, and its digest with it."""
    body = json.loads(path.read_text())
    del body["digest"]
    edit(body)
    head = json.dumps(body, separators=(",", ":")).encode()[:-1]
    path.write_bytes(head + f'\n,"digest":"{digest(head)}"}}\n'.encode())


# -- places


def steps_of(path):
    return [info.step for info in list_steps(find_place(path))]


def test_a_path_means_a_run_its_checkpoints_or_one_step(root, tmp_path, monkeypatch):
    assert steps_of(root) == steps_of(root.parent) == steps_of(f"{root}/") == [1, 2, 3]
    assert steps_of(root / STEP.format(2)) == [2]
    (tmp_path / "latest").symlink_to(root / STEP.format(3))
    assert steps_of(tmp_path / "latest") == [3]
    monkeypatch.chdir(root / STEP.format(1))
    assert steps_of(".") == [1] and steps_of("..") == [1, 2, 3]


def test_a_checkpoint_may_stand_alone_under_any_name(root, tmp_path):
    shutil.copytree(root / STEP.format(1), tmp_path / "exported")
    assert steps_of(tmp_path / "exported") == [1]
    assert verify(find_place(tmp_path / "exported"))[0].ok
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_saved_nothing_is_a_place_without_steps(tmp_path):
    root = save(tmp_path / "run" / "checkpoints")
    place = find_place(tmp_path / "run")
    assert list_steps(place) == [] and collect(place).files == ()
    for function in (lambda: verify(place), place.newest, lambda: copy_steps(place, root_of(tmp_path / "to"))):
        with pytest.raises(UserError, match=f"{root} holds no checkpoint yet"):
            function()


@pytest.mark.parametrize("what", ["missing", "a file", "empty", "another directory"])
def test_what_is_no_place_is_said(tmp_path, what):
    path = tmp_path / "x"
    {"missing": lambda: None, "a file": path.touch}.get(what, path.mkdir)()
    if what == "another directory":
        (path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"{path} (does not exist|is a file|is not a checkpoint)"):
        find_place(path)
    assert what != "empty" or list(path.iterdir()) == []


def test_where_steps_may_be_put(root, tmp_path):
    assert root_of(root.parent).where == str(root)
    with pytest.raises(UserError, match="is one checkpoint"):
        root_of(root / STEP.format(1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"other holds no checkpoints but 'notes.txt'"):
        root_of(tmp_path / "other")


# -- listing


def test_own_bytes_are_what_goes_with_a_step(root):
    infos = list_steps(find_place(root))
    before = disk(root)
    for info in reversed(infos):
        (own,) = [x.own_bytes for x in list_steps(find_place(root)) if x.step == info.step]
        (root / info.directory / "manifest.json").unlink()
        collect(find_place(root))
        assert before - disk(root) == own
        before = disk(root)
    assert disk(root) == 0


def test_a_listing_says_what_the_files_have(root):
    one, two, three = list_steps(find_place(root))
    assert [x.arrays for x in (one, two, three)] == [3, 3, 3] and one.nbytes == three.nbytes == 3 * 256
    assert one.version == 2 and one.written == (root / STEP.format(1) / "manifest.json").stat().st_mtime
    own = (root / STEP.format(1) / "manifest.json").stat().st_size  # its data is used by others
    assert one.own_bytes == own and one.shared_bytes == data_file(root, 1).stat().st_size
    assert three.shared_bytes * 3 == one.shared_bytes * 2  # a of step 1, c of step 2
    alone = list_steps(find_place(root / STEP.format(2)))
    assert alone == [two]


def test_what_is_wrong_is_listed(root):
    flip(root / STEP.format(1) / "manifest.json", 20)
    data_file(root, 2).unlink()
    one, two, three = list_steps(find_place(root))
    assert "is damaged: digest" in one.error and one.version is None and one.step == 1
    assert two.error == three.error == f"file {STEP.format(2)}/{data_file_name(two)} is missing"
    with open(data_file(root, 3), "r+b") as file:
        file.truncate(100)
    edit_manifest(root / STEP.format(2) / "manifest.json", lambda body: body.update(version=99))
    _, two, three = list_steps(find_place(root))
    assert two.foreign and "version 99, newer than" in two.error


def data_file_name(info):
    """Of the file in its own directory."""
    ((_, name),) = [file for file in info.files if file[0] == info.directory]
    return name


def test_a_file_that_is_too_short_is_listed(root):
    size = data_file(root, 3).stat().st_size
    os.truncate(data_file(root, 3), size - 1)
    assert [info.error is None for info in list_steps(find_place(root))] == [True, True, False]
    assert f"is truncated: {size - 1} bytes, expected at least {size}" in list_steps(find_place(root))[-1].error


def test_a_manifest_in_another_steps_place_is_damage(root):
    shutil.copy(root / STEP.format(1) / "manifest.json", root / STEP.format(3) / "manifest.json")
    assert "holds step 1" in list_steps(find_place(root))[-1].error
    (report,) = verify(find_place(root))
    assert not report.ok and report.damage[0].array is None


# -- verification


def test_verification_reads_each_chunk_once(root, monkeypatch):
    read, own = [], LocalFiles.read_into

    def read_into(self, name, offset, buffer):
        read.append((os.path.normpath(f"{self.where}/{name}"), offset, len(buffer)))
        own(self, name, offset, buffer)

    monkeypatch.setattr(LocalFiles, "read_into", read_into)
    progress = []
    reports = verify(find_place(root), every=True, progress=lambda *at: progress.append(at))
    assert [(r.step, r.chunks, r.nbytes, r.ok) for r in reports] == [(n, 6, 768, True) for n in (1, 2, 3)]
    assert len(read) == len(set(read)) == 6 + 2 + 2
    assert progress[-1] == (sum(n for _, _, n in read),) * 2 and len(progress) == len(read)


def test_every_bit_that_flips_is_found_and_mended(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    path = data_file(root, 1)
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        flip(path, at)
        (report,) = verify(find_place(root / STEP.format(1)))
        assert not report.ok and len(report.damage) == 1 and str(path) in report.damage[0].message
        (report,) = verify(find_place(root / STEP.format(1)), repair=[find_place(tmp_path / "other")])
        assert report.ok and report.damage[0].mended_from == str(tmp_path / "other" / STEP.format(1))
        assert "use another checkpoint" not in report.damage[0].message
        assert path.read_bytes() == good


def test_damage_in_a_shared_chunk_is_in_every_step_that_has_it(root):
    flip(data_file(root, 1), 5)  # of a
    reports = verify(find_place(root), every=True)
    assert [[damage.array for damage in report.damage] for report in reports] == [["a"]] * 3
    assert verify(find_place(root))[0].step == 3


@pytest.mark.parametrize("loss", ["file", "directory", "end"])
def test_what_is_lost_is_mended_from_any_step_with_the_same_chunks(root, tmp_path, loss):
    other = save(tmp_path / "other", s7="xzy")
    path, good = data_file(root, 3), tree(root)
    if loss == "file":
        path.unlink()
    elif loss == "end":
        os.truncate(path, 70)
    else:
        shutil.rmtree(root / STEP.format(2))  # which step 3 shares c with
    reports = verify(find_place(root), repair=[find_place(other)])
    assert [report.ok for report in reports] == [True] and reports[0].step == 3
    check(root / STEP.format(3), "xzy")
    if loss != "directory":
        assert tree(root) == good


def test_what_no_other_place_has_stays_damaged(root, tmp_path):
    flip(data_file(root, 3), 5)
    other = save(tmp_path / "other", s3="xxy")
    before = tree(root)
    (report,) = verify(find_place(root), repair=[find_place(other)])
    assert not report.ok and report.damage[0].mended_from is None and tree(root) == before
    assert report.damage[0].message.endswith("; use another checkpoint")


def test_nothing_is_mended_from_what_is_damaged_too(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    shutil.copytree(root, tmp_path / "good")
    for place in (root, tmp_path / "other"):
        flip(data_file(place, 3), 5)
    others = [find_place(tmp_path / "other"), find_place(tmp_path / "good")]
    assert not verify(find_place(root), repair=others[:1])[0].ok
    assert verify(find_place(root), repair=others)[0].damage[0].mended_from == str(tmp_path / "good" / STEP.format(3))


def test_a_directory_that_a_run_writes_is_neither_mended_nor_collected(root, tmp_path):
    shutil.copytree(root, tmp_path / "other")
    flip(data_file(root, 3), 5)
    run = LocalStore(root)
    run.acquire()
    before = tree(root)
    for function in (
        lambda: verify(find_place(root), repair=[find_place(tmp_path / "other")]),
        lambda: collect(find_place(root), keep=1),
        lambda: copy_steps(find_place(tmp_path / "other"), root_of(root)),
    ):
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
            function()
    assert tree(root) == before
    assert not verify(find_place(root))[0].ok  # looking is always allowed
    run.release()


# -- copying


def test_a_copy_holds_the_same_and_shares_the_same(root, tmp_path):
    copied = copy_steps(find_place(root), root_of(tmp_path / "to"), every=True)
    assert copied.steps == (1, 2, 3) and not copied.damaged
    for step, letters in ((1, "xxx"), (2, "xxy"), (3, "xzy")):
        check(tmp_path / "to" / STEP.format(step), letters)
    infos = [list_steps(find_place(place)) for place in (root, tmp_path / "to")]
    assert [x.shared_bytes for x in infos[0]] == [x.shared_bytes for x in infos[1]]
    data = [sum(len(raw) for name, raw in tree(p).items() if "data" in name) for p in (root, tmp_path / "to")]
    assert data[0] == data[1] == copied.nbytes


def test_a_copy_of_one_step_stands_alone(root, tmp_path):
    copied = copy_steps(find_place(root), root_of(tmp_path / "to"))
    assert copied.steps == (3,) and copied.kept_bytes == 0
    assert {name.partition("/")[0] for name in tree(tmp_path / "to")} == {STEP.format(3)}
    check(tmp_path / "to" / STEP.format(3), "xzy")
    assert copy_steps(find_place(root / STEP.format(1)), root_of(tmp_path / "to")).steps == (1,)


def test_a_later_copy_shares_with_an_earlier_one(root, tmp_path):
    first = copy_steps(find_place(root / STEP.format(1)), root_of(tmp_path / "to"))
    second = copy_steps(find_place(root / STEP.format(2)), root_of(tmp_path / "to"))
    assert second.nbytes * 3 == first.nbytes and second.kept_bytes * 3 == first.nbytes * 2
    check(tmp_path / "to" / STEP.format(2), "xxy")


def test_the_same_copy_again_writes_nothing(root, tmp_path):
    target = tmp_path / "to"
    first = copy_steps(find_place(root), root_of(target), every=True)
    times = {p: p.stat().st_mtime_ns for p in target.rglob("*") if p.is_file() and p.name != ".lock"}
    second = copy_steps(find_place(root), root_of(target), every=True)
    assert (second.steps, second.nbytes) == (first.steps, 0)
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_a_copy_writes_again_what_is_damaged_there(root, tmp_path):
    target = tmp_path / "to"
    copy_steps(find_place(root), root_of(target), every=True)
    flip(data_file(target, 1), 5)
    flip(target / STEP.format(2) / "manifest.json", 9)
    data_file(target, 3).unlink()
    again = copy_steps(find_place(root), root_of(target), every=True)
    for step, letters in ((1, "xxx"), (2, "xxy"), (3, "xzy")):
        check(target / STEP.format(step), letters)
    assert 0 < again.nbytes < again.kept_bytes
    assert all(info.error is None for info in list_steps(find_place(target)))


def test_a_damaged_step_is_passed_over_loudly(root, tmp_path, caplog):
    flip(data_file(root, 3), 5)
    copied = copy_steps(find_place(root), root_of(tmp_path / "newest"))
    assert copied.steps == (2,) and "not copied: array 'b'" in caplog.text
    assert list(copied.damaged) == [STEP.format(3)]
    assert {name.partition("/")[0] for name in tree(tmp_path / "newest")} == {STEP.format(2)}
    assert copy_steps(find_place(root), root_of(tmp_path / "all"), every=True).steps == (1, 2)
    with pytest.raises(CorruptError, match="array 'b'"):
        copy_steps(find_place(root / STEP.format(3)), root_of(tmp_path / "named"))
    assert steps_of(tmp_path / "named") == []
    for step in (1, 2):
        flip(root / STEP.format(step) / "manifest.json", 5)
    with pytest.raises(UserError, match=r"none of the 3 steps in .* is good"):
        copy_steps(find_place(root), root_of(tmp_path / "none"), every=True)


def test_another_checkpoint_of_a_step_is_not_replaced(root, tmp_path):
    target = save(tmp_path / "to", s3="xxx")
    before = tree(target)
    with pytest.raises(UserError, match="has another step 3"):
        copy_steps(find_place(root), root_of(target))
    assert tree(target) == before
    with pytest.raises(UserError, match="is where these checkpoints are already"):
        copy_steps(find_place(root), root_of(root.parent))


def test_a_file_of_which_little_is_used_is_not_shared(tmp_path):
    """Or what is used of many files would keep all of them. But what a step has there already is found, so or so."""
    source, target = save(tmp_path / "run", s1="xxx", s2="xpq", s3="xpr"), tmp_path / "to"
    copies = [copy_steps(find_place(source / STEP.format(n)), root_of(target)) for n in (1, 2)]
    assert [copied.nbytes for copied in copies] == [3 * 512, 2 * 512]
    (target / STEP.format(1) / "manifest.json").unlink()  # a third of its file is in use now, by step 2
    assert copy_steps(find_place(source / STEP.format(2)), root_of(target)).nbytes == 0
    copied = copy_steps(find_place(source / STEP.format(3)), root_of(target))
    assert (copied.nbytes, copied.kept_bytes) == (2 * 512, 512)  # b is shared, in a file that step 2 uses whole
    check(target / STEP.format(3), "xpr")


def test_compressed_chunks_stay_as_they_are(tmp_path):
    pytest.importorskip("zstandard")
    root = save(tmp_path / "run", zstd=3, s1="xxx", s2="xxy")
    plain, target = save(tmp_path / "plain", s2="xxy"), tmp_path / "to"
    frames = [chunk.zstd for chunk in find_place(root).newest().array("c").chunks]
    assert all(frames)
    copied = copy_steps(find_place(root), root_of(target), every=True)
    check(target / STEP.format(2), "xxy")
    assert [chunk.zstd for chunk in find_place(target).newest().array("c").chunks] == frames
    assert copied.nbytes == sum(data_file(root, step).stat().st_size for step in (1, 2))
    flip(data_file(target, 2), 5)
    assert not verify(find_place(target), repair=[find_place(plain)])[0].ok  # has no frame
    assert verify(find_place(target), repair=[find_place(plain), find_place(root)])[0].ok
    flip(data_file(plain, 2), 5)
    assert verify(find_place(plain), repair=[find_place(root)])[0].ok  # out of a frame
    check(plain / STEP.format(2), "xxy")
    assert copy_steps(find_place(plain), root_of(target)).nbytes == 0


def test_files_of_a_copy_are_of_bounded_size(root, tmp_path, monkeypatch):
    monkeypatch.setattr(copying_module, "FILE_BYTES", 600)
    copy_steps(find_place(root), root_of(tmp_path / "to"))
    sizes = [p.stat().st_size for p in (tmp_path / "to").rglob("data-*")]
    assert sizes == [2 * (128 + 8 * 16)] * 3
    check(tmp_path / "to" / STEP.format(3), "xzy")


def test_a_full_disk_ends_a_copy_in_one_line_and_the_next_goes_on(root, tmp_path, monkeypatch):
    monkeypatch.setattr(copying_module, "FILE_BYTES", 600)
    target, files = tmp_path / "to", []

    @contextlib.contextmanager
    def create(self, directory, name, own=LocalStore.create):
        files.append(name)
        with own(self, directory, name) as file:
            if len(files) == 3:
                file.write(b"some")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    with monkeypatch.context() as m:
        m.setattr(LocalStore, "create", create)
        with pytest.raises(UserError, match=f"cannot write in {target}: No space left on device; make room"):
            copy_steps(find_place(root), root_of(target))
    assert list_steps(Place(root_of(target))) == []
    copied = copy_steps(find_place(root), root_of(target))
    assert copied.nbytes == 2 * 256 and copied.kept_bytes == 4 * 256
    check(target / STEP.format(3), "xzy")


class MemoryStore:
    """What ``Store`` asks for and nothing else."""

    file_bytes = 300

    def __init__(self, where):
        self.where, self.held, self.files = where, False, {}

    def acquire(self, mark=""):
        assert not self.held
        self.held = True

    def release(self):
        self.held = False

    def mark(self):
        return None

    def names(self):
        found = {}
        for directory, name in self.files:
            found.setdefault(directory, set()).add(name)
        return found

    def open(self, directory):
        return MemoryFiles(self, directory)

    @contextlib.contextmanager
    def create(self, directory, name):
        assert self.held and (directory, name) not in self.files
        file = io.BytesIO()
        yield file
        self.files[directory, name] = file.getvalue()

    def put(self, directory, name, data):
        assert self.held
        self.files[directory, name] = data

    def patch(self, directory, name, offset, data):
        assert self.held
        old = self.files[directory, name]
        self.files[directory, name] = old[:offset] + data + old[offset + len(data) :]

    def delete(self, directory, names):
        assert self.held
        for name in names:
            self.files.pop((directory, name), None)


class MemoryFiles:
    def __init__(self, store, directory):
        self.where, self._files, self._directory = f"{store.where}/{directory}", store.files, directory

    def read(self, name):
        key = tuple(os.path.normpath(f"{self._directory}/{name}").split("/"))
        if key not in self._files:
            raise CorruptError(f"{key} is missing")
        return self._files[key]

    def size(self, name):
        return len(self.read(name))

    def written(self, name):
        return None

    def read_into(self, name, offset, buffer):
        data = self.read(name)[offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise CorruptError("too short")
        buffer[:] = data


def test_any_store_will_do(root, tmp_path):
    store = MemoryStore("memory://x")
    first = copy_steps(find_place(root), store, every=True)
    place = Place(store)
    assert {len(raw) for (_, name), raw in store.files.items() if "data" in name} == {256}
    infos = list_steps(place)
    assert [info.step for info in infos] == [1, 2, 3] and infos[0].written is None
    assert all(report.ok for report in verify(place, every=True))
    key = max(store.files, key=lambda key: "data" in key[1])
    good = store.files[key]
    store.files[key] = bytes([good[0] ^ 1]) + good[1:]
    assert not all(report.ok for report in verify(place, every=True))
    assert (
        all(report.ok for report in verify(place, every=True, repair=[find_place(root)])) and store.files[key] == good
    )
    assert copy_steps(find_place(root), store, every=True).nbytes == 0
    assert copy_steps(place, root_of(tmp_path / "back"), every=True).nbytes == first.nbytes
    check(tmp_path / "back" / STEP.format(3), "xzy")
    assert collect(place, keep=1).steps == (1, 2) and verify(place)[0].ok


# -- collecting


def test_nothing_that_a_step_uses_goes(root):
    before = tree(root)
    (root / STEP.format(2) / "data-00009-torn.bin").write_bytes(b"12345")
    (root / STEP.format(9)).mkdir()
    (root / STEP.format(9) / ".tmp-manifest.json").write_bytes(b"{")
    dry = collect(find_place(root), dry_run=True)
    assert len(tree(root)) == len(before) + 2
    assert collect(find_place(root)) == dry
    assert dry.nbytes == 6 and dry.steps == ()
    assert dry.files == (f"{STEP.format(2)}/data-00009-torn.bin", f"{STEP.format(9)}/.tmp-manifest.json")
    assert tree(root) == before and not (root / STEP.format(9)).exists()


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, None, [8]), (2, None, [7, 8]), (9, None, [2, 3, 4, 5, 6, 7, 8]), (1, 3, [3, 6, 8]), (None, None, range(2, 9))],
)
def test_which_old_steps_go(tmp_path, keep, every, left):
    letters = {n: "x" + "uvwxyz"[n % 6] + "uvwxyz"[n // 2] for n in range(2, 9)}
    root = save(tmp_path / "root", **{f"s{n}": x for n, x in letters.items()})
    before = disk(root)
    collected = collect(find_place(root), keep, every)
    assert steps_of(root) == list(left) and collected.steps == tuple(n for n in letters if n not in left)
    assert before - disk(root) == collected.nbytes
    for n in left:
        check(root / STEP.format(n), letters[n])
    assert collect(find_place(root), keep, every).files == ()


def test_a_damaged_step_is_none_that_is_kept(root):
    data_file(root, 3).unlink()
    assert collect(find_place(root), keep=1).steps == (1,)
    assert steps_of(root) == [2, 3]
    check(root / STEP.format(2), "xxy")


def test_an_old_step_that_is_damaged_goes_whatever_divides_it(root):
    flip(root / STEP.format(2) / "manifest.json", 5)
    assert collect(find_place(root), keep=1, every=2).steps == (1, 2)
    check(root / STEP.format(3), "xzy")


def test_nothing_beside_a_damaged_manifest_goes_before_its_step_does(root):
    flip(root / STEP.format(1) / "manifest.json", 5)
    before = tree(root)
    assert collect(find_place(root)).files == () and tree(root) == before
    assert collect(find_place(root), keep=1).steps == (1, 2)
    check(root / STEP.format(3), "xzy")


def test_nothing_goes_beside_a_step_of_a_newer_program(root):
    """Its manifest may name any file."""
    edit_manifest(root / STEP.format(2) / "manifest.json", lambda body: body.update(version=99))
    (root / STEP.format(1) / "manifest.json").unlink()
    before = tree(root)
    with pytest.raises(UserError, match=r"nothing is removed, .* version 99"):
        collect(find_place(root), keep=1)
    assert tree(root) == before


def test_nothing_is_written_through_a_step_that_is_a_link(root, tmp_path):
    """It may be a step of somebody else's."""
    theirs, linked = save(tmp_path / "theirs", s4="abc") / STEP.format(4), root / STEP.format(4)
    linked.symlink_to(theirs)
    (theirs / "notes.txt").touch()
    before = tree(tmp_path)
    for writes in (
        lambda: collect(find_place(root)),
        lambda: collect(find_place(root), keep=1),
        lambda: copy_steps(find_place(theirs), root_of(root)),
        lambda: save(root, s5="xyz"),
        lambda: Manager([Level("disk", root, keep=1)]),
    ):
        with pytest.raises(UserError, match=f"{linked} is a link, expected a directory: .* copy {theirs} {root}$"):
            writes()
        assert tree(tmp_path) == before
    assert [report.ok for report in verify(find_place(root), every=True)] == [True] * 4
    linked.unlink()
    copy_steps(find_place(theirs), root_of(root))
    check(linked, "abc")


def test_the_root_may_be_a_link(root, tmp_path):
    (tmp_path / "root").symlink_to(root)
    assert collect(find_place(tmp_path / "root"), keep=1).steps == (1, 2)
    check(root / STEP.format(3), "xzy")


@pytest.mark.parametrize(("keep", "every"), [(0, None), (-1, None), (None, 5), (1, 0)])
def test_what_cannot_be_kept_is_refused(root, keep, every):
    with pytest.raises(UserError, match="expected at least 1"):
        collect(find_place(root), keep, every)
    with pytest.raises(UserError, match="is one step"):
        collect(find_place(root / STEP.format(1)))


# -- kill -9

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from checkpoint import collect, copy_steps, copying, list_steps, find_place, root_of, verify

copying.FILE_BYTES = 600
source, scratch, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


def act(at):
    if what == "gc":
        return collect(find_place(at), keep=1)
    return copy_steps(find_place(source), root_of(at), every=True)


def dies_in(call, at):
    # A child that kills itself before the call-th change of the disk; whether it got there.
    if (child := os.fork()) == 0:
        left = [call]
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
            def counted(*args, own=getattr(os, name), **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*args, **kwargs)
            setattr(os, name, counted)
        act(at)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def prepared(at):
    shutil.rmtree(at, ignore_errors=True)
    if what == "gc":
        shutil.copytree(source, at)
    return at


done = prepared(scratch / "whole")
copied = act(done)
files = {str(p.relative_to(done)) for p in done.rglob("*") if p.is_file()}
call = kept = 0
while True:
    call += 1
    at = prepared(scratch / "at")
    killed = dies_in(call, at)
    if at.exists() and any(at.glob("step-*")):
        shown = list_steps(find_place(at))
        assert not shown or all(report.ok for report in verify(find_place(at), every=True)), call
        assert what == "copy" or shown[-1].step == 3
    again = act(at)
    if what == "copy":
        assert again.nbytes + again.kept_bytes == copied.nbytes + copied.kept_bytes, call
        kept = max(kept, copied.nbytes - again.nbytes)
    assert all(report.ok for report in verify(find_place(at), every=True))
    assert {str(p.relative_to(at)) for p in at.rglob("*") if p.is_file()} == files, call
    if not killed:
        break
assert what == "gc" or kept == copied.nbytes, kept
print(call - 1)
"""


@pytest.mark.parametrize(("what", "at_least"), [("copy", 20), ("gc", 6)])
def test_killed_at_any_change_of_the_disk_no_step_is_torn_and_the_same_again_ends_it(root, tmp_path, what, at_least):
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path / "scratch"), what]
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= at_least
