"""What a restore makes of damaged, lost and killed checkpoints: mended, from several levels, or the step before."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from manager_runs import damage, levels, restore, save

from checkpoint import Level, Manager, find_checkpoint, open_checkpoint
from checkpoint.storage import LocalStore
from parallelism.errors import UserError
from parallelism.layout import Layout, Logical, Stored


def test_a_damaged_chunk_is_read_from_the_next_level_and_mended(paths, state, h, caplog):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        damage(paths[0], 1)
        restored = restore(manager, state)
        assert (restored.step, restored.source) == (1, "ram")
        ram, disk = (restored.sources[str(path / "step-00000001")] for path in paths)
        assert ram > disk > 0
        h.check(restored, state)
        assert any(
            "are damaged" in r.getMessage() and f"read from {paths[1]}" in r.getMessage() for r in caplog.records
        )
        assert all(report.ok for report in manager.verify())
        assert len(restore(manager, state).sources) == 1


def test_a_step_is_put_together_from_levels_that_are_damaged_in_different_places(paths, state, h):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        damage(paths[0], 1, 0.1)
        damage(paths[1], 1, 0.6)
        h.check(restore(manager, state), state)
        assert [report.ok for report in manager.verify()] == [True, False]


@pytest.mark.parametrize("what", ["data-*", "manifest.json"])
def test_a_file_that_is_lost_is_made_up_for_by_the_next_level(paths, state, h, what):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        (file,) = (paths[0] / "step-00000001").glob(what)
        file.unlink()
        restored = restore(manager, state)
        h.check(restored, state)
        if what == "data-*":
            assert restored.source == "ram" and all(report.ok for report in manager.verify())
        else:
            assert restored.source == "disk"


def test_a_damaged_manifest_leaves_the_step_to_the_next_level(paths, state, h):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        file = paths[0] / "step-00000001" / "manifest.json"
        file.write_bytes(file.read_bytes()[:-1])
        restored = restore(manager, state)
        assert restored.source == "disk"
        h.check(restored, state)


def test_a_step_damaged_everywhere_falls_back_to_the_one_before(paths, state, h):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state)
        save(manager, 2, h.make_state(seed=1)).wait()
        for path in paths:
            (file,) = (path / "step-00000002").glob("data-*")
            file.write_bytes(bytes(file.stat().st_size))
        restored = restore(manager, state)
        assert restored.step == 1
        h.check(restored, state)
        save(manager, 2, state).wait()
        assert restore(manager, state).step == 2


def test_naming_a_damaged_step_does_not_give_another(paths, state, h):
    with Manager([Level("disk", paths[1])]) as manager:
        save(manager, 1, h.make_state(seed=1))
        save(manager, 2, state).wait()
        damage(paths[1], 2)
        with pytest.raises(UserError, match="all are damaged"):
            restore(manager, state, 2)


def test_a_damaged_ram_step_is_not_promoted(paths, state, monkeypatch):
    put = LocalStore.put

    def damaging(self, *what):
        put(self, *what)
        if "ram" in self.where:
            damage(paths[0], 1)

    monkeypatch.setattr(LocalStore, "put", damaging)
    with Manager(levels(paths)) as manager:
        with pytest.raises(UserError, match="are damaged"):
            save(manager, 1, state).wait()
        assert not (paths[1] / "step-00000001").exists()


def test_a_step_under_another_steps_name_is_damage(paths, state):
    with Manager([Level("disk", paths[1])]) as manager:
        save(manager, 1, state).wait()
        os.rename(paths[1] / "step-00000001", paths[1] / "step-00000007")
        with pytest.raises(UserError, match="all are damaged"):
            restore(manager, state)


def test_restoring_from_nothing_is_a_user_error(paths, state):
    with Manager(levels(paths)) as manager:
        with pytest.raises(UserError, match="no checkpoint in"):
            restore(manager, state)
        save(manager, 1, state).wait()
        with pytest.raises(UserError, match=r"no checkpoint of step 4 \(there are \[1\]\)"):
            restore(manager, state, 4)


def test_another_model_is_refused_without_falling_back(paths, state):
    with Manager(levels(paths)) as manager:
        save(manager, 1, state).wait()
        smaller = Layout(s for s in state.layout.values() if s.key != "embed")
        with pytest.raises(UserError, match="does not match the model"):
            manager.restore(layout=smaller, shardings=state.shardings)


# -- crashes

KILLED = """
import os, signal, sys
import jax, numpy as np
from checkpoint import Level, Manager
from parallelism.layout import Layout, Logical, Stored

root, at = sys.argv[1], int(sys.argv[2])
spec = Logical("x", (64,), np.dtype(np.float32), (None,))
layout = Layout([Stored("x", spec.shape, spec.dtype, spec.axes, (spec,))])
def arrays(step):
    return {"x": jax.device_put(np.full(64, step, np.float32), jax.devices()[0])}
manager = Manager([Level("ram", root + "/ram"), Level("disk", root + "/disk", keep=1)])
manager.save(1, arrays(1), layout, {}).wait()
calls = [0]
def dying(call):
    def wrapped(*args, **kw):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kw)
    return wrapped
for name in ("fsync", "rename"):
    setattr(os, name, dying(getattr(os, name)))
manager.save(2, arrays(2), layout, {}).wait()
manager.close()
print("finished", calls[0])
"""

# Each level's save: sync root, data, directory, manifest, directory; rename; sync directory. Disk then deletes step 1:
# sync directory; again.
RAM, DISK, LAST_CALL = 6, 13, 16


@pytest.mark.parametrize("at", range(1, LAST_CALL + 2))
def test_a_kill_during_a_save_leaves_a_good_checkpoint_and_a_clean_start(tmp_path, at):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(at)],
        env={**os.environ, "PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if at > LAST_CALL:
        assert run.stdout == f"finished {LAST_CALL}\n", run.stderr
    else:
        assert run.returncode == -signal.SIGKILL, run.stderr
    spec = Logical("x", (64,), np.dtype(np.float32), (None,))
    layout = Layout([Stored("x", spec.shape, spec.dtype, spec.axes, (spec,))])
    disk = 1 if at <= DISK else 2
    assert open_checkpoint(find_checkpoint(tmp_path / "disk")).manifest.step == disk
    with Manager([Level("ram", tmp_path / "ram"), Level("disk", tmp_path / "disk")]) as manager:
        restored = manager.restore(layout=layout, shardings={"x": SingleDeviceSharding(jax.devices()[0])})
        assert restored.step == (1 if at <= RAM else 2)
        np.testing.assert_array_equal(np.asarray(restored.arrays["x"]), restored.step)
        assert not [p for p in tmp_path.glob("*/.*") if p.name != ".lock"] + list(tmp_path.glob("*/*/.*"))
