"""Training through stages equals one device: steps, runs, checkpoints."""

import dataclasses

import numpy as np
import pytest
from step_cases import DEEP, LENGTH, MODELS, OPTIM, ROWS, STEPS, TOLERANCE, compare, on_one_device, steps
from tiny_models import EXPERTS, x64
from tiny_runs import MODEL, make_config, quiet

from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import DataConfig, PipelineConfig, TrainConfig
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError
from pipelines.generators import GENERATORS
from pipelines.offload import offload
from pipelines.simulate import Costs


def config(mesh, model="llama", schedule="1f1b", dtype="float64", accumulate=4, **more):
    pipeline = {key: more.pop(key) for key in ("chunks", "recompute", "device_slots", "head") if key in more}
    return TrainConfig(
        run="none", model=DEEP[model], mesh=mesh, data=DataConfig(batch_size=ROWS, seq_len=LENGTH), optim=OPTIM,
        steps=STEPS, accumulate=accumulate, pipeline=PipelineConfig(schedule, **pipeline), parameter_dtype=dtype,
        compute_dtype=dtype, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"mesh": "stage=2", "schedule": "1f1b"}),
        ("gemma2", {"mesh": "stage=2,fsdp=2,tensor=2", "schedule": "1f1b"}),
        ("llama", {"mesh": "stage=2,tensor=2", "schedule": "interleaved", "remat": "full"}),
        ("llama", {"mesh": "stage=4,data=2", "schedule": "zb-h1"}),
        ("gemma2", {"mesh": "stage=2,fsdp=2", "schedule": "zb-v", "optimizer_rules": "embed=data+fsdp"}),
        ("llama", {"mesh": "stage=4", "schedule": "eager", "recompute": True}),
        ("llama", {"mesh": "stage=2,fsdp=2", "schedule": "eager", "head": 2.0}),
        ("llama", {"mesh": "stage=2,fsdp=2", "schedule": "1f1b", "offload": "optimizer"}),
        ("llama", {"mesh": "stage=4,fsdp=2", "schedule": "gpipe", "device_slots": 1}),
        ("llama", {"mesh": "stage=2,context=2,tensor=2", "schedule": "1f1b", "context_method": "all_gather"}),
        ("gemma2", {"mesh": "stage=2,context=4", "schedule": "zb-h1", "context_method": "all_to_all"}),
        ("qwen3_moe", {"mesh": "stage=2,expert=2,tensor=2", "schedule": "1f1b"}),
        ("capacity", {"mesh": "stage=2,fsdp=2,expert=2", "schedule": "zb-v"}),
        (
            "qwen3_moe",
            {
                "mesh": "stage=2,context=2,expert=2",
                "schedule": "1f1b",
                "context_method": "all_gather",
                "recompute": True,
            },
        ),
        ("qwen3_moe", {"mesh": "stage=2", "schedule": "gpipe", "accumulate": 1}),
    ],
)
def test_a_step_through_stages_equals_one_device(model, options):
    compare(steps(config(model=model, **options)), on_one_device(model, deep=True), TOLERANCE["float64"])


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("stage=2,fsdp=2", {"schedule": "1f1b"}),
        ("stage=2", {"schedule": "zb-h1"}),
        ("stage=2,tensor=2", {"schedule": "eager", "recompute": True}),
        ("stage=2", {"schedule": "gpipe", "device_slots": 1}),
    ],
)
def test_a_step_in_float32(mesh, options):
    """Of two layers: of five, float32 is further than the tolerance from float64 on one device too."""
    chosen = dataclasses.replace(config(mesh, dtype="float32", **options), model=MODELS["llama"])
    compare(steps(chosen), on_one_device("llama"), TOLERANCE["float32"])


def test_every_schedule_has_a_case_here():
    cases = test_a_step_through_stages_equals_one_device.pytestmark[0].args[1]
    assert {options["schedule"] for _, options in cases} == set(GENERATORS)


def train(config, stop_at=None):
    with Trainer(config, quiet()) as trainer:
        return trainer.run(stop_at)


