"""What a configuration says is what the run does, and what its figures count."""

import dataclasses
import struct
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import assert_near
from tiny_runs import MODEL, make_config, quiet, write_model

from jaxsys.data import Loader
from jaxsys.dispatch import dispatcher
from jaxsys.train.metrics import Metrics, read
from jaxsys.train.trainer import NonFiniteLoss, Trainer
from parallelism import to_host
from parallelism.errors import UserError


def test_every_form_of_the_step_takes_all_microbatches_and_publishes(tmp_path, material):
    ends = {}
    for form, accumulate in (("fused", 1), ("fused", 2), ("split", 2)):
        options = {"step_form": form, "accumulate": accumulate, "update_groups": 2, "steps": 3, "eval_batches": 0}
        with Trainer(make_config(tmp_path / f"{form}{accumulate}", material, **options), quiet()) as trainer:
            losses = trainer.run().losses
            lease = dispatcher().call(trainer.live.lease)
            assert lease.version == 3 and lease.params is trainer.params
            ends[form, accumulate] = losses, to_host(trainer.plan.layout, lease.params)
    losses, params = ends.pop(("fused", 1))
    for found, arrays in ends.values():
        np.testing.assert_allclose(found, losses, rtol=1e-6)
        assert_near(arrays, params, 1e-5)


def test_a_run_begins_with_the_weights_of_init_from(tmp_path, material):
    arrays = write_model(tmp_path / "model", material)
    config = make_config(tmp_path / "run", material, model=None, init_from=str(tmp_path / "model"), eval_batches=0)
    with Trainer(config, quiet()) as trainer:
        found = to_host(trainer.plan.layout, trainer.params)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_the_seed_decides_the_first_weights(tmp_path, material):
    first = []
    for i, seed in enumerate((3, 3, 4)):
        with Trainer(make_config(tmp_path / str(i), material, seed=seed, eval_batches=0), quiet()) as trainer:
            first.append(np.asarray(trainer.params["embed.kernel"]))
    np.testing.assert_array_equal(first[0], first[1])
    assert np.abs(first[0] - first[2]).max() > 1e-3


def test_evaluation_is_over_the_targets_of_held_out_text(tmp_path, material):
    config = make_config(tmp_path / "run", material, eval_batches=2, accumulate=2)
    with Trainer(config, quiet()) as trainer:
        found = trainer.evaluate()
        names = {graph.name for graph in trainer.graphs}
        dataset, data = trainer.train_data.dataset, config.data
        grads, params = jax.jit(trainer.step_functions.grads), trainer.params
        heldout = Loader(dataset, 2, data.seq_len, config.seed, "heldout", data.heldout)
        sums = [jax.device_get(grads(params, heldout.batch(i))[1]) for i in range(2)]
    loss, targets = (sum(float(each[name]) for each in sums) for name in ("loss", "targets"))
    np.testing.assert_allclose(found, loss / targets, rtol=1e-6)
    # The programs that generate and score.
    assert "forward[128x16]" in names and "evaluate" not in names


def test_a_held_out_loss_that_is_nan_stops_the_run(tmp_path, material):
    with Trainer(make_config(tmp_path / "run", material), quiet()) as trainer:
        trainer.evaluate = lambda: float("nan") if trainer.step == 6 else 1.0
        with pytest.raises(
            NonFiniteLoss, match="held-out loss nan at step 6; the same command resumes from step 4, or"
        ):
            trainer.run()  # and what it is of is not saved


def test_settings_reach_the_step_the_storage_the_records_and_the_peak(tmp_path, material):
    options = {"remat": "full", "compute_dtype": "bfloat16", "storage": "stacked", "target": "v5e"}
    config = make_config(tmp_path / "run", material, log_every=2, eval_every=2, steps=5, **options)
    with Trainer(config, quiet()) as trainer:
        assert trainer.step_functions.remat == "full" and trainer.step_functions.compute_dtype == "bfloat16"
        assert "layers.0-0.mlp.up.kernel" in trainer.params
        summary = trainer.run()
    rows = read(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 2, 4, 5]
    assert summary.utilisation == pytest.approx(summary.model_flops_per_second / 197e12)


