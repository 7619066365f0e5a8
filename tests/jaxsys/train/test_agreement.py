"""What is compared between processes says where they differ; a stand-in says what the others have."""

import dataclasses
import os

import pytest
from tiny_runs import make_config, write_model

from jaxsys.surroundings import PACKAGES, versions
from jaxsys.train import agreement
from jaxsys.train.agreement import agree, facts, model_files
from jaxsys.train.config import PipelineConfig
from parallelism.coordinator import SingleProcess
from parallelism.errors import UserError


class Others:
    """The first of three processes, of which the last has changed something."""

    index, count = 0, 3

    def __init__(self, change):
        self.change = change

    def gather(self, channel, value):
        return [value, value, self.change[channel]]


def refusal(mine, theirs):
    with pytest.raises(UserError) as error:
        agree(Others({"agree": "another digest", "differ": theirs}), mine)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_processes_that_have_the_same_agree(tmp_path, material):
    config = make_config(tmp_path, material)
    agree(SingleProcess(), facts(config))
    assert facts(config) == facts(dataclasses.replace(config))


def test_a_key_of_the_configuration_is_named_with_both_values(tmp_path, material):
    config = make_config(tmp_path, material)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.5))
    assert refusal(facts(config), facts(other)).startswith(
        "configuration key optim.learning_rate: process 2 has 0.5, process 0 has 0.003: expected the same in all"
    )


def test_versions_settings_and_variables_are_compared(tmp_path, material, monkeypatch):
    mine = facts(make_config(tmp_path, material))
    assert "jax: process 2 has 0.1, process 0 has " in refusal(mine, {**mine, "jax": "0.1"})
    other = versions() | dict.fromkeys(PACKAGES, "0.1")
    monkeypatch.setattr(agreement, "versions", lambda: other)
    monkeypatch.setitem(os.environ, "XLA_FLAGS", "--xla_x=1")
    theirs = facts(make_config(tmp_path, material))
    changed = {name for name in mine if mine[name] != theirs[name]}
    assert changed == {*PACKAGES, "the environment's XLA_FLAGS"}


def test_the_code_is_compared(tmp_path, material, monkeypatch):
    mine = facts(make_config(tmp_path, material))
    monkeypatch.setattr(agreement, "code", lambda: "other")
    assert "the code of jaxsys (digest): process 2 has" in refusal(mine, facts(make_config(tmp_path, material)))


def test_the_files_of_a_model_are_compared_by_what_they_hold(tmp_path, material):
    config = make_config(tmp_path, material, model=None, init_from=str(tmp_path / "model"))
    write_model(tmp_path / "model", material, seed=0)
    mine = model_files(config)
    assert mine == model_files(config) and len(mine) > 2
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert f"{weights.name} (size and digest): process 2 has " in refusal(mine, model_files(config))
    assert model_files(make_config(tmp_path, material)) == {}


def test_the_file_of_a_pipelines_table_is_compared(tmp_path, material):
    path = tmp_path / "table.json"
    path.write_text("{}")
    config = dataclasses.replace(make_config(tmp_path, material), pipeline=PipelineConfig(str(path)))
    (before,) = model_files(config).values()
    path.write_text("[]")
    ((name, after),) = model_files(config).items()
    assert str(path) in name and after != before
