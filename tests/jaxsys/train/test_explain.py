"""What a step will do, told before it does it; and what is said when it does not fit."""

import dataclasses
import math
import re

import jax
import pytest
from tiny_runs import MODEL, make_config, quiet, write_recipe

from jaxsys.cli.main import main
from jaxsys.models.config import Experts
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.explain import OutOfMemory, advice, explain, explained, memory, state_report
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError

MIXTRAL = dataclasses.replace(
    MODEL, family="mixtral", n_heads=4, n_kv_heads=2, tie_embeddings=False, experts=Experts(8, 2, 12)
)
FULL = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.13G of 15.75G hbm. Exceeded hbm capacity by 4.38G."
)

FULL_OF_TEMPORARIES = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds "
    "available HBM (15.75G)."
)


@pytest.fixture(scope="module")
def config(material, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("explain") / "run", material, mesh="fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def explanation(config):
    return explain(AbstractRun(config, MODEL))


def test_every_array_of_the_state_is_reported(config, explanation):
    run = AbstractRun(config, MODEL)
    assert {row.array for row in explanation.arrays.rows} == {*run.params, *run.opt_state}
    row = next(row for row in explanation.arrays.rows if row.array == "optimizer.mu.layers.0.mlp.up.kernel")
    assert row.spec == "tensor,fsdp" and row.nbytes_per_device == 24 * 16 * 4 // 4


def test_optimizer_state_is_reported_by_its_own_rules(config):
    data = dataclasses.replace(config.data, batch_size=3)
    rules = {"parameter_rules": "embed=none", "optimizer_rules": "embed=fsdp:replicate"}
    run = AbstractRun(dataclasses.replace(config, data=data, mesh="fsdp=3", **rules), MODEL)
    rows = {row.array: row for row in state_report(run).rows}
    uneven = "embed=16 does not divide over fsdp=3: kept whole"
    assert rows["layers.0.mlp.up.kernel"].why == "mlp goes over tensor, of size 1"
    assert rows["optimizer.mu.layers.0.mlp.up.kernel"].why == uneven
    assert run.indivisible() == {"optimizer state": [f"{uneven} (in 8 arrays)"]}


def test_classes_of_memory_are_the_shards_and_what_the_compiler_says(config, explanation):
    run = AbstractRun(config, MODEL)

    def shards(arrays):
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays.values())

    classes = explanation.memory.classes
    assert classes["parameters"] == classes["gradients"] == shards(run.params)
    assert classes["optimizer state"] == shards(run.opt_state)
    assert classes["batch"] == 4 * 4 * 32 * 4 // 2  # four arrays of [1, 4, 32] int32, the rows over fsdp
    run.prepare()
    stats = run.launcher.programs[0][0].stats
    state = classes["parameters"] + classes["optimizer state"] + classes["batch"]
    assert explanation.memory.total - state == max(stats.temporary_bytes, classes["gradients"])
    assert 0 < classes["activations"] <= sum(r.nbytes for r in explanation.memory.residuals)


def test_collectives_count_every_microbatch_of_the_split_step(config):
    def sent(accumulate):
        data = dataclasses.replace(config.data, batch_size=4 * accumulate)
        changed = dataclasses.replace(config, data=data, accumulate=accumulate, step_form="split")
        found = explain(AbstractRun(changed, MODEL)).collectives
        return sum(c.sent for c in found if c.kind == "all-gather")

    first, second, third = (sent(n) for n in (1, 2, 3))
    assert third - second == second - first > 0


def test_the_command_prints_the_page_and_neither_reads_data_nor_makes_a_run(config, material, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.py", material)
    changes = ["--set", "data.source=nowhere", "--set", "mesh=fsdp=2,tensor=2"]
    assert main(["train", "--config", recipe, *changes, "--explain"]) == 0
    out = capsys.readouterr().out
    for said in ("mesh fsdp=2,tensor=2 (4 devices)", "optimizer.mu.embed.kernel", "replicated on every device",
                 "collectives of a step", "all-gather", "jaxsys/", "memory of one device", "activations"):  # fmt: skip
        assert said in out, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("failure", "needs"), [(FULL, "20.1 GiB"), (FULL_OF_TEMPORARIES, "20.0 GiB")])
def test_a_step_that_does_not_compile_for_lack_of_memory_ends_in_the_table(config, monkeypatch, failure, needs):
    run, said = AbstractRun(config, MODEL), []
    monkeypatch.setattr(run.launcher, "prepare", lambda *_: (_ for _ in ()).throw(failure))
    match = rf"needs {re.escape(needs)} a device.*remat=full \(now none\); accumulate=2"
    with pytest.raises(OutOfMemory, match=match) as error, explained(run, said.append):
        run.prepare()
    assert "\n" not in str(error.value)
    assert said[0].splitlines()[1].startswith("activations and temporaries")


def test_a_step_that_runs_out_of_memory_ends_in_the_table_and_other_errors_pass(config, tmp_path, monkeypatch):
    console = quiet()
    with Trainer(dataclasses.replace(config, run=str(tmp_path), eval_batches=0), console) as trainer:
        for error, expected in ((FULL, OutOfMemory), (jax.errors.JaxRuntimeError("INTERNAL: x"), type(FULL))):
            monkeypatch.setattr(trainer, "_launch", lambda *_, e=error: (_ for _ in ()).throw(e))
            with pytest.raises(expected):
                trainer.run()
    tables = [line for line in console.lines if line.startswith("memory of one device")]
    assert len(tables) == 1 and "temporaries" in tables[0]


