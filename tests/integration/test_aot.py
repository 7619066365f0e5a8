"""The real TPU compiler, without a TPU: small steps compiled ahead of time. Needs libtpu (extra ``tpu``)."""

import dataclasses
import functools
import math
import os

import pytest

pytest.importorskip("libtpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from aot_serving import serve

from jaxsys.models.config import Experts, ModelConfig
from jaxsys.serve.scheduler import Size
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import DataConfig, PipelineConfig, TrainConfig
from jaxsys.train.explain import OutOfMemory
from parallelism.hlo import Program
from pipelines.buffers import allocate
from scripts.aot_report import HEAD, RECIPES, Recipe, compile_recipe, devices

MODEL = ModelConfig(
    "llama", vocab_size=4096, d_model=512, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1024, max_seq_len=8192
)  # fmt: skip
MIXTURE = ModelConfig(
    "mixtral", vocab_size=1024, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=512,
    max_seq_len=1024, experts=Experts(2, 2, 512, balance_loss=0.02),
)  # fmt: skip
SMALL = {
    "fsdp": Recipe(MODEL, "v5e:2x2", "fsdp=4", (8, 1024)),
    "fsdp and tensor": Recipe(MODEL, "v5e:2x2", "fsdp=2,tensor=2", (8, 1024)),
    "context": Recipe(MODEL, "v5e:2x2", "fsdp=2,context=2", (2, 2048)),
    "a part of 64 of the embedding's width": Recipe(
        dataclasses.replace(MODEL, vocab_size=32_064, n_layers=1), "v5e:4x4", "data=2,fsdp=8", (16, 256)
    ),
    "one expert a device": Recipe(MIXTURE, "v5e:4x4", "data=2,fsdp=4,expert=2", (16, 256)),
}


@pytest.fixture(autouse=True)
def low_effort():
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


@functools.cache
def compiled(name):
    return compile_recipe(SMALL[name], print)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_fits_replicates_nothing_by_accident_and_reduce_scatters_its_gradients(name):
    result = compiled(name)
    assert result.faults() == []
    assert result.run.model.storage == "stacked"  # the TPU's form, on whatever machine this is
    kinds = {c.kind for c in result.explanation.collectives if "fsdp" in c.axes}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert len(result.row(name, SMALL[name])) == len(HEAD)


def test_fsdp_sends_what_its_formula_says():
    """docs/parallelism.md, "Bytes a step sends": gradients to the byte, kernels but for those it gathers again."""
    found = compiled("fsdp")
    split = sum(s.nbytes for s in found.run.plan.layout.values() if "norm" not in s.axes)
    tables = 2 * MODEL.vocab_size * MODEL.d_model * 4
    sent = {}
    for each in found.explanation.collectives:
        sent[each.kind] = sent.get(each.kind, 0) + each.sent
    assert sent["reduce-scatter"] == pytest.approx(3 / 4 * split, rel=1e-6)
    gathered = sent["all-gather"] + sent.get("collective-permute", 0)  # some in pieces, as they are used
    assert 1 <= gathered / (3 / 4 * (2 * (split - tables) / 2 + tables)) < 1.15


def test_tensor_parallelism_sends_what_its_formula_says():
    """docs/parallelism.md, "Bytes a step sends", to the byte; with ``remat=full``."""
    n, L, D = 2, MODEL.n_layers, MODEL.d_model
    rows, length = SMALL["fsdp and tensor"].batch
    elements = rows // 2 * length * D  # of the hidden states of a device's tokens
    sent = {}
    for each in compiled("fsdp and tensor").explanation.collectives:
        if each.axes == ("tensor",):
            sent[each.kind] = sent.get(each.kind, 0) + each.sent
    part = (n - 1) / n
    assert sent["all-gather"] == part * elements * (2 * 6 * L + 4 + 2)
    assert sent["reduce-scatter"] == part * elements * (4 * 8 * L + 2)
    few = 2 * part * 4 * (2 * elements // D + L * 3 * D)  # sums of a token's logits; gradients of norms
    assert 0 <= sent["all-reduce"] - 2 * part * 4 * elements <= 1.1 * few


def test_an_update_moves_one_layers_state_while_it_computes_on_another():
    """At the compiler's default effort: the lowest does not order a program for this."""
    jax.config.update("jax_exec_time_optimization_effort", 0.0)
    recipe = dataclasses.replace(SMALL["fsdp"], changes={"offload": "optimizer,parameters"})
    run = AbstractRun(recipe.config(), MODEL, devices(recipe.hardware))
    shardings = run.step.shardings.gradients
    grads = {k: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=shardings[k]) for k, p in run.params.items()}
    out = jax.tree.map(lambda array: array.sharding, (run.params, run.opt_state))
    graph = run.graphs.compile(
        "update", run.step.update, run.params, run.opt_state, grads, np.float32(1), np.int32(0),
        donate=(0, 1), out_shardings=out,
    )  # fmt: skip
    program = Program(graph.text)
    (loop,) = {loop.called("body")[0] for _, loop, _ in program.walk() if loop.opcode == "while"}
    layer = 3 * len(run.model.layer_kernels)  # each kernel with its two moments
    for opcode in ("dynamic-slice-start", "dynamic-update-slice-start"):
        moves = [i for i in program.computations[loop].values() if i.opcode == opcode and "S(5)" in i.shape]
        sizes = {i.name: min(math.prod(dims) for _, dims in i.arrays if math.prod(dims) > 1) for i in moves}
        assert len(moves) == layer
        assert sum(sizes.values()) == 3 * sum(
            math.prod(run.plan.layout[key].shape) // MODEL.n_layers // 4 for key in run.model.layer_kernels
        )
        hidden = sum(sizes[i.name] for i in moves if program.hidden(loop, i))
        assert hidden >= 0.9 * sum(sizes.values())  # nothing of the layer is left to compute when the last ones start
    # Nothing waits for a whole stack, or for a move of its own.
    assert not [
        i
        for i in program.computations[loop].values()
        if i.opcode in ("copy", "fusion", "dynamic-slice") and "S(5)" in i.shape
    ]


def test_a_step_that_does_not_fit_says_where_memory_goes_and_what_to_change():
    said = []
    wide = dataclasses.replace(SMALL["fsdp"], batch=(4096, 4096), changes={"remat": "none"})
    with pytest.raises(OutOfMemory, match=r"a device has 16\.0 GiB: remat=full \(now none\); accumulate=1024"):
        compile_recipe(wide, said.append)
    assert said[0].splitlines()[1].startswith("activations and temporaries")


def test_every_recipe_of_the_report_is_a_configuration():
    for recipe in RECIPES.values():
        assert recipe.config().model == recipe.model


@pytest.mark.parametrize(
    ("mesh", "size", "stored"),
    [
        ("", Size(128, 16, queries=16), (2, 128)),  # heads of 64 two in a row
        ("tensor=4", Size(16, 16), (4, 128)),
    ],
)
def test_a_served_step_leaves_the_pool_where_it_is_and_attends_by_the_kernel(mesh, size, stored):
    served = serve("v5e:2x2", mesh, size)
    assert served.storage == "stacked"
    assert (served.pool.k.shape[3], served.pool.k.shape[5]) == stored
    assert served.faults("tpu_custom_call") == []


DEEP = dataclasses.replace(MODEL, n_layers=8, tie_embeddings=False)


@functools.cache
def staged(schedule, microbatches, slots=None):
    """(bytes of temporaries on a device, on its host, slots of residuals on a device, on its host)."""
    config = TrainConfig(
        run="none", model=DEEP, mesh="stage=4", accumulate=microbatches,
        data=DataConfig(batch_size=2 * microbatches, seq_len=2048),
        pipeline=PipelineConfig(schedule, device_slots=slots),
    )  # fmt: skip
    run = AbstractRun(config, DEEP, devices("v5e:2x2"))
    run.prepare()
    ((graph, _),) = run.launcher.programs
    buffers = allocate(run.step.table)
    stats = graph.stats
    return stats.temporary_bytes, stats.host_temporary_bytes, buffers.made.depth, buffers.host_away.depth


def test_what_1f1b_holds_does_not_grow_with_microbatches_and_what_gpipe_holds_does_by_a_residual_each():
    (few, *_), (many, *_) = (staged("1f1b", m) for m in (8, 16))
    assert many == pytest.approx(few, rel=0.01)
    (few, *_), (many, *_) = (staged("gpipe", m) for m in (8, 16))
    assert (many - few) / 8 == pytest.approx(residual(), rel=0.1)


def residual():
    """Bytes, as what lies in host memory comes to: one slot more than are used."""
    _, host, _, slots = staged("1f1b", 8, 1)
    return host / (slots + 1)


def test_residuals_that_are_offloaded_are_on_the_host_and_not_on_the_device():
    plain, one, two = staged("1f1b", 8), staged("1f1b", 8, 1), staged("1f1b", 8, 2)
    assert [each[2] for each in (plain, one, two)] == [4, 1, 2]
    assert (plain[1], one[1] / (one[3] + 1)) == (0, two[1] / (two[3] + 1))
    assert two[0] - one[0] == pytest.approx(residual(), rel=0.1)
    assert plain[0] - one[0] > 2.5 * residual()


@pytest.mark.parametrize("schedule", ["eager", "interleaved"])
def test_no_host_buffer_is_copied(schedule):
    _, host, _, slots = staged(schedule, 8, 2)
    chunks = 2 if schedule == "interleaved" else 1
    assert host == pytest.approx((slots + 1) * residual() / chunks, rel=0.02)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("stage=2,fsdp=2,context=2", {"context_method": "all_to_all"}),
        (
            "stage=2,expert=2,tensor=2",
            {"model": dataclasses.replace(DEEP, experts=Experts(8, 2, 256, balance_loss=0.1))},
        ),
        ("stage=4,fsdp=2", {"offload": "optimizer"}),
    ],
)
def test_no_branch_of_a_stage_holds_a_permutation_and_its_state_may_be_on_the_host(mesh, options):
    """``prepare`` refuses both a program that would hang and one that does not offload what it should."""
    model = options.get("model", DEEP)
    config = TrainConfig(
        run="none", mesh=mesh, accumulate=4, data=DataConfig(batch_size=16, seq_len=2048),
        **{"model": DEEP, **options},
    )  # fmt: skip
    run = AbstractRun(config, model, devices("v5e:2x4"))
    run.prepare()
    ((graph, _),) = run.launcher.programs
    state = sum(stored.nbytes for stored in run.optimizer_plan.layout.values() if stored.stacked)
    assert (graph.stats.host_argument_bytes > 0.9 * state / 8) == ("offload" in options)
