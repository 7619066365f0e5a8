"""A run: resumed bit for bit, on another mesh, stopped by what is not a number, by a full disk."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny_runs import make_config, quiet, state_bytes

import jaxsys
from checkpoint import open_checkpoint
from checkpoint.storage import LocalStore
from jaxsys.optim import Constant, OptimConfig
from jaxsys.train.config import CheckpointConfig, SampleConfig
from jaxsys.train.metrics import Metrics, read
from jaxsys.train.trainer import NonFiniteLoss, Trainer
from parallelism.errors import UserError


def train(config, stop_at=None):
    with Trainer(config, quiet()) as trainer:
        return trainer.run(stop_at)


@pytest.mark.parametrize(("mesh", "form"), [("", "fused"), ("fsdp=2,tensor=2", "fused"), ("fsdp=2,tensor=2", "split")])
def test_2k_steps_equal_k_resumed_for_k_bit_for_bit(tmp_path, material, mesh, form):
    options = {"mesh": mesh, "step_form": form, "update_groups": 2}
    straight = train(make_config(tmp_path / "straight", material, **options))
    first = train(make_config(tmp_path / "resumed", material, **options), stop_at=3)
    second = train(make_config(tmp_path / "resumed", material, **options))
    assert (first.step, first.finished, second.first_step, second.step, second.finished) == (3, False, 3, 6, True)
    assert [*first.losses, *second.losses] == straight.losses
    expected = state_bytes(tmp_path / "straight", 6)
    assert any(name.startswith("optimizer.nu.") for name in expected)
    assert state_bytes(tmp_path / "resumed", 6) == expected
    assert expected != state_bytes(tmp_path / "resumed", 3)


def test_a_run_resumed_on_another_mesh_goes_on_as_if_nothing_had_happened(tmp_path, material):
    straight = train(make_config(tmp_path / "a", material))
    first = train(make_config(tmp_path / "b", material, mesh="fsdp=2,tensor=2"), stop_at=3)
    second = train(make_config(tmp_path / "b", material, mesh="data=2,fsdp=2", storage="stacked"))
    np.testing.assert_allclose([*first.losses, *second.losses], straight.losses, rtol=1e-4)
    assert straight.losses[-1] < straight.losses[0]


def test_metrics_are_continuous_over_a_resume(tmp_path, material):
    run = tmp_path / "run"
    config = make_config(run, material)
    train(config, stop_at=3)
    # What a killed run had recorded after its last checkpoint comes again.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    summary = train(config)
    rows = [row for row in read(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows[3:]] == summary.losses
    assert {"grad_norm", "learning_rate", "tokens_per_second", "model_flops_per_second", "targets"} <= rows[0].keys()
    assert len(list((run / "tensorboard").glob("events*"))) == 2


def test_a_run_that_is_done_trains_no_more(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=2)
    train(config)
    before = state_bytes(tmp_path / "run", 2)
    again = train(config)
    assert (again.step, again.losses, again.finished) == (2, [], True)
    assert state_bytes(tmp_path / "run", 2) == before


def test_held_out_loss_is_reported_before_and_after(tmp_path, material):
    summary = train(make_config(tmp_path / "run", material))
    assert summary.heldout_after < summary.heldout_before
    rows = [(row["step"], row["heldout_loss"]) for row in read(tmp_path / "run") if "heldout_loss" in row]
    assert rows == [(0, summary.heldout_before), (6, summary.heldout_after)]


@pytest.mark.parametrize(("mesh", "compute"), [("data=2,tensor=2", "float32"), ("", "bfloat16")])
def test_prompts_are_continued_by_the_live_weights_along_the_way(tmp_path, material, mesh, compute):
    sample = SampleConfig(("The quick", "Document 7"), every=2, max_tokens=12)
    config = make_config(tmp_path / "run", material, mesh=mesh, compute_dtype=compute, sample=sample)
    config = dataclasses.replace(config, optim=OptimConfig(schedule=Constant(), learning_rate=0.03))
    summary = train(config)
    rows = {row["step"]: row["samples"] for row in read(tmp_path / "run") if "samples" in row}
    assert list(rows) == [0, 2, 4, 6]
    assert rows[0] != rows[6]
    # What somebody says who loads the checkpoint; bfloat16 there rounds the norms too, a little.
    llm = jaxsys.load(tmp_path / "run", dtype=compute, max_context=32)
    texts = [result.text for result in llm.generate(sample.prompts, max_tokens=12, temperature=0.0)]
    assert rows[6] == [{"prompt": p, "text": t} for p, t in zip(sample.prompts, texts, strict=True)]
    without = train(dataclasses.replace(config, run=str(tmp_path / "other"), sample=SampleConfig()))
    assert without.losses == summary.losses


def test_the_copy_that_samples_are_taken_from_is_reported(tmp_path, material):
    sample, said = SampleConfig(("The",), max_tokens=2), {}
    for compute in ("float32", "bfloat16"):
        console = quiet()
        with Trainer(make_config(tmp_path / compute, material, compute_dtype=compute, sample=sample), console) as t:
            said[compute] = t.inference.view_bytes
            kernels = sum(s.nbytes // 2 for k, s in t.model.layout.items() if "norm" not in s.axes)
            norms = sum(s.nbytes for s in t.model.layout.values() if "norm" in s.axes)
    assert said == {"float32": 0, "bfloat16": kernels + norms}


def test_a_prompt_that_the_context_cannot_hold_is_refused_before_training(tmp_path, material):
    config = make_config(tmp_path / "run", material, sample=SampleConfig(("x" * 65,)))
    with pytest.raises(UserError, match="prompt of 65 tokens, expected at most 63"):
        Trainer(config, quiet())


def test_without_evaluation_no_text_is_held_out(tmp_path, material):
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=1)
    summary = train(dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=0.0)))
    assert (summary.heldout_before, summary.heldout_after, summary.finished) == (None, None, True)


def test_a_signal_that_comes_during_an_evaluation_leaves_no_step_unsaved(tmp_path, material):
    config = make_config(tmp_path / "run", material, eval_every=1, checkpoint=CheckpointConfig(every=100))
    with Trainer(config, quiet()) as trainer:
        evaluated = trainer._evaluated

        def interrupted(metrics):
            if trainer.step == 2:
                trainer.stop.asked = "SIGTERM"
            return evaluated(metrics)

        trainer._evaluated = interrupted
        summary = trainer.run()
        assert (summary.step, summary.finished, trainer.manager.steps()) == (3, False, [3])


# ---------------------------------------------------------------------------------------------------- not a number


def poison(trainer, step, value):
    """From ``step`` on the parameters that a step starts from hold ``value``."""
    launch = trainer._launch

    def poisoned(batches, n):
        if n == step:
            key = "norm.scale"
            array = trainer.params[key]
            trainer.params = {
                **trainer.params,
                key: jax.device_put(np.full(array.shape, value, array.dtype), array.sharding),
            }
        return launch(batches, n)

    trainer._launch = poisoned


def test_a_loss_that_is_nan_stops_naming_step_batch_and_last_good_checkpoint(tmp_path, material):
    with Trainer(make_config(tmp_path / "run", material), quiet()) as trainer:
        poison(trainer, 4, np.nan)
        with pytest.raises(NonFiniteLoss) as error:
            trainer.run()
    message = str(error.value)
    assert "loss nan" in message and "at train step 5: epoch 0, rows" in message and ".txt" in message
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert f"the same command resumes from step 4, or from step 2 after rm -r {newest}:" in message
    assert "\n" not in message
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000002", "step-00000004"]
    for step in (2, 4):
        for name, raw in state_bytes(tmp_path / "run", step).items():
            assert name == "optimizer.count" or np.isfinite(np.frombuffer(raw, np.float32)).all()


@pytest.mark.parametrize("every", [1, 2])
def test_no_checkpoint_is_written_of_parameters_that_are_not_finite(tmp_path, material, every):
    """The loss of the step that breaks them is still finite."""
    config = make_config(
        tmp_path / "run", material, optim=OptimConfig(learning_rate=1e300), checkpoint=CheckpointConfig(every=every)
    )
    with pytest.raises(NonFiniteLoss, match="there is no good checkpoint"):
        train(config)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


# ------------------------------------------------------------------------------------------------------- full disk


def fill_disk(monkeypatch, steps):
    """Writing the checkpoints of these steps fails."""
    create = LocalStore.create

    def failing(self, directory, name):
        if int(directory.rpartition("-")[2]) in steps:
            raise OSError(28, "No space left on device")
        return create(self, directory, name)

    monkeypatch.setattr(LocalStore, "create", failing)


def test_a_save_that_fails_leaves_training_and_earlier_checkpoints_alone(tmp_path, material, monkeypatch, caplog):
    fill_disk(monkeypatch, {4})
    summary = train(make_config(tmp_path / "run", material))
    assert summary.finished and len(summary.losses) == 6 and summary.save_error is None
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("*step-*"))]
    assert steps == ["step-00000002", "step-00000006"]
    assert any("No space left" in r.message and r.levelname == "ERROR" for r in caplog.records)
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002").verify().ok


def test_a_last_save_that_fails_is_in_the_summary(tmp_path, material, monkeypatch):
    fill_disk(monkeypatch, {6})
    summary = train(make_config(tmp_path / "run", material))
    assert "No space left" in summary.save_error and "step 6" in summary.save_error
    monkeypatch.undo()
    again = train(make_config(tmp_path / "run", material))
    assert (again.first_step, again.save_error) == (4, None)


def test_a_disk_that_refuses_after_memory_took_the_last_save_is_in_the_summary(tmp_path, material, monkeypatch):
    create = LocalStore.create

    def failing(self, directory, name):
        if "memory" not in self.where:
            raise OSError(28, "No space left on device")
        return create(self, directory, name)

    monkeypatch.setattr(LocalStore, "create", failing)
    levels = CheckpointConfig(every=2, ram=str(tmp_path / "memory"), ram_every=1)
    summary = train(make_config(tmp_path / "run", material, checkpoint=levels, steps=2))
    assert "No space left" in summary.save_error


def test_metrics_that_cannot_be_written_are_an_error_in_the_log_and_no_half_line(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 1.0})
    good = metrics._file

    class Full:
        def __getattr__(self, name):
            return getattr(good, name)

        def write(self, data):
            return good.write(data[:5])

    metrics._file = Full()
    metrics.write(2, {"loss": 2.0})
    metrics._file = good
    metrics.write(3, {"loss": math.nan})
    metrics.close()
    assert read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": None}]
    assert any("metrics of step 2 were not written" in r.message for r in caplog.records)


def test_a_full_disk_does_not_block_tensorboard_events(tmp_path, caplog):
    """tensorboardX's own thread would die and its queue fill up."""
    metrics = Metrics(tmp_path, 0)

    def full(event):
        raise OSError(28, "No space left on device")

    metrics._events._writer.write_event = full
    for step in range(50):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert len(read(tmp_path)) == 50
    assert sum("TensorBoard" in r.message for r in caplog.records) == 1


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_resume_with_another_model_names_what_differs(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=2)
    train(config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_theta=5e4))
    with pytest.raises(UserError, match=r"another model: rope_theta=10000.0 there, 50000.0 now"):
        Trainer(other, quiet())
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=32))
    with pytest.raises(UserError, match=r"another model: d_ff=24 there, 32 now"):
        Trainer(wider, quiet())
    with pytest.raises(UserError, match="another rng: seed=0 there, 1 now"):
        Trainer(dataclasses.replace(config, seed=1), quiet())
    with pytest.raises(UserError, match="another data: batch_size=4 there, 8 now"):
        Trainer(dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8)), quiet())


def test_one_run_directory_has_one_writer(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=1)
    with Trainer(config, quiet()), pytest.raises(UserError, match="is being written by process"):
        Trainer(config, quiet())


def test_the_profile_of_some_steps_is_written(tmp_path, material):
    train(make_config(tmp_path / "run", material, profile="2:4"))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_the_graphs_of_the_split_step_are_those_that_it_needs(tmp_path, material):
    options = {"step_form": "split", "update_groups": 2, "steps": 1, "eval_batches": 0}
    with Trainer(make_config(tmp_path / "one", material, **options), quiet()) as trainer:
        names = {graph.name for graph in trainer.graphs}
    assert names == {"init", "init_optimizer", "finite", "grads", "finish", "update[0]", "update[1]"}
    with Trainer(make_config(tmp_path / "two", material, accumulate=2, **options), quiet()) as trainer:
        assert {graph.name for graph in trainer.graphs} == {*names, "accumulate"}
        assert len(trainer.run().losses) == 1
