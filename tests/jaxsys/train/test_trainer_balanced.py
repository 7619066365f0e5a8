"""Runs whose documents are arranged over ``context``: resumed bit for bit, measured, and refused where they cannot be."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_runs import make_config, quiet, state_bytes

from jaxsys import configuration
from jaxsys.train import DataConfig
from jaxsys.train.metrics import read
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError

MESH = "data=2,context=2"


def config(run, material, shares=(0.0, 0.5), **changes):
    whole = make_config(run, material, **{"mesh": MESH, "steps": 4, **changes})
    return dataclasses.replace(
        whole, data=dataclasses.replace(whole.data, batch_size=8, seq_len=64, split_shares=shares)
    )


def train(config, stop_at=None):
    with Trainer(config, quiet()) as trainer:
        return trainer.run(stop_at)


@pytest.mark.parametrize("options", [{}, {"step_form": "split", "update_groups": 2, "accumulate": 2}])
def test_a_run_resumes_bit_for_bit_and_says_how_even_its_batches_are(tmp_path, material, options):
    straight = train(config(tmp_path / "straight", material, **options))
    first = train(config(tmp_path / "resumed", material, **options), stop_at=2)
    second = train(config(tmp_path / "resumed", material, **options))
    assert [*first.losses, *second.losses] == straight.losses
    assert state_bytes(tmp_path / "resumed", 4) == state_bytes(tmp_path / "straight", 4)
    rows = [row for row in read(tmp_path / "straight") if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["tokens"] == 504 and row["padding"] == pytest.approx(1 - 504 / 512)
        assert 1 <= row["imbalance"] < 1.5 and 0 <= row["split_share"] <= 1 and row["cut"] >= 0
    graphs = {graph["name"] for graph in json.loads((tmp_path / "straight" / "graphs.json").read_text())}
    step = {"grads", "accumulate"} if options else {"train_step"}
    room = 512 // 4 // options.get("accumulate", 1)
    assert {name for name in graphs if "[split" in name} == {
        f"{name}[split={size}]" for name in step for size in (0, room // 2)
    }


def test_the_loss_is_that_of_the_same_documents_on_another_grid(tmp_path, material):
    one = train(config(tmp_path / "one", material, shares=(0.5,)))
    other = train(config(tmp_path / "other", material, shares=(1.0,), mesh="context=4", accumulate=2))
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)


def test_held_out_text_is_measured_as_without(tmp_path, material):
    balanced = train(config(tmp_path / "balanced", material, steps=1))
    rows = train(config(tmp_path / "rows", material, shares=(), steps=1))
    assert balanced.heldout_before == rows.heldout_before


def test_another_choice_of_shares_is_another_run(tmp_path, material):
    train(config(tmp_path / "run", material, steps=2))
    with pytest.raises(UserError, match=r"another data: split_shares=\[0\.0, 0\.5\] there, \[1\.0\] now"):
        Trainer(config(tmp_path / "run", material, shares=(1.0,)), quiet())


def test_a_mesh_without_context_is_refused(tmp_path, material):
    with pytest.raises(UserError, match=r"data\.split_shares \(0\.0, 0\.5\) on mesh 'data=2': context=1 splits no doc"):
        Trainer(config(tmp_path / "run", material, mesh="data=2"), quiet())


def test_a_share_that_leaves_odd_pieces_is_refused(tmp_path, material):
    with pytest.raises(UserError, match=r"split share of 0\.3 of the 128 tokens of a device is 38\.4 tokens"):
        Trainer(config(tmp_path / "run", material, shares=(0.3,)), quiet())


def test_shares_are_from_0_to_1():
    with pytest.raises(UserError, match=r"split_shares: found \(0\.5, 1\.5\), expected shares from 0 to 1"):
        DataConfig(split_shares=(0.5, 1.5))


def test_shares_are_read_from_a_command_line():
    assert configuration.override(DataConfig(), ["split_shares=0,0.25,1"]).split_shares == (0.0, 0.25, 1.0)
