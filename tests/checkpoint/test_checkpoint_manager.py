"""Saving and restoring through levels: asynchrony, donation, failures, retention."""

import contextlib
import errno
import gc
import logging
import os
import subprocess
import threading
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from manager_runs import damage, levels, restore, save

from checkpoint import Best, Level, Manager, open_checkpoint
from checkpoint import snapshot as snapshot_module
from checkpoint.levels import OpenLevel
from checkpoint.shares import holders_of, shares_of
from checkpoint.snapshot import Snapshot, Staging, by_shard
from checkpoint.storage import LocalStore
from checkpoint.writer import ChunkWriter
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored


class Gate:
    """Holds every write of chunk files until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.waiting = threading.Event(), threading.Event()
        create = LocalStore.create

        def gated(store, directory, name):
            self.waiting.set()
            assert self.open.wait(30)
            return create(store, directory, name)

        monkeypatch.setattr(LocalStore, "create", gated)


# -- the ordinary case


def test_what_is_saved_is_restored(paths, state, h):
    with Manager(levels(paths)) as manager:
        assert manager.latest() is None
        save(manager, 3, state, {"loss": 0.5, "data": [1, 2]}).wait()
        assert (manager.latest(), manager.steps()) == (3, [3])
        restored = restore(manager, state)
    h.check(restored, state)
    assert (restored.step, restored.source, restored.meta) == (3, "ram", {"loss": 0.5, "data": [1, 2]})
    assert all(restored.arrays[key].sharding == state.shardings[key] for key in state.arrays)


def test_a_new_manager_restores_onto_another_mesh(paths, state, h):
    with Manager(levels(paths)) as manager:
        save(manager, 3, state)
    other = h.make_state("stage=4,tensor=2", pad=14)
    with Manager(levels(paths)) as manager:
        h.check(restore(manager, other), other)


def test_restored_arrays_can_be_donated(paths, state):
    with Manager(levels(paths)) as manager:
        save(manager, 3, state)
        arrays = restore(manager, state).arrays
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    before = np.asarray(state.arrays["layers.w"])
    np.testing.assert_array_equal(np.asarray(step(arrays["layers.w"])), before + 1)
    assert arrays["layers.w"].is_deleted()


def test_a_level_takes_only_steps_that_its_interval_divides(paths, state):
    with Manager(levels(paths, disk_every=2)) as manager:
        assert manager.due(3)
        save(manager, 2, state)
        save(manager, 3, state).wait()
    assert [p.name for p in paths[1].glob("step-*")] == ["step-00000002"]


def test_everywhere_overrides_intervals(paths, state):
    with Manager(levels(paths, disk_every=2)) as manager:
        save(manager, 3, state, everywhere=True).wait()
    assert (paths[1] / "step-00000003").exists()


def test_saving_when_nothing_is_due_is_an_error(paths, state):
    with Manager([Level("disk", paths[1], every=2)]) as manager, pytest.raises(ValueError, match="due at step 3"):
        save(manager, 3, state)


def test_disk_is_promoted_from_the_ram_level_not_from_the_snapshot(paths, state, h, monkeypatch):
    released = []
    release = Snapshot.release
    monkeypatch.setattr(Snapshot, "release", lambda self: (released.append(self), release(self)))
    calls = []
    blocks = Snapshot.blocks
    monkeypatch.setattr(Snapshot, "blocks", lambda self: (calls.append(self), blocks(self))[1])
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
    assert len(calls) == 1
    assert released
    reader = open_checkpoint(paths[1] / "step-00000001")
    h.assert_same({name: reader.read(name) for name in reader.manifest.arrays}, state.logical)


def test_retention_keeps_the_newest_of_each_level(paths, h):
    with Manager(levels(paths, ram_keep=1, disk_keep=3)) as manager:
        for step in range(1, 6):
            save(manager, step, h.make_state(seed=step))
        manager.wait()
        assert manager.steps() == [3, 4, 5]
    assert [p.name for p in paths[0].glob("step-*")] == ["step-00000005"]


def test_a_step_waiting_for_promotion_is_not_deleted(paths, h, monkeypatch):
    gate = Gate(monkeypatch)
    gate.open.set()
    promote = threading.Event()
    original = LocalStore.put
    monkeypatch.setattr(
        LocalStore, "put", lambda self, *what: ("disk" in self.where and promote.wait(30), original(self, *what))[1]
    )
    with Manager(levels(paths, ram_keep=1, disk_keep=None, disk_every=2)) as manager:
        for step in (2, 3, 4, 5):
            handle = save(manager, step, h.make_state(seed=step))
        handle.wait()
        assert [p.name[-1] for p in sorted(paths[0].glob("step-*"))] == ["2", "4", "5"]
        promote.set()
        manager.wait()
        assert manager.steps() == [2, 4, 5]
        assert not manager.failures


def test_verify_reports_every_level(paths, state):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        assert [r.ok for r in manager.verify()] == [True, True]
        damage(paths[1], 1)
        ram, disk = manager.verify(1)
        assert ram.ok
        assert not disk.ok
        assert str(paths[1]) in disk.errors[0]
        with pytest.raises(UserError, match="no checkpoint of step 9"):
            manager.verify(9)


def test_metrics_count_bytes_and_seconds(paths, state):
    with Manager(levels(paths)) as manager:
        metrics = save(manager, 1, state).wait()
    nbytes = sum(value.nbytes for value in state.logical.values())
    assert {name: m.nbytes for name, m in metrics.levels.items()} == {"ram": nbytes, "disk": nbytes}
    assert metrics.copy_seconds > 0
    assert metrics.stall_seconds >= metrics.waiting_seconds >= 0


# -- asynchrony and donation


def test_save_returns_before_the_write_is_done(paths, state, monkeypatch):
    gate = Gate(monkeypatch)
    with Manager(levels(paths)) as manager:
        handle = save(manager, 1, state)
        handle.copied()
        assert not handle.done
        assert manager.steps() == []
        gate.open.set()
        handle.wait()
        assert manager.steps() == [1]


def test_arrays_may_be_donated_as_soon_as_they_are_copied(paths, h, monkeypatch):
    gate = Gate(monkeypatch)
    state = h.make_state()
    update = jax.jit(lambda x: x * 0, donate_argnums=0)
    # Out of a program, as in training: buffers that device_put made of numpy arrays are not always reused.
    state.arrays = jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree))(state.arrays))
    with Manager(levels(paths)) as manager:
        handle, copied = save(manager, 1, state), []
        for key in list(state.arrays):
            handle.copied([key])
            before = [shard.data.unsafe_buffer_pointer() for shard in state.arrays[key].addressable_shards]
            new = jax.block_until_ready(update(state.arrays.pop(key)))
            after = [shard.data.unsafe_buffer_pointer() for shard in new.addressable_shards]
            copied += [key] if after != before else []
        gate.open.set()
        handle.wait()
        assert not copied, "donation was turned into a copy"
        h.check(restore(manager, state), state)


def test_donating_before_the_copy_is_a_loud_failure_not_damage(paths, state, monkeypatch, caplog):
    hold = threading.Event()
    copy = Snapshot._copy
    monkeypatch.setattr(Snapshot, "_copy", lambda self: (hold.wait(30), copy(self)))
    update = jax.jit(lambda x: x * 0, donate_argnums=0)
    with Manager(levels(paths)) as manager:
        handle = save(manager, 1, state)
        update(state.arrays["embed"])
        hold.set()
        with pytest.raises(RuntimeError, match="deleted"):
            handle.copied()
        with pytest.raises(RuntimeError, match="deleted"):
            handle.wait()
        assert manager.steps() == []
        assert {f.level for f in manager.failures} == {"ram", "disk"}


def test_copied_waits_only_for_the_keys_asked_for(state, monkeypatch):
    hold = threading.Event()
    stage = Snapshot._stage

    def slow(self, data, share):
        assert share.logical.name != "count" or hold.wait(30)
        stage(self, data, share)

    monkeypatch.setattr(Snapshot, "_stage", slow)
    snapshot = take(state)
    assert snapshot.wait(["layers.w", "embed"]) >= 0
    assert "count" not in snapshot._copied
    hold.set()
    snapshot.wait()
    with pytest.raises(ValueError, match="no such keys"):
        snapshot.wait(["nope"])


def take(state, budget=1 << 20):
    shardings = {key: array.sharding for key, array in state.arrays.items()}
    shares = shares_of(state.layout, holders_of(state.layout, shardings), 0, 1 << 20)
    return Snapshot(state.arrays, by_shard(state.arrays, shares), Staging(budget))


def test_the_stall_of_waiting_for_a_copy_is_reported(paths, state, monkeypatch):
    copy = Snapshot._copy
    monkeypatch.setattr(Snapshot, "_copy", lambda self: (threading.Event().wait(0.5), copy(self)))
    with Manager(levels(paths)) as manager:
        handle = save(manager, 1, state)
        assert handle.copied() >= 0.1  # of the half second, whatever else the machine does
        assert handle.wait().stall_seconds >= 0.1


def test_a_third_save_waits_for_the_first(paths, state, monkeypatch):
    gate = Gate(monkeypatch)
    with Manager([Level("disk", paths[1])]) as manager:
        save(manager, 1, state)
        assert save(manager, 2, state).metrics.waiting_seconds < 0.1
        timer = threading.Timer(0.2, gate.open.set)
        timer.start()
        assert save(manager, 3, state).metrics.waiting_seconds >= 0.15
        manager.wait()
        assert manager.steps() == [2, 3]


def test_saving_a_step_again_waits_for_it_and_replaces_it(paths, state):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state, {"which": "first"})
        save(manager, 1, state, {"which": "second"})
        assert restore(manager, state).meta == {"which": "second"}
        assert not manager.failures


def test_meta_is_taken_when_save_is_called(paths, state, monkeypatch):
    gate = Gate(monkeypatch)
    meta = {"position": [1]}
    with Manager(levels(paths)) as manager:
        save(manager, 1, state, meta)
        meta["position"].append(2)
        gate.open.set()
        assert restore(manager, state).meta == {"position": [1]}


def test_arrays_that_do_not_fit_the_layout_are_an_error_and_block_nothing(paths, state):
    with Manager([Level("disk", paths[1])]) as manager:
        wrong = {**state.arrays, "count": state.arrays["embed"]}
        for _ in range(3):
            with pytest.raises(ValueError, match="count: array is bfloat16"):
                manager.save(1, wrong, state.layout, {})
        with pytest.raises(ValueError, match="differ in keys"):
            manager.save(1, {}, state.layout, {})
        save(manager, 1, state).wait()


# -- failure


def test_numpy_arrays_are_an_error_that_says_so(paths, state):
    with Manager(levels(paths)) as manager:
        with pytest.raises(ValueError, match="embed: found ndarray, expected a jax array"):
            manager.save(1, {**state.arrays, "embed": np.asarray(state.arrays["embed"])}, state.layout, {})
        save(manager, 1, state).wait()


def test_a_closed_manager_says_so(paths, state):
    manager = Manager(levels(paths))
    manager.close()
    with pytest.raises(ValueError, match="cannot save step 1: this manager is closed"):
        save(manager, 1, state)
    manager.close()


def full(monkeypatch, where):
    """Every write under ``where`` fails as on a full disk, until the context ends."""
    create = LocalStore.create

    @contextlib.contextmanager
    def fails(store, directory, name):
        with create(store, directory, name) as file:
            if store.where.startswith(str(where)):
                file.write(b"part")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield file

    context = monkeypatch.context()
    context.__enter__().setattr(LocalStore, "create", fails)
    return context


def test_a_full_disk_is_loud_and_leaves_earlier_checkpoints(paths, state, h, monkeypatch, caplog):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        with contextlib.ExitStack() as stack, monkeypatch.context() as m:
            stack.callback(full(m, paths[1]).__exit__, None, None, None)
            handle = save(manager, 2, state)
            with pytest.raises(UserError, match=r"step 2 was not saved to .*disk: No space left"):
                handle.wait()
        assert [(f.step, f.level) for f in manager.failures] == [(2, "disk")]
        assert any(r.levelno == logging.ERROR for r in caplog.records)
        assert sorted(p.name for p in paths[1].iterdir()) == [".lock", "step-00000001"]
        save(manager, 3, state).wait()
    with Manager([Level("disk", paths[1])]) as manager:
        assert manager.steps() == [1, 3]
        h.check(restore(manager, state), state)


def test_when_ram_is_full_the_disk_is_written_from_the_snapshot(paths, state, h, monkeypatch):
    with Manager(levels(paths)) as manager:
        with monkeypatch.context() as m:
            context = full(m, paths[0])
            handle = save(manager, 2, state)
            with pytest.raises(UserError, match="ram: No space"):
                handle.wait()
            context.__exit__(None, None, None)
        restored = restore(manager, state)
        assert restored.source == "disk"
        h.check(restored, state)


@pytest.mark.parametrize("fits", [1, 4, 9])
def test_what_a_level_wrote_before_it_was_full_is_not_lost_to_the_next(paths, h, monkeypatch, fits):
    """Its bytes left the ring long ago, and the arrays may be donated."""
    state, written = h.make_state(stacked=False), []
    add = ChunkWriter.add

    def fills(writer, block):
        if "ram" in writer.where:
            written.append(block)
            if len(written) > fits:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(writer, block)

    monkeypatch.setattr(ChunkWriter, "add", fills)
    monkeypatch.setattr(ChunkWriter, "where", property(lambda self: self._files.where), raising=False)
    with Manager(levels(paths), staging_bytes=64) as manager:
        handle = save(manager, 2, state)
        with pytest.raises(UserError, match="ram: No space"):
            handle.wait()
        assert sorted(p.name for p in paths[0].iterdir()) == [".lock"]
        restored = restore(manager, state)
        assert restored.source == "disk"
        h.check(restored, state)
        assert [f.level for f in manager.failures] == ["ram"]


def test_a_ring_smaller_than_the_state_saves_it_whole(paths, state, h):
    with Manager(levels(paths), staging_bytes=64, chunk_bytes=64) as manager:
        save(manager, 1, state).wait()
        assert manager._staging.peak <= 64
        assert manager._staging._memory is None
        h.check(restore(manager, state), state)


def test_saves_that_follow_each_other_do_not_wait_for_each_others_room(paths, h):
    """Nobody donates, so nobody waits for copies before the next save."""
    with Manager(levels(paths), staging_bytes=128, chunk_bytes=64) as manager:
        states = [h.make_state(seed=seed) for seed in range(4)]
        for step, state in enumerate(states):
            save(manager, step, state)
        manager.wait()
        h.check(restore(manager, states[-1], 3), states[-1])


def test_a_failure_that_is_kept_keeps_no_memory(paths, state, monkeypatch):
    rings = []
    aligned = snapshot_module.aligned

    def seen(nbytes):
        memory = aligned(nbytes)
        rings.append(weakref.ref(memory.base))
        return memory

    monkeypatch.setattr(snapshot_module, "aligned", seen)

    def add(writer, block):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ChunkWriter, "add", add)
    with Manager([Level("disk", paths[1])]) as manager:
        handle = save(manager, 1, state)
        with pytest.raises(UserError, match="No space"):
            handle.wait()
        del handle
        assert manager.failures and rings
        manager._staging.thread.submit(int).result()  # the thread that copies is done, too
        gc.collect()
        assert all(ring() is None for ring in rings)


@pytest.mark.parametrize("largest", [False, True])
def test_milestones_and_the_best_stay(paths, h, largest):
    level = Level("disk", paths[1], keep=2, keep_every=4, best=Best("heldout_loss", keep=2, largest=largest))
    losses = {1: 5.0, 2: 1.0, 3: 9.0, 4: 4.0, 5: 8.0, 6: 2.0, 7: float("nan"), 8: 6.0, 9: 7.0, 10: None}
    with Manager([level]) as manager:
        for step, loss in losses.items():
            known = {"heldout_loss": loss} if loss == loss else {}  # meta is JSON, which has no NaN
            save(manager, step, h.make_state(seed=step), {"metrics": known})
        manager.wait()
        assert manager.steps() == sorted({9, 10} | {4, 8} | ({3, 5} if largest else {2, 6}))


def test_a_metric_that_no_step_has_is_told_of_once(paths, state, caplog):
    with Manager([Level("disk", paths[1], best=Best("losss"))]) as manager:
        for step in (1, 2):
            save(manager, step, state, {"metrics": {"loss": 1.0}})
        manager.wait()
    told = [r.getMessage() for r in caplog.records if "losss" in r.getMessage()]
    assert len(told) == 1 and "step 1" in told[0] and "has: loss" in told[0]


def test_a_level_that_verifies_does_not_commit_what_reads_otherwise(paths, state, monkeypatch):
    create = LocalStore.create

    @contextlib.contextmanager
    def flips(store, directory, name):
        with create(store, directory, name) as file:
            yield file
        if name.startswith("data-"):
            data = bytearray((store.root / directory / name).read_bytes())
            data[7] ^= 1
            (store.root / directory / name).write_bytes(data)

    monkeypatch.setattr(LocalStore, "create", flips)
    with Manager([Level("disk", paths[1], verify=True), Level("other", paths[0])]) as manager:
        with pytest.raises(UserError, match="step 1 does not read as it was written"):
            save(manager, 1, state).wait()
        assert not list(paths[1].glob("step-*"))


def test_a_file_system_that_is_really_full(tmp_path, h, state):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        big = Logical("big", (1 << 16,), np.dtype(np.float32), (None,))
        layout = Layout([Stored("big", big.shape, big.dtype, big.axes, (big,))])
        with Manager([Level("disk", mount / "c")]) as manager:
            save(manager, 1, state).wait()
            array = jax.device_put(np.ones(big.shape, np.float32), jax.devices()[0])
            with pytest.raises(UserError, match="No space left"):
                manager.save(2, {"big": array}, layout, {}).wait()
            assert sorted(p.name for p in (mount / "c").iterdir()) == [".lock", "step-00000001"]
            h.check(restore(manager, state), state)
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def test_what_a_check_refuses_is_at_no_level_and_frees_the_arrays(paths, state):
    def refuses():
        raise UserError("not finite")

    with Manager(levels(paths), staging_bytes=64) as manager:
        handle = save(manager, 1, state, check=refuses)
        handle.copied()
        with pytest.raises(UserError, match="not finite"):
            handle.wait()
        assert manager.steps() == []
        save(manager, 1, state).wait()


@pytest.mark.parametrize("step", [-1, True, 1.0, "1"])
def test_a_step_is_a_number_from_zero_on(paths, state, step):
    with Manager(levels(paths)) as manager:
        with pytest.raises(ValueError, match="expected an int from 0 on"):
            save(manager, step, state)
        save(manager, 0, state).wait()
        assert manager.steps() == [0]


@pytest.mark.parametrize(
    "wrong", [{"best": "loss"}, {"verify": 3}, {"zstd": 99}, {"zstd": False}, {"zstd": 0}], ids=str
)
def test_a_level_says_what_it_does_not_take(tmp_path, wrong):
    with pytest.raises(UserError, match=f"'disk': {next(iter(wrong))}="):
        Level("disk", tmp_path, **wrong)


def test_levels_are_a_list_of_levels(tmp_path):
    for wrong in (Level("disk", tmp_path), [str(tmp_path)], str(tmp_path)):
        with pytest.raises(UserError, match=r"checkpoint levels .*: expected a list such as \[Level\('disk', path\)\]"):
            Manager(wrong)


def test_the_levels_of_a_save_are_a_list_of_names(paths, state):
    with Manager(levels(paths)) as manager:
        with pytest.raises(ValueError, match=r"levels='disk': expected names .* in a list, as \['disk'\]"):
            save(manager, 1, state, levels="disk")
        save(manager, 1, state, levels=["disk"]).wait()


def test_memory_is_a_number_of_bytes(tmp_path):
    for wrong in ({"staging_bytes": None}, {"staging_bytes": 0}, {"chunk_bytes": -5}, {"chunk_bytes": "1"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*expected an int from 1 on"):
            Manager([Level("disk", tmp_path)], **wrong)


def test_a_sharding_that_is_not_given_is_named(paths, state):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        with pytest.raises(ValueError, match="no shardings are given for"):
            manager.restore(layout=state.layout, shardings={})
        with pytest.raises(ValueError, match=r"found a NamedSharding, expected .* dict\.fromkeys\(layout, sharding\)"):
            manager.restore(layout=state.layout, shardings=state.shardings["embed"])


def test_numbers_of_64_bits_do_not_become_others(paths):
    value = np.array([2**40 + 7, -(2**35)])
    spec = Logical("x", value.shape, value.dtype, (None,))
    layout = Layout([Stored("x", spec.shape, spec.dtype, spec.axes, (spec,))])
    one = {"x": SingleDeviceSharding(jax.devices()[0])}
    with Manager(levels(paths)) as manager:
        with jax.enable_x64(True):
            manager.save(1, {"x": jax.device_put(value, one["x"])}, layout, {}).wait()
            found = manager.restore(layout=layout, shardings=one).arrays["x"]
            np.testing.assert_array_equal(np.asarray(found), value, strict=True)
        with pytest.raises(UserError, match="'x' is int64, of which JAX would make int32"):
            manager.restore(layout=layout, shardings=one)


def test_a_hurried_save_waits_for_no_turn(paths, state, monkeypatch):
    """One save is being written to a disk that hangs, one waits there; then the machine is about to be gone."""
    go_on, asked, write = threading.Event(), [], OpenLevel._write

    def hangs(level, *arguments):
        assert level.name != "disk" or go_on.wait(30)
        return write(level, *arguments)

    def hurried():
        asked.append(None)
        return len(asked) == 3

    monkeypatch.setattr(OpenLevel, "_write", hangs)
    with Manager(levels(paths)) as manager:
        for step in (1, 2):
            save(manager, step, state)
        handle = save(manager, 3, state, hurried=hurried)
        assert len(asked) == 3
        with pytest.raises(TimeoutError, match="step 3 is still being written"):
            handle.wait(0.05)
        again = save(manager, 3, state, levels=["ram"])  # does not wait for the disk, nor take from it what it needs
        again.wait(30)
        go_on.set()
        manager.wait()
        assert not manager.failures
        assert [level.steps() for level in manager._levels] == [[2, 3], [2, 3]]


def test_a_save_that_is_given_up_gives_its_memory_to_others_and_is_not_committed(paths, state, monkeypatch):
    """A disk hangs with all of the staging memory."""
    go_on, create = threading.Event(), LocalStore.create

    @contextlib.contextmanager
    def slow(store, directory, name):
        assert store.root != paths[1] or go_on.wait(30)
        with create(store, directory, name) as file:
            yield file

    monkeypatch.setattr(LocalStore, "create", slow)
    with Manager(levels(paths), staging_bytes=128, chunk_bytes=64) as manager:
        handle = save(manager, 1, state, levels=["disk"])
        with pytest.raises(TimeoutError):
            handle.wait(0.2)
        handle.give_up()
        save(manager, 1, state, levels=["ram"]).wait(30)
        go_on.set()
        manager.wait()
        assert [(f.level, str(f.error)) for f in manager.failures] == [("disk", "the save was given up")]
        assert [level.steps() for level in manager._levels] == [[1], []]


def test_who_waits_for_a_copy_may_give_the_save_up(paths, state, monkeypatch):
    gate = Gate(monkeypatch)
    with Manager([Level("disk", paths[1])], staging_bytes=64) as manager:
        handle = save(manager, 1, state)
        asked = iter((False, False, True))
        assert handle.copied(late=lambda: next(asked)) > 0
        gate.open.set()
        with pytest.raises(RuntimeError, match="given up"):
            handle.wait()
        assert manager.steps() == []
        save(manager, 2, state).wait()


def test_a_save_does_not_wait_for_deletions(paths, state, monkeypatch):
    deleting, go_on, returned = threading.Event(), threading.Event(), []
    delete = LocalStore.delete

    def slow(*arguments):
        deleting.set()
        returned.append(go_on.wait(20))
        delete(*arguments)

    with Manager([Level("disk", paths[1], keep=1)]) as manager:
        save(manager, 1, state).wait()
        monkeypatch.setattr(LocalStore, "delete", slow)
        save(manager, 2, state)
        assert deleting.wait(60)
        save(manager, 3, state)  # returns
        go_on.set()
        manager.wait()
        assert manager.steps() == [3]
    assert all(returned)


def test_a_second_run_in_the_same_directory_is_refused(paths, state):
    with Manager(levels(paths)) as manager:
        with pytest.raises(UserError, match="being written by process"):
            Manager([Level("other", paths[0].parent / "x"), Level("disk", paths[1])])
        save(manager, 1, state).wait()
    with Manager([Level("other", paths[0].parent / "x"), Level("disk", paths[1])]):
        pass


def test_a_later_step_of_another_run_is_not_mixed_with(paths, state):
    with Manager(levels(paths)) as manager:
        save(manager, 9, state).wait()
        with pytest.raises(UserError, match="already holds step 9"):
            save(manager, 4, state)
        assert manager.steps() == [9]


@pytest.mark.parametrize(("how", "message"), [({"keep": 0}, "keep=0"), ({"every": 0}, "every=0")])
def test_a_level_with_senseless_numbers_is_refused(tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        Level("disk", tmp_path, **how)


def test_levels_must_differ(tmp_path):
    with pytest.raises(UserError, match="all different"):
        Manager([Level("disk", tmp_path / "a"), Level("disk", tmp_path / "b")])
