"""Runs whose documents are arranged over ``context``: resumed, measured, and refused where they cannot be."""

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


@pytest.fixture(scope="module")
def straight(tmp_path_factory, material):
    """(directory, summary) of a run of four steps."""
    run = tmp_path_factory.mktemp("balanced") / "run"
    return run, train(config(run, material))


def test_a_run_resumes_bit_for_bit(tmp_path, material, straight):
    run, summary = straight
    first = train(config(tmp_path / "run", material), stop_at=2)
    second = train(config(tmp_path / "run", material))
    assert [*first.losses, *second.losses] == summary.losses
    assert state_bytes(tmp_path / "run", 4) == state_bytes(run, 4)


def test_metrics_say_how_even_batches_are_and_each_size_of_the_split_region_has_a_graph(straight):
    run, _ = straight
    rows = [row for row in read(run) if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["tokens"] == 504 and row["padding"] == pytest.approx(1 - 504 / 512)
        assert 1 <= row["imbalance"] < 1.5 and 0 <= row["split_share"] <= 1 and row["cut"] >= 0
    graphs = {graph["name"] for graph in json.loads((run / "graphs.json").read_text())}
    assert {name for name in graphs if "train_step" in name} == {"train_step[split=0]", "train_step[split=64]"}


def test_another_grid_of_two_microbatches_gives_the_same_losses(tmp_path, material, straight):
    other = train(config(tmp_path / "run", material, shares=(1.0,), mesh="context=4", accumulate=2))
    np.testing.assert_allclose(other.losses, straight[1].losses, rtol=1e-4)


def test_held_out_text_is_measured_as_without(tmp_path, material, straight):
    rows = train(config(tmp_path / "run", material, shares=(), steps=1))
    assert rows.heldout_before == straight[1].heldout_before


def test_another_choice_of_shares_is_another_run(material, straight):
    with pytest.raises(UserError, match=r"another data: split_shares=\[0\.0, 0\.5\] there, \[1\.0\] now"):
        Trainer(config(straight[0], material, shares=(1.0,)), quiet())


def test_a_mesh_without_context_is_refused(tmp_path, material):
    with pytest.raises(UserError, match=r"data\.split_shares \(0\.0, 0\.5\) on mesh 'data=2': context=1 splits no doc"):
        Trainer(config(tmp_path / "run", material, mesh="data=2"), quiet())


def test_a_share_that_leaves_odd_pieces_is_refused(tmp_path, material):
    with pytest.raises(UserError, match=r"split share of 0\.3 of the 128 tokens of a device is 38\.4 tokens"):
        Trainer(config(tmp_path / "run", material, shares=(0.3,)), quiet())


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("data=2,context=2", {"batch_size": 3}, r"a microbatch of 3 rows .* does not divide over the 2 shards"),
        ("context=2", {"seq_len": 30}, r"rows of 30 tokens on context=2: the length must be a multiple of 8"),
        ("context=2", {"split_shares": (0.3,)}, r"a split share of 0\.3 of the .* is 19\.2 tokens"),
    ],
)
def test_a_batch_that_cannot_be_arranged_is_refused_before_text_is_read(tmp_path, material, mesh, changes, message):
    run = make_config(tmp_path / "run", material, mesh=mesh)
    data = dataclasses.replace(run.data, **{"source": "nowhere", "split_shares": (0, 0.5), **changes})
    with pytest.raises(UserError, match=message):
        Trainer(dataclasses.replace(run, data=data), quiet())


def test_shares_are_from_0_to_1():
    with pytest.raises(UserError, match=r"split_shares: found \(0\.5, 1\.5\), expected shares from 0 to 1"):
        DataConfig(split_shares=(0.5, 1.5))


def test_shares_are_read_from_a_command_line():
    assert configuration.override(DataConfig(), ["split_shares=0,0.25,1"]).split_shares == (0.0, 0.25, 1.0)
