"""The examples of docs/checkpointing.md run as they are written."""

import re
from pathlib import Path

import jax
import numpy as np

from checkpoint import Level, Manager
from parallelism.layout import Layout, Logical, Stored

TEXT = (Path(__file__).parents[2] / "docs" / "checkpointing.md").read_text()
WITH_A_MANAGER, ORIGINS, WITHOUT, ORBAX = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_with_a_manager(tmp_path, monkeypatch, h):
    monkeypatch.chdir(tmp_path)
    state = h.make_state()
    scope = {"step": 200, "meta": {}, "keys": ["embed"], **vars(state)}
    exec(WITH_A_MANAGER.replace("/dev/shm/", "ram/"), scope)
    assert scope["restored"] is None and scope["handle"].metrics.levels.keys() == {"ram", "disk"}
    exec(WITH_A_MANAGER.replace("/dev/shm/", "ram/"), scope | {"step": 300})
    assert sorted(p.name for p in tmp_path.glob("*/my-run/**/step-*")) == ["step-00000200"] * 2 + ["step-00000300"] * 2


def test_the_example_of_origins(tmp_path):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def layout_of(**shapes):
        specs = [
            Logical(name.replace("__", "."), shape, np.dtype(np.float32), (None, None))
            for name, shape in shapes.items()
        ]
        return Layout([Stored(s.name, s.shape, s.dtype, s.axes, (s,)) for s in specs])

    saved = layout_of(qkv=(4, 3072), gate=(2, 8192), up=(2, 5), lm_head=(3, 2))
    values = {name: np.random.default_rng(0).standard_normal(s.shape, np.float32) for name, s in saved.items()}
    layout = layout_of(attention__k=(4, 1024), mlp__gate_up=(2, 8197), head=(2, 3))
    with Manager([Level("disk", tmp_path)]) as manager:
        manager.save(1, {name: jax.device_put(v, device) for name, v in values.items()}, saved, {}).wait()
        scope = {"manager": manager, "layout": layout, "shardings": dict.fromkeys(layout, device)}
        restoring = ORIGINS.replace("manager.restore(", "restored = manager.restore(")
        exec(restoring, scope)
    found = {name: np.asarray(array) for name, array in scope["restored"].arrays.items()}
    np.testing.assert_array_equal(found["attention.k"], values["qkv"][:, 2048:])
    np.testing.assert_array_equal(found["mlp.gate_up"], np.concatenate([values["gate"], values["up"]], 1))
    np.testing.assert_array_equal(found["head"], values["lm_head"].T)


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
