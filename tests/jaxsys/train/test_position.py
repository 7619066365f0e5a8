"""A run that goes on reads on where it was, on whatever mesh, and its totals go on too."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import make_config, quiet

from checkpoint import open_checkpoint
from jaxsys.data import Loader
from jaxsys.data.balanced import BalancedLoader
from jaxsys.surroundings import versions
from jaxsys.train import resume
from jaxsys.train.config import CheckpointConfig
from jaxsys.train.metrics import read
from jaxsys.train.trainer import Trainer
from parallelism import balance
from parallelism.errors import UserError

STEPS = 5  # of which an epoch has fewer


def meta(run, step):
    return open_checkpoint(run / "checkpoints" / f"step-{step:08}").manifest.meta


@pytest.fixture
def batches(monkeypatch):
    """Every training batch that is made, by step, in the order in which they are made."""
    found = []
    for loader in (Loader, BalancedLoader):

        def spied(self, step, rows=slice(None), batch=loader.batch):
            made = batch(self, step, rows)
            if self.split == "train" and not isinstance(rows, slice):  # of the run, by its rows
                found.append((step, made))
            return made

        monkeypatch.setattr(loader, "batch", spied)
    return found


def documents(batch):
    """What a batch holds: the tokens of each document, whatever row and place it is at."""
    found = []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max(initial=0) + 1):
            at = np.flatnonzero(batch["segments"][row] == segment)
            at = at[np.argsort(batch["positions"][row, at])]
            found.append(tuple(batch["tokens"][row, at].tolist()))
    return sorted(tokens for tokens in found if tokens)


@pytest.mark.parametrize("shares", [(), (0.0, 1.0)], ids=["rows", "split shares"])
def test_a_run_that_goes_on_with_other_devices_reads_the_same_in_the_same_order(tmp_path, material, batches, shares):
    tail = ",context=2" if shares else ""
    config = make_config(tmp_path / "straight", material, eval_batches=0, steps=STEPS)
    # Of few documents, so that there are several epochs.
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, split_shares=shares, limit=4, heldout=0.0)
    )
    losses = []
    with Trainer(dataclasses.replace(config, mesh=f"data=4{tail}"), quiet()) as trainer:
        losses.append(trainer.run().losses)
    straight = batches.copy()
    assert [step for step, _ in straight] == list(range(STEPS)) and trainer.train_data.steps_per_epoch < STEPS - 1
    batches.clear()
    config = dataclasses.replace(config, run=str(tmp_path / "on"))
    with Trainer(dataclasses.replace(config, mesh=f"data=4{tail}"), quiet()) as trainer:
        first = trainer.run(stop_at=2)
    with Trainer(dataclasses.replace(config, mesh=f"data=2{tail}"), quiet()) as trainer:
        losses.append(first.losses + trainer.run().losses)
    assert [step for step, _ in batches] == list(range(STEPS))
    for (_, expected), (_, found) in zip(straight, batches, strict=True):
        assert documents(found) == documents(expected)
        if not shares:
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize("shares", [(), (0.0, 1.0)], ids=["rows", "split shares"])
def test_the_parts_of_four_processes_and_of_two_are_the_batch(tmp_path, material, shares):
    config = make_config(tmp_path / "run", material, steps=1, eval_batches=0)
    with Trainer(config, quiet()) as trainer:
        dataset = trainer.train_data.dataset
    order = dataset, 4, 32, 7
    loader = Loader(*order)
    if shares:
        grid = balance.Grid(4, 2, 16)
        loader = BalancedLoader(*order, 0.05, grid, balance.split_sizes(shares, grid))
    for step in (0, 3):
        whole = loader.batch(step)
        for count in (4, 2):
            each = 4 // count
            parts = [loader.batch(step, [slice(i * each, (i + 1) * each)]) for i in range(count)]
            for name in ("tokens", "targets", "segments", "positions"):
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    for grid in () if not shares else (balance.Grid(2, 2, 32), balance.Grid(1, 4, 32)):  # of fewer processes
        other = BalancedLoader(*order, 0.05, grid, balance.split_sizes(shares, grid))
        assert other.position(3) == loader.position(3)
        assert documents(other.batch(3)) == documents(loader.batch(3))


def test_a_checkpoint_says_where_the_next_batch_begins(tmp_path, material):
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=4)
    with Trainer(config, quiet()) as trainer:
        trainer.run()
        data = trainer.train_data
    for step in (2, 4):
        position, batch = meta(tmp_path / "run", step)["position"], data.batch(step)
        epoch, at = divmod(step, data.steps_per_epoch)
        assert (position["step"], position["epoch"], position["token"]) == (step, epoch, at * 4 * 32)
        (index,) = np.flatnonzero(data.dataset.hashes == np.uint64(int(position["document"], 16)))
        rest = data.dataset.document(int(index))[position["at"] :]
        count = min(len(rest), 32)
        np.testing.assert_array_equal(batch["tokens"][0, :count], rest[:count])


def test_another_next_batch_is_refused(tmp_path, material, monkeypatch):
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=4)
    with Trainer(config, quiet()) as trainer:
        trainer.run(stop_at=2)
        (document,) = [trainer.train_data.position(2)["document"]]
    epoch = Loader._epoch

    def reversed_order(self, number):
        order, _ = epoch(self, number)
        order = order[::-1]
        return order, np.cumsum((self._end - self._begin)[order])

    monkeypatch.setattr(Loader, "_epoch", reversed_order)
    with pytest.raises(UserError) as error:
        Trainer(config, quiet())
    said = str(error.value)
    assert f"the batch after step 2 is another than in the run so far: document='{document}' there" in said
    assert "\n" not in said


def test_metrics_so_far_go_on(tmp_path, material):
    every = CheckpointConfig(every=1, keep=10)
    config = make_config(tmp_path / "run", material, steps=4, eval_every=2, checkpoint=every)
    with Trainer(config, quiet()) as trainer:
        first = trainer.run(stop_at=3)
    with Trainer(config, quiet()) as trainer:
        second = trainer.run()
    rows = {row["step"]: row for row in read(tmp_path / "run") if "loss" in row}
    heldout = {row["step"]: row["heldout_loss"] for row in read(tmp_path / "run") if "heldout_loss" in row}
    assert list(rows) == [1, 2, 3, 4] and set(heldout) == {0, 2, 3, 4}
    for step, row in rows.items():
        so_far = [rows[s] for s in rows if s <= step]
        assert row["tokens_seen"] == sum(r["tokens"] for r in so_far)
        assert row["training_seconds"] == pytest.approx(sum(r["seconds"] for r in so_far))
        # Of the very weights that are saved, where they were evaluated.
        assert meta(tmp_path / "run", step)["metrics"] == {
            "tokens_seen": row["tokens_seen"],
            "training_seconds": row["training_seconds"],
            "loss": row["loss"],
            "heldout_loss": heldout.get(step),
            "heldout_step": max(s for s in heldout if s <= step),
        }
    assert (first.tokens_seen, second.tokens_seen) == (rows[3]["tokens_seen"], rows[4]["tokens_seen"])
    assert (first.heldout_after, second.heldout_after) == (heldout[3], heldout[4])


def test_versions_that_changed_are_told_in_a_line(tmp_path, material):
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=2, checkpoint=CheckpointConfig(every=1))
    with Trainer(config, quiet()) as trainer:
        trainer.run(stop_at=1)
        now = trainer._meta()
    assert meta(tmp_path / "run", 1)["versions"] == versions()
    assert {"Python", "jaxsys", "jax", "flax"} <= versions().keys()
    before = json.loads(json.dumps(now))
    assert resume.versions_line(before, now) == ""
    before["versions"] |= {"jax": "0.1.0", "Python": "3.7.1"}
    del before["versions"]["jaxlib"]  # which the run's did not say
    expected = f"versions: Python 3.7.1 before, {versions()['Python']}, jax 0.1.0 before, {versions()['jax']}"
    assert resume.versions_line(before, now) == f"{expected} from here on"
