"""What saving and restoring costs: in metrics.jsonl, for Prometheus, and as an estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_runs import make_config, quiet

from checkpoint import Level, Manager
from checkpoint.levels import OpenLevel
from jaxsys.serve.metrics import Metrics as ServerMetrics
from jaxsys.train.config import CheckpointConfig, ServeConfig
from jaxsys.train.metrics import read
from jaxsys.train.saves import Saves
from jaxsys.train.trainer import Trainer
from parallelism.layout import Layout, Logical, Stored

PART = Logical("a", (64,), np.dtype("float32"), (None,))
LAYOUT = Layout([Stored("a", (64,), np.dtype("float32"), (None,), (PART,))])


def levels(tmp_path):
    return [Level("ram", tmp_path / "ram"), Level("disk", tmp_path / "disk", every=2)]


def scraped(collect):
    """Samples by name and labels."""
    metrics = ServerMetrics()
    metrics.add(collect)
    families = text_string_to_metric_families(metrics.text().decode())
    return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples if "checkpoint" in s.name}


@pytest.fixture
def saved(tmp_path):
    """Three saves of an array that changes once, each done before the next."""
    with Manager(levels(tmp_path)) as manager:
        saves, handles = Saves(manager, levels(tmp_path)), []
        for step, value in ((1, 0.0), (2, 1.0), (3, 1.0)):
            handles.append(manager.save(step, {"a": jnp.full(64, value)}, LAYOUT, {}))
            saves.began(handles[-1])
            manager.wait()
        yield manager, saves, [handle.metrics for handle in handles]


def test_a_save_is_a_row_once_it_is_done(saved):
    _, saves, costs = saved
    rows = saves.rows()
    assert [step for step, _ in rows] == [1, 2, 3]
    for (_, row), cost in zip(rows, costs, strict=True):
        assert row["checkpoint_stall_seconds"] == cost.stall_seconds
        assert row["checkpoint_waiting_seconds"] == cost.waiting_seconds
        assert row["checkpoint_copy_seconds"] == cost.copy_seconds
        assert {name for name in row if "disk" in name} == (
            {"checkpoint_disk_seconds", "checkpoint_disk_bytes", "checkpoint_disk_kept_bytes"}
            if "disk" in cost.levels
            else set()
        )
        assert row["checkpoint_ram_seconds"] == cost.levels["ram"].seconds
    found = [(row["checkpoint_ram_bytes"], row["checkpoint_ram_kept_bytes"]) for _, row in rows]
    assert found == [(256, 0), (256, 0), (0, 256)]
    assert saves.rows() == []


def test_totals_are_sums_and_the_newest(saved):
    _, saves, costs = saved
    found = scraped(saves.collect)
    for level, steps in (("ram", (1, 2, 3)), ("disk", (2,))):
        written = [costs[step - 1].levels[level] for step in steps]
        assert found["jaxsys_checkpoint_saves_total", level] == len(steps)
        assert found["jaxsys_checkpoint_written_bytes_total", level] == sum(w.nbytes for w in written)
        assert found["jaxsys_checkpoint_kept_bytes_total", level] == sum(w.kept_bytes for w in written)
        assert found["jaxsys_checkpoint_write_seconds_total", level] == pytest.approx(sum(w.seconds for w in written))
        assert found["jaxsys_checkpoint_failures_total", level] == 0
        assert found["jaxsys_checkpoint_last_step", level] == steps[-1]
        assert found["jaxsys_checkpoint_last_age_seconds", level] >= 0
    for name in ("stall", "waiting", "copy"):
        expected = sum(getattr(cost, f"{name}_seconds") for cost in costs)
        assert found[f"jaxsys_checkpoint_{name}_seconds_total",] == pytest.approx(expected)


def test_a_save_is_expected_to_take_as_long_as_the_last_there_or_at_the_next_slower_level(saved, tmp_path):
    manager, saves, costs = saved
    assert saves.estimate("ram") == costs[2].levels["ram"].seconds
    assert saves.estimate("disk") == costs[1].levels["disk"].seconds
    fresh = Saves(manager, levels(tmp_path))
    assert fresh.estimate("ram") == float("inf")
    fresh.at["disk"].add(2, costs[1].levels["disk"])
    assert fresh.estimate("ram") == costs[1].levels["disk"].seconds


def test_a_level_that_fails_is_counted_and_its_row_says_why(tmp_path, monkeypatch):
    def full(self, *what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OpenLevel, "promote", full)
    with Manager(levels(tmp_path)) as manager:
        saves = Saves(manager, levels(tmp_path))
        saves.began(manager.save(2, {"a": jnp.zeros(64)}, LAYOUT, {}))
        manager.wait()
        ((_, row),) = saves.rows()
        found = scraped(saves.collect)
    assert "No space left on device" in row["checkpoint_disk_error"] and row["checkpoint_ram_bytes"] == 256
    assert (found["jaxsys_checkpoint_failures_total", "disk"], found["jaxsys_checkpoint_saves_total", "disk"]) == (1, 0)
    assert ("jaxsys_checkpoint_last_step", "disk") not in found


def test_a_save_goes_to_the_levels_that_are_named_whatever_is_due(tmp_path):
    with Manager(levels(tmp_path)) as manager:
        metrics = manager.save(1, {"a": jnp.zeros(64)}, LAYOUT, {}, levels=["disk"]).wait()
        assert list(metrics.levels) == ["disk"] and not list((tmp_path / "ram").glob("step-*"))
        assert list(manager.save(2, {"a": jnp.zeros(64)}, LAYOUT, {}, levels=["ram"]).wait().levels) == ["ram"]
        with pytest.raises(ValueError, match=r"no checkpoint levels \['dsk'\]: there are \['ram', 'disk'\]"):
            manager.save(3, {"a": jnp.zeros(64)}, LAYOUT, {}, levels=["dsk"])


def test_a_restore_says_what_was_read_where(saved, tmp_path):
    manager, _, _ = saved
    fresh = Saves(manager, levels(tmp_path))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    restored = manager.restore(layout=LAYOUT, shardings={"a": one})
    fresh.took(restored)
    ((step, row),) = fresh.rows()
    assert (step, row["restore_bytes"], row["restore_seconds"]) == (3, 256, restored.seconds)
    assert sum(row["restore_sources"].values()) == 256 and all("ram" in place for place in row["restore_sources"])
    found = scraped(fresh.collect)
    assert found["jaxsys_checkpoint_restored_bytes", *row["restore_sources"]] == 256
    assert not fresh.restored.arrays


# ------------------------------------------------------------------------------------------------------------- a run


def test_a_run_records_each_save_and_serves_the_totals(tmp_path, material):
    every = CheckpointConfig(every=2, keep=10)
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=4, checkpoint=every)
    with Trainer(config, quiet()) as trainer:
        trainer.run(stop_at=2)
    served = type(config)(**{**vars(config), "serve": ServeConfig(port=0, max_context=16)})
    with Trainer(served, quiet()) as trainer:
        trainer.run()
        text = trainer.server.front.metrics.text().decode()
    rows = {row["step"]: row for row in read(tmp_path / "run") if "checkpoint_disk_bytes" in row}
    files = {step: (tmp_path / "run" / "checkpoints" / f"step-{step:08}").glob("data-*") for step in (2, 4)}
    expected = {step: sum(path.stat().st_size for path in paths) for step, paths in files.items()}
    assert {step: row["checkpoint_disk_bytes"] for step, row in rows.items()} == expected
    assert all(row["checkpoint_stall_seconds"] >= 0 for row in rows.values())
    ((step, nbytes),) = ((r["step"], r["restore_bytes"]) for r in read(tmp_path / "run") if "restore_bytes" in r)
    assert step == 2 and 0.99 * expected[2] <= nbytes <= expected[2]  # no table of cells where all are read
    assert f'jaxsys_checkpoint_written_bytes_total{{level="disk"}} {rows[4]["checkpoint_disk_bytes"]:.1f}' in text
    assert 'jaxsys_checkpoint_last_step{level="disk"} 4.0' in text
