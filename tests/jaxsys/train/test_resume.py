"""What a run may change when it resumes, what it may not, and whose checkpoints it takes."""

import dataclasses
import shutil

import numpy as np
import pytest
from tiny_runs import make_config, quiet

from checkpoint import Manager, copy_steps, find_place, root_of, write
from checkpoint.writer import Piece
from jaxsys.optim import SGD, Constant, OptimConfig
from jaxsys.train import resume
from jaxsys.train.config import CheckpointConfig
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError
from parallelism.layout import Logical


def train(config, stop_at=None):
    with Trainer(config, quiet()) as trainer:
        return trainer.run(stop_at)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, material):
    """The configuration of a run that is done."""
    config = make_config(tmp_path_factory.mktemp("trained") / "run", material, steps=2)
    train(config)
    return config


def refusal(config, monkeypatch=None) -> str:
    with pytest.raises(UserError) as error:
        Trainer(config, quiet())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_run_may_not_change_is_refused_before_an_array_is_read(trained, monkeypatch):
    monkeypatch.setattr(Manager, "restore", None)
    said = refusal(dataclasses.replace(trained, parameter_dtype="bfloat16"))
    assert "parameter_dtype='float32' there, 'bfloat16' now" in said and "another run directory" in said
    said = refusal(dataclasses.replace(trained, optim=dataclasses.replace(trained.optim, optimizer=SGD())))
    assert "an optimizer that keeps another state: optim.optimizer.kind='adamw' there, 'sgd' now" in said
    said = refusal(dataclasses.replace(trained, model=dataclasses.replace(trained.model, d_ff=32)))
    assert "another model: d_ff=24 there, 32 now" in said


def test_another_beginning_is_refused(tmp_path):
    meta = {"model": {}, "rng": {}, "data": {}, "config": {"init_from": "one", "parameter_dtype": "float32"}}
    resume.refuse(tmp_path, meta, meta)
    with pytest.raises(UserError, match="init_from='one' there, 'two' now"):
        resume.refuse(tmp_path, meta, {**meta, "config": {**meta["config"], "init_from": "two"}})


def test_settings_of_one_optimizer_that_change_its_state_are_refused(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=1, eval_batches=0, optim=OptimConfig(SGD(), Constant()))
    train(config)
    said = refusal(dataclasses.replace(config, optim=OptimConfig(SGD(momentum=0.0), Constant())))
    assert "optim.optimizer.momentum=0.9 there, 0.0 now" in said


def test_every_other_key_that_changed_is_a_line(trained):
    optim = dataclasses.replace(trained.optim, learning_rate=1e-4)
    console = quiet()
    with Trainer(dataclasses.replace(trained, optim=optim, steps=1), console):
        pass
    lines = [line for line in console.lines if "from here on" in line]
    assert lines == [
        "optim.learning_rate: 0.003 before, 0.0001 from here on",
        "steps: 2 before, 1 from here on",
    ]
    assert "steps=1 is below step 2, which the run has reached" in console.lines
    console = quiet()
    with Trainer(trained, console):
        assert not any("from here on" in line or "below" in line for line in console.lines)


def test_text_that_changed_is_refused(tmp_path, material):
    text = tmp_path / "text"
    shutil.copytree(material / "text", text)
    config = make_config(tmp_path / "run", material, steps=1, eval_batches=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(text)))
    train(config)
    (text / "00.txt").write_text("Something else entirely. " * 9)
    assert "another data: fingerprint=" in refusal(config)


def test_checkpoints_in_host_memory_are_of_one_run(tmp_path, material):
    levels = CheckpointConfig(every=100, ram=str(tmp_path / "memory"), ram_every=1)
    config = make_config(tmp_path / "run", material, eval_batches=0, steps=3, checkpoint=levels)
    train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    with Trainer(config, quiet()) as again:
        assert again.step == 3  # only memory has it
    with Trainer(dataclasses.replace(config, run=str(tmp_path / "other")), quiet()) as other:
        assert other.step == 0
    shutil.rmtree(tmp_path / "run")
    with Trainer(config, quiet()) as anew:
        assert anew.step == 0


def test_neither_a_new_run_nor_a_copy_has_the_directory_of_another(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"

    def own(run):
        return resume.own_directory("memory", run, resume.identity(run, None))

    first = own(run)
    assert first == own(run)
    shutil.copytree(run, copy)
    shutil.rmtree(run)
    assert len({first, own(copy), own(run)}) == 3
    for broken in (b"", b"\xff"):  # killed before it wrote
        (run / "id").write_bytes(broken)
        assert resume.identity(run, None) == resume.identity(run, None) != ""


def test_a_remote_is_of_one_run_and_goes_with_it(tmp_path, material):
    """Another run is refused there, also with a copy of what is there; one whose disk is lost goes on at its path."""
    remote = str(tmp_path / "remote")
    places = CheckpointConfig(every=1, remote=remote, remote_every=1)
    config = make_config(tmp_path / "run", material, steps=2, eval_batches=0, checkpoint=places)
    train(config)
    other = dataclasses.replace(config, run=str(tmp_path / "other"))
    refused = rf"{remote} holds the checkpoints of {tmp_path}/run: give {tmp_path}/other one of its own"
    for _ in range(2):  # the first start makes no difference to the second
        assert not (tmp_path / "other").exists()
        with pytest.raises(UserError, match=refused):
            Trainer(other, quiet())
    copy_steps(find_place(remote), root_of(tmp_path / "other" / "checkpoints"))
    with pytest.raises(UserError, match=refused):
        Trainer(other, quiet())
    own = dataclasses.replace(places, remote=f"{remote}-2")
    with Trainer(dataclasses.replace(other, checkpoint=own), quiet()) as taken:
        assert taken.step == 2
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run", moved)
    with pytest.raises(UserError, match="holds the checkpoints of"):
        Trainer(dataclasses.replace(config, run=str(moved)), quiet())
    shutil.rmtree(tmp_path / "run")
    with Trainer(dataclasses.replace(config, run=str(moved)), quiet()) as again:  # not a copy any more
        assert again.step == 2
    with Trainer(config, quiet()) as back:  # as on a new machine
        assert back.step == 2


@pytest.mark.parametrize("meta", [{}, {"run": None}, [], {"config": None}])
def test_a_remote_that_no_run_has_written_is_no_other_runs(tmp_path, meta):
    spec = Logical("w", (2,), np.dtype("f4"), (None,))
    write(tmp_path / "remote" / "step-00000003", 3, meta, [spec], [Piece(spec, (0,), np.zeros(2, np.float32))])
    assert resume.identity(tmp_path / "run", str(tmp_path / "remote"))


def test_a_newest_manifest_that_is_damaged_does_not_hide_the_run(tmp_path, material):
    config = make_config(tmp_path / "run", material, steps=4, eval_batches=0)
    train(config)
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").write_text("{")
    assert "parameter_dtype='float32' there" in refusal(dataclasses.replace(config, parameter_dtype="bfloat16"))
    with Trainer(config, quiet()) as trainer:
        assert trainer.step == 2
