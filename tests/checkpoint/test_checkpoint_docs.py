"""The examples of docs/checkpointing.md run as they are written."""

import re
from pathlib import Path

import numpy as np

from checkpoint import Level, Manager

TEXT = (Path(__file__).parents[2] / "docs" / "checkpointing.md").read_text()
WITH_A_MANAGER, WITHOUT, ORBAX = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_with_a_manager(tmp_path, monkeypatch, h):
    monkeypatch.chdir(tmp_path)
    state = h.make_state()
    scope = {"step": 200, "meta": {}, "keys": ["embed"], **vars(state)}
    exec(WITH_A_MANAGER.replace("/dev/shm/", "ram/"), scope)
    assert scope["restored"] is None and scope["handle"].metrics.levels.keys() == {"ram", "disk"}
    exec(WITH_A_MANAGER.replace("/dev/shm/", "ram/"), scope | {"step": 300})
    assert sorted(p.name for p in tmp_path.glob("*/my-run/**/step-*")) == ["step-00000200"] * 2 + ["step-00000300"] * 2


def test_the_example_without_a_manager(tmp_path, monkeypatch, h):
    monkeypatch.chdir(tmp_path)
    state = h.make_state()
    with Manager([Level("disk", "runs/my-run/checkpoints")]) as manager:
        manager.save(3, state.arrays, state.layout, {}).wait()
    scope = dict(vars(state))
    exec(WITHOUT, scope)
    np.testing.assert_array_equal(np.asarray(scope["arrays"]["embed"])[:10], state.logical["embed"])
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_the_example_of_orbax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(ORBAX, scope)
    assert (scope["arrays"]["layers.0.w"].shape, scope["arrays"].meta) == ((512, 64), {"by": "me"})
    np.testing.assert_array_equal(scope["arrays"].read("layers.0.w")[:, 0], np.arange(512) // 128 * 128)