def test_no_peak_is_made_up_for_hardware_without_one(tmp_path, material):
    summary = None
    with Trainer(make_config(tmp_path / "run", material, steps=2), quiet()) as trainer:
        summary = trainer.run()
    assert summary.model_flops_per_second > 0 and summary.utilisation is None


def test_the_work_of_a_batch_leaves_padding_out():
    host = {
        "segments": np.array([[1, 1, 2, 0], [1, 0, 0, 0]], np.int32),
        "positions": np.array([[0, 1, 0, 0], [0, 0, 0, 0]], np.int32),
    }

    def work(host, share):
        launcher = SimpleNamespace(share=share)
        return Trainer._work(SimpleNamespace(model=SimpleNamespace(config=MODEL), launcher=launcher), host)

    flops = 4 * MODEL.flops_per_token(np.array([1, 2, 1, 1]))
    assert work(host, 1.0) == {"tokens": 4, "flops": flops}
    assert work(host, 0.5) == {"tokens": 8, "flops": 2 * flops}  # another process has the other half
    nothing = {name: np.zeros_like(array) for name, array in host.items()}
    assert work(nothing, 1.0) == {"tokens": 0, "flops": 0.0}


def test_what_does_not_divide_is_said_in_one_line(tmp_path, material):
    console = quiet()
    config = make_config(tmp_path / "run", material, mesh="tensor=2")
    with pytest.raises(UserError, match="nowhere"):  # refused after the line
        Trainer(dataclasses.replace(config, data=dataclasses.replace(config.data, source="nowhere")), console)
    (line,) = (line for line in console.lines if line.startswith("sharding of parameters: "))
    assert "kv_heads=3 does not divide over tensor=2: padded to 4 (in 2 arrays)" in line and "vocab=257" in line


def test_several_processes_without_a_watch_of_them_are_refused(tmp_path, material, monkeypatch):
    monkeypatch.setattr("jaxsys.train.trainer.job", lambda: (0, 2))
    with pytest.raises(UserError, match="JAX has 2 processes, the trainer was told of 1"):
        Trainer(make_config(tmp_path / "run", material), quiet())


def test_every_progress_line_of_a_log_has_figures(tmp_path, material):
    console = quiet()
    with Trainer(make_config(tmp_path / "run", material, steps=2), console) as trainer:
        trainer.run()
    lines = [line for line in console.lines if line.startswith("train ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all("loss" in line and "tokens/s" in line for line in lines)


def test_a_signal_while_the_devices_are_waited_for_skips_the_evaluation(tmp_path, material, monkeypatch):
    with Trainer(make_config(tmp_path / "run", material, eval_every=2), quiet()) as trainer:
        get = jax.device_get

        def interrupted(arrays):
            if trainer.step == 2:
                trainer.stop.asked = "SIGTERM"
            return get(arrays)

        monkeypatch.setattr(jax, "device_get", interrupted)
        summary = trainer.run()
        assert (summary.step, trainer.manager.steps()) == (2, [2])
    assert [row["step"] for row in read(tmp_path / "run") if "heldout_loss" in row] == [0]


# --------------------------------------------------------------------------------------------------------- records


def test_metrics_are_tensorboard_events_too(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    metrics = Metrics(tmp_path, 0)
    metrics.write(3, {"loss": 1.5, "samples": ["not a number"]})
    metrics.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    raw, events = path.read_bytes(), []
    while raw:  # a record: length, its checksum, data, its checksum
        (size,) = struct.unpack("<Q", raw[:8])
        events.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[16 + size :]
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values == [(3, "loss", 1.5)]


def test_what_a_power_loss_left_in_the_records_is_passed_over(tmp_path):
    good = b'{"step": 1, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\0\0\0\n\xff\xfe\n[3]\n{}\n" + good)
    assert read(tmp_path) == [{"step": 1, "loss": 1.0}] * 2
    Metrics(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == 2 * good


def test_a_resume_records_nothing_twice(tmp_path):
    for _ in range(2):
        metrics = Metrics(tmp_path, 4)
        metrics.write(4, {"heldout_loss": 2.0})
        metrics.close()
    assert read(tmp_path) == [{"step": 4, "heldout_loss": 2.0}]
