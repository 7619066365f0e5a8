"""A run of a model with experts: split and fused, resumed on another mesh, exported."""

import dataclasses

import numpy as np
from tiny_models import assert_near
from tiny_runs import MODEL, make_config, quiet

from checkpoint import open_checkpoint
from jaxsys.export import to_hugging_face
from jaxsys.models.config import Experts
from jaxsys.models.pretrained import Pretrained
from jaxsys.optim import SGD, Constant, OptimConfig
from jaxsys.train.metrics import read
from jaxsys.train.trainer import Trainer

OLMOE = dataclasses.replace(
    MODEL, family="olmoe", n_layers=1, head_dim=4, n_heads=4, n_kv_heads=2, d_ff=12, qk_norm="width",
    experts=Experts(4, 2, 12, normalise=False, balance_loss=0.1, z_loss=0.01),
)  # fmt: skip


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
    to_hugging_face(str(tmp_path / "two"), tmp_path / "out", None, quiet())
    assert Pretrained.open(tmp_path / "out").config.inference == OLMOE.inference
