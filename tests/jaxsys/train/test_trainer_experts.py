"""A run of a model with experts: split and fused, resumed on another mesh, exported."""

import dataclasses

import numpy as np
import pytest
from tiny_models import assert_near
from tiny_runs import MODEL, make_config, quiet, write_model, write_recipe

from checkpoint import open_checkpoint
from jaxsys import configuration
from jaxsys.cli.main import main
from jaxsys.export import Asked, reshard
from jaxsys.models.config import Experts
from jaxsys.models.pretrained import Pretrained
from jaxsys.optim import SGD, Constant, OptimConfig
from jaxsys.train import TrainConfig
from jaxsys.train.abstract import starting_model
from jaxsys.train.metrics import read
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError

OLMOE = dataclasses.replace(
    MODEL, family="olmoe", n_layers=1, head_dim=4, n_heads=4, n_kv_heads=2, d_ff=12, qk_norm="width",
    experts=Experts(4, 2, 12, normalise=False, balance_loss=0.1, z_loss=0.01),
)  # fmt: skip
BALANCED = dataclasses.replace(OLMOE.experts, balance_loss=0.02, z_loss=0.0)


def train(config, stop_at=None):
    with Trainer(config, quiet()) as trainer:
        trainer.run(stop_at)


def test_a_run_resumed_on_another_mesh_is_the_run_on_one_device(tmp_path, material):
    def config(name, mesh, form):
        return make_config(
            tmp_path / name,
            material,
            model=OLMOE,
            mesh=mesh,
            accumulate=2,
            step_form=form,
            steps=4,
            eval_batches=0,
            update_groups=1,
            optim=OptimConfig(SGD(), Constant(), learning_rate=0.1),
        )

    train(config("one", "", "fused"))
    train(config("two", "expert=2", "split"), stop_at=2)
    train(config("two", "fsdp=2,tensor=2", "fused"))
    expected, found = (read(tmp_path / name) for name in ("one", "two"))
    names = ("loss", "grad_norm", "balance_loss", "z_loss", "expert_load", "expert_dropped")
    steps = [[[row[name] for name in names] for row in rows if "loss" in row] for rows in (expected, found)]
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-4)
    assert len(steps[0]) == 4 and all(row[4] > 1 for row in steps[0])
    whole, resumed = (open_checkpoint(tmp_path / name / "checkpoints" / "step-00000004") for name in ("one", "two"))
    assert whole.manifest.arrays["layers.0.experts.gate.kernel"].shape == (4, 12, 16)
    kernels = [name for name in whole.manifest.arrays if name.endswith("kernel") and not name.startswith("optimizer")]
    assert_near({n: resumed.read(n) for n in kernels}, {n: whole.read(n) for n in kernels}, 1e-4)
    reshard(str(tmp_path / "two"), tmp_path / "out", Asked("hf"), quiet())
    assert Pretrained.open(tmp_path / "out").config.inference == OLMOE.inference


def test_what_training_does_with_experts_is_set_beside_init_from_and_may_change_on_resume(tmp_path, material, capsys):
    write_model(tmp_path / "model", material, model=dataclasses.replace(OLMOE, experts=BALANCED))
    recipe = write_recipe(tmp_path / "recipe.py", material)

    def run(*settings):
        beside = ("model=none", f"init_from={tmp_path / 'model'}", "eval_batches=0", *settings)
        assert main(["train", "--config", recipe, *(word for each in beside for word in ("--set", each))]) == 0
        return capsys.readouterr()

    run("steps=1")
    run("steps=2", "experts.capacity_factor=0.5", "experts.z_loss=0.1")
    said = run("steps=3", "experts.balance_loss=0.25")
    reader = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003")
    trained = reader.manifest.meta["model"]["experts"]
    assert (trained["capacity_factor"], trained["balance_loss"], trained["z_loss"]) == (None, 0.25, 0.0)
    lines = "".join(said)
    assert "model.experts.balance_loss: 0.02 before, 0.25 from here on" in lines
    assert "model.experts.capacity_factor: 0.5 before, None from here on" in lines
    dropped = [row["expert_dropped"] for row in read(tmp_path / "run") if "loss" in row]
    assert dropped[0] == dropped[2] == 0 < dropped[1]


@pytest.mark.parametrize(
    ("settings", "model", "words"),
    [
        ({"balance_loss": 0.1}, MODEL, r"experts\.balance_loss=0\.1: the model \(llama\) has no experts"),
        ({"z_loss": -1.0}, OLMOE, r"experts\.z_loss: found -1\.0, expected at least 0"),
        ({"capacity_factor": 0}, OLMOE, r"experts\.capacity_factor: found 0.*, expected a number above 0"),
    ],
)
def test_settings_of_experts_that_do_not_fit_are_refused(tmp_path, material, settings, model, words):
    values = configuration.to_dict(make_config(tmp_path, material, model=model))
    with pytest.raises(UserError, match=words):
        starting_model(configuration.from_dict(TrainConfig, {**values, "experts": settings}))
