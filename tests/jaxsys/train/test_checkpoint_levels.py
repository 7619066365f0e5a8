"""Levels of a run by its configuration: what stays on disk, and what goes further."""

import pytest
from tiny_runs import make_config, quiet

from checkpoint import Manager, open_checkpoint
from checkpoint.storage import steps_in, store_of
from jaxsys.train.config import CheckpointConfig
from jaxsys.train.metrics import read
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError


def train(config):
    with Trainer(config, quiet()) as trainer:
        return trainer.run()


def steps(place):
    return steps_in(store_of(place).names())


def test_what_the_configuration_keeps_stays_and_what_is_remote_goes_there(tmp_path, material):
    levels = CheckpointConfig(
        every=1, keep=1, keep_every=4, keep_best=1, remote=str(tmp_path / "far"), remote_every=3, verify=True
    )
    train(make_config(tmp_path / "run", material, checkpoint=levels, steps=7, eval_every=2))
    disk = tmp_path / "run" / "checkpoints"
    losses = {row["step"]: row["heldout_loss"] for row in read(tmp_path / "run") if "heldout_loss" in row}
    best = min((step for step in losses if step > 0), key=losses.__getitem__)
    assert steps(disk) == sorted({4, 7, best})
    assert steps(tmp_path / "far") == [3, 6, 7]
    metrics = open_checkpoint(disk / "step-00000007").manifest.meta["metrics"]
    assert metrics["heldout_loss"] == losses[7] and metrics["heldout_step"] == 7


def test_a_checkpoint_says_no_loss_of_other_weights(tmp_path, material):
    train(make_config(tmp_path / "run", material, checkpoint=CheckpointConfig(every=3), steps=4, eval_every=2))
    metrics = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003").manifest.meta["metrics"]
    assert (metrics["heldout_loss"], metrics["heldout_step"]) == (None, 2)


def test_an_interval_that_is_chosen_saves_now_and_then(tmp_path, material):
    levels = CheckpointConfig(every="auto", keep=100)
    train(make_config(tmp_path / "run", material, checkpoint=levels, steps=30, eval_batches=0))
    found = steps(tmp_path / "run" / "checkpoints")
    assert found[-1] == 30 and 2 <= len(found) <= 8


def test_the_best_of_what_is_not_evaluated_is_refused(tmp_path, material):
    with pytest.raises(UserError, match=r"checkpoint.keep_best: found 1, expected 0 where nothing is evaluated"):
        make_config(tmp_path, material, checkpoint=CheckpointConfig(keep_best=1), eval_batches=0)


def test_a_snapshot_takes_first_what_the_first_update_overwrites(tmp_path, material, monkeypatch):
    orders = []
    save = Manager.save

    def seen(self, step, arrays, *rest, **how):
        orders.append(list(arrays))
        return save(self, step, arrays, *rest, **how)

    monkeypatch.setattr(Manager, "save", seen)
    config = make_config(tmp_path / "run", material, step_form="split", update_groups=2, steps=2, eval_batches=0)
    with Trainer(config, quiet()) as trainer:
        trainer.run()
        first, second = trainer.launcher._groups
        owned = trainer.launcher._functions.optimizer.owned
    for order in orders:
        place = {key: at for at, key in enumerate(order)}
        assert max(place[k] for k in (*first, *owned(first))) < min(place[k] for k in (*second, *owned(second)))