def test_a_run_goes_on_with_other_numbers_of_stages_and_without(tmp_path, material):
    options = {"accumulate": 2, "model": dataclasses.replace(MODEL, n_layers=3)}
    straight = train(make_config(tmp_path / "a", material, **options))
    first = train(make_config(tmp_path / "b", material, mesh="stage=2,fsdp=2", **options), stop_at=2)
    second = train(make_config(tmp_path / "b", material, **options), stop_at=4)
    third = train(make_config(tmp_path / "b", material, mesh="stage=2,tensor=2", **options))
    assert (first.step, second.first_step, third.first_step, third.step) == (2, 2, 4, 6)
    np.testing.assert_allclose([*first.losses, *second.losses, *third.losses], straight.losses, rtol=1e-4)
    assert third.heldout_after == pytest.approx(straight.heldout_after, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_fifty_steps_agree_with_those_of_one_device(tmp_path, material, schedule):
    options = {"accumulate": 2, "steps": 50, "model": dataclasses.replace(MODEL, n_layers=5)}
    straight = train(make_config(tmp_path / "a", material, **options))
    staged = PipelineConfig(schedule)
    found = train(make_config(tmp_path / "b", material, mesh="stage=2,fsdp=2", pipeline=staged, **options))
    assert len(found.losses) == 50
    np.testing.assert_allclose(found.losses, straight.losses, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "stage=8"}, "mesh stage=8: found 5 layers for 8 stages of 1 chunks, expected at least 8"),
        ({"mesh": "stage=2", "schedule": "1f2b"}, "pipeline.schedule '1f2b'"),
        ({"mesh": "stage=4", "schedule": "interleaved", "accumulate": 2}, "2 microbatches, expected a multiple of"),
        ({"mesh": "stage=2", "chunks": 3}, "pipeline.chunks 3 with pipeline.schedule 1f1b"),
        ({"mesh": "fsdp=2", "recompute": True}, "pipeline.recompute=True on mesh 'fsdp=2': it has no axis stage"),
        ({"mesh": "stage=2", "step_form": "split"}, "mesh stage=2 with step_form=split"),
        ({"mesh": "stage=2", "storage": "listed"}, "mesh stage=2 with storage=listed"),
        ({"mesh": "stage=2,context=2"}, "mesh stage=2,context=2 with context_method=ring: it sends by"),
        ({"mesh": "stage=2", "offload": "parameters", "remat": "full"}, "mesh stage=2 with offload=parameters"),
        ({"mesh": "stage=2", "device_slots": 1, "schedule": "eager"}, "slots=1 are too few"),
        ({"mesh": "stage=2", "schedule": "zb-h1", "recompute": True}, "pipeline.recompute=true with pipeline.sche"),
    ],
)  # fmt: skip
def test_what_stages_cannot_do_is_refused(options, message):
    chosen = config(**options)
    with x64(), pytest.raises(UserError, match=message):
        AbstractRun(chosen, chosen.model).prepare()


def test_a_table_from_a_file_runs_and_one_of_another_size_is_refused(tmp_path):
    path = tmp_path / "table.json"
    offload(GENERATORS["1f1b"](2, 4), Costs(residual=1.0, link=9.0, pieces=4), 1).table.save(path)
    found = steps(config("stage=2", schedule=str(path)))
    compare(found, on_one_device("llama", deep=True), TOLERANCE["float64"])
    for options, message in (
        ({"accumulate": 8}, "a table of 2 stages and 4 microbatches, expected stage=2 of the mesh and accumulate=8"),
        ({"device_slots": 1}, "pipeline.device_slots 1: .* says already what waits in host memory"),
    ):
        chosen = config("stage=2", schedule=str(path), **options)
        with x64(), pytest.raises(UserError, match=message):
            AbstractRun(chosen, chosen.model)


def test_a_run_says_how_its_layers_lie_and_how_long_stages_wait(tmp_path, material):
    console = quiet()
    options = {"accumulate": 4, "model": dataclasses.replace(MODEL, n_layers=3), "pipeline": PipelineConfig(head=1.0)}
    with Trainer(make_config(tmp_path / "a", material, mesh="stage=2", **options), console):
        pass
    (said,) = (line for line in console.lines if line.startswith("pipeline 1f1b: "))
    assert "2 + 1 layers, a stage holds 2 of 4 activations at most, and they wait 33% of the time" in said


def test_layers_of_several_shapes_are_refused():
    chosen = dataclasses.replace(config("stage=2"), model=EXPERTS)
    with x64(), pytest.raises(UserError, match="mesh stage=2: the layers of this model have 2 shapes, expected one"):
        AbstractRun(chosen, chosen.model)