def test_what_is_in_host_memory_is_shown_and_not_counted_on_the_device(config):
    offload = "parameters,optimizer=0.5,activations=residual"
    run = AbstractRun(dataclasses.replace(config, offload=offload, remat="full"), MODEL)
    found = explain(run)
    away = {row.array for row in found.arrays.rows if row.memory == "host"}
    assert {"layers.0.mlp.up.kernel"} < away and "embed.kernel" not in away
    shards = sum(row.nbytes_per_device for row in found.arrays.rows)
    assert found.arrays.nbytes_per_device == shards - found.memory.host
    classes = found.memory.classes
    assert found.arrays.nbytes_per_device == classes["parameters"] + classes["optimizer state"]
    page = str(found)
    assert re.search(r"^layers.0.mlp.up.kernel .* host ", page, re.M) and re.search(
        r"^embed.kernel .* device ", page, re.M
    )
    assert f"total of {len(away)} arrays" in page
    assert "offloaded activations (residual) are counted on the device: CPU has one memory" in page


def test_the_page_says_which_of_several_programs_it_shows(config):
    def run(*shares):
        data = dataclasses.replace(config.data, split_shares=shares)
        return AbstractRun(dataclasses.replace(config, data=data, mesh="context=2"), MODEL)

    assert run(0, 0.5, 0.25).launcher.split == (32, 64)
    page = str(explain(run(0.5)))
    assert "the step of the largest of data.split_shares: 0.5 (32 of 64 tokens)" in page


def test_a_step_through_stages_says_what_is_not_counted_and_gives_advice_that_stages_take(config):
    model = dataclasses.replace(MODEL, n_layers=2)
    run = AbstractRun(dataclasses.replace(config, model=model, mesh="stage=2", accumulate=2), model)
    page = explain(run)
    assert "through 2 stages: what the layers of a chunk send is counted once" in str(page)
    ways = advice(run, page.memory)
    assert ways[:2] == ["pipeline.device_slots=1 (the others wait on the host)", "pipeline.recompute=true"]
    assert not any("context" in way or "offload" in way for way in ways)


def test_rows_of_the_table_are_sorted_by_bytes(explanation):
    classes = sorted(explanation.memory.classes, key=lambda name: -explanation.memory.classes[name])
    lines = str(explanation.memory).splitlines()[1 : 1 + len(classes)]
    assert [line[: len(name)] for line, name in zip(lines, classes, strict=True)] == classes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": "expert=2", "parameter_rules": "embed=fsdp", "activation_rules": "batch=fsdp,replica=fsdp"},
            "mesh expert=2: no parameter and no activation is split over 'expert'",
        ),
        (
            {"mesh": "expert=2", "parameter_rules": "embed=fsdp", "activation_rules": "batch=fsdp,replica=expert"},
            "mesh expert=2: no parameter",
        ),
        (
            {
                "mesh": "expert=2,fsdp=2",
                "parameter_rules": "embed=fsdp,layers=expert",
                "storage": "listed",
                "activation_rules": "batch=fsdp",
            },
            "mesh expert=2: no parameter",
        ),
        (
            {"mesh": "context=2", "activation_rules": "seq=none"},
            "rule seq=none:replicate on a mesh with context=2.*expected",
        ),
        (
            {"mesh": "context=2,tensor=2", "activation_rules": "seq=context+tensor"},
            "rule seq=context.tensor:replicate on",
        ),
        (
            {"mesh": "context=2", "offload": "activations=attention", "remat": "full"},
            "attention on a mesh with context=2:",
        ),
        ({"mesh": "fsdp=3"}, "a microbatch of 4 rows .* does not divide over the 3 shards"),
        (
            {"mesh": "expert=3", "model": MIXTRAL},
            "mesh expert=3: the model's 8 experts do not divide over it: .*experts=:rep",
        ),
        ({"accumulate": 3}, "does not divide by accumulate=3"),
        ({"model": None}, "give either init_from"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_compiled(config, changes, message, tmp_path, material):
    from jaxsys.train.abstract import starting_model

    changed = dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match=message):
        AbstractRun(changed, starting_model(changed)[0])


def test_experts_that_do_not_divide_go_together_with_a_mesh_where_every_device_keeps_them_all(config):
    data, model = dataclasses.replace(config.data, batch_size=3), dataclasses.replace(MIXTRAL, d_model=12)
    rules = "experts=:replicate"
    run = AbstractRun(dataclasses.replace(config, data=data, mesh="expert=3", parameter_rules=rules), model)
    assert "experts=8 does not divide over expert=3: kept whole" in run.indivisible()["parameters"][0]


def test_memory_of_a_failed_compile_of_which_nothing_is_known_has_no_such_class(config):
    assert set(memory(AbstractRun(config, MODEL), "RESOURCE_EXHAUSTED: no").classes) == {
        "parameters", "optimizer state", "batch", "gradients"
    }  # fmt: skip
