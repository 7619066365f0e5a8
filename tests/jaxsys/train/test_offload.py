"""Training with state, parameters and activations in host memory: the same results, and proof that things move."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import LLAMA, Setup, assert_near, packed_batch, x64
from tiny_runs import ROOT

from jaxsys.models.config import ModelConfig
from jaxsys.optim import SGD, OptimConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import DataConfig, TrainConfig
from parallelism import placement
from parallelism.errors import UserError
from parallelism.placement import Offload
from parallelism.streaming import HOST

EVERYTHING = "optimizer,parameters,activations=residual+attention"
ONE_LAYER = dataclasses.replace(LLAMA, n_layers=1)


def run_of(tmp_path, **changes):
    model = changes.pop("model", LLAMA)
    config = TrainConfig(
        run=str(tmp_path), model=model, data=DataConfig(batch_size=8, seq_len=16), compute_dtype="float32",
        **{"remat": "full", **changes},
    )  # fmt: skip
    return AbstractRun(config, model)


def where(arrays):
    return {key: array.sharding.memory_kind == HOST for key, array in arrays.items()}


@pytest.mark.parametrize(("storage", "offload"), [("stacked", EVERYTHING), ("listed", "optimizer=0.5,parameters")])
def test_a_step_with_offload_gives_the_same_results(storage, offload):
    """In float64: without offload other operations are fused, and so other multiply-adds contracted."""
    found = {}
    with x64():
        for asked in ("", offload):
            setup = Setup(LLAMA, "fsdp=2,tensor=2", dtype="float64", storage=storage, remat="full")
            off = Offload.parse(asked)
            step = dataclasses.replace(setup.step, offload=off)
            layout, owners = setup.optimizer.layout_of_state()
            whole = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
            states = {name: setup.plan.shardings[owner] if owner else whole for name, owner in owners.items()}
            kernels = setup.plan.shardings
            if asked:
                states = placement.hosted(states, placement.offloaded_state(layout, owners, off.optimizer))
                kernels = placement.hosted(kernels, step.model.layer_kernels)
            params = {key: jax.device_put(array, kernels[key]) for key, array in setup.params.items()}
            begin = setup.graphs.compile("init", setup.optimizer.init, params, out_shardings=states)
            batch = setup.place(packed_batch(), 2)
            out = (kernels, states, None)
            state = begin(params)
            graph = setup.graphs.compile(
                "fused", step.fused, params, state, np.int32(0), batch, donate=(0, 1), out_shardings=out
            )
            for n in range(2):
                params, state, metrics = graph(params, state, np.int32(n), batch)
            assert where(params) == {key: asked != "" and key in step.model.layer_kernels for key in params}
            assert any(where(state).values()) == bool(asked)
            found[asked] = setup.host(params), setup.host(state, layout), float(metrics["grad_norm"])
    for have, want in zip(found[offload][:2], found[""][:2], strict=True):
        assert_near(have, want, 1e-12)
    assert found[offload][2] == pytest.approx(found[""][2], rel=1e-13)


CODE = """
import json, sys
from pathlib import Path
from tiny_runs import make_config, quiet, state_bytes
from jaxsys.train.trainer import Trainer
from jaxsys.train.config import SampleConfig

def train(name, stop_at=None, **changes):
    base = dict(mesh="fsdp=2", remat="full", steps=4, eval_every=2, sample=SampleConfig(("The", ), max_tokens=4))
    config = make_config(root / name, material, **{**base, **changes})
    with Trainer(config, quiet()) as trainer:
        summary = trainer.run(stop_at)
        kinds = {a.sharding.memory_kind for a in [*trainer.params.values(), *trainer.opt_state.values()]}
        return summary.losses, summary.heldout_after, sorted(kinds), trainer.samples.view_bytes

root, material, everything = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
plain = train("plain", storage="stacked")
fused = train("fused", storage="stacked", offload=everything)
train("resumed", 2, storage="stacked", offload=everything, step_form="split", update_groups=2)
resumed = train("resumed", storage="stacked")
back = train("back", 2, storage="stacked")
back = train("back", storage="stacked", offload=everything)
states = [state_bytes(root / name, 4) for name in ("plain", "fused", "resumed", "back")]
json.dump({
    "plain": plain, "fused": fused, "resumed": resumed, "back": back,
    "equal": [state == states[0] for state in states], "arrays": len(states[0]),
}, sys.stdout)
"""


def test_a_run_with_offload_is_bitwise_that_without_and_resumes_either_way(tmp_path, material):
    """With no multiply-adds to contract (an instruction set without them) the order of fusion does not matter."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX",
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), str(material), EVERYTHING],
        env=environment, text=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["equal"] == [True] * 4 and found["arrays"] > 10
    (losses, heldout, kinds, view), (same, heldout_too, memories, served) = found["plain"], found["fused"]
    assert same == losses and heldout_too == heldout
    assert found["resumed"][0] == losses[2:] and found["back"][0] == losses[2:]
    assert HOST not in kinds and HOST in memories
    # What is served is on the device: the parameters themselves, or a view whose bytes are told.
    assert view == 0 and served > 0


def test_what_is_asked_for_lies_in_host_memory(tmp_path):
    run = run_of(tmp_path, offload="optimizer,parameters", storage="stacked")
    kernels = {key for key, in_host in where(run.params).items() if in_host}
    assert kernels == {key for key in run.params if key.startswith("layers.") and key.endswith("kernel")}
    state = {name for name, in_host in where(run.opt_state).items() if in_host}
    assert state == {name for name in run.opt_state if name.endswith("kernel")}


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_of_the_state_is_spread_over_the_layers(tmp_path, share):
    model = dataclasses.replace(LLAMA, n_layers=8)
    run = run_of(tmp_path, model=model, offload=f"optimizer={share}", storage="listed")
    sizes = {name: stored.nbytes for name, stored in run.optimizer_plan.layout.items() if name.endswith("kernel")}
    away = [name for name, in_host in where(run.opt_state).items() if in_host]
    assert sum(sizes[name] for name in away) / sum(sizes.values()) == pytest.approx(share, abs=0.05)
    for layer in range(8):
        mine = [name for name in sizes if f"layers.{layer}." in name]
        assert 0 < len(set(mine) & set(away)) < len(mine)


def test_a_misspelt_activation_is_an_error_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown activation to offload 'residul': did you mean 'residual'"):
        run_of(tmp_path, model=ONE_LAYER, offload="activations=residul").prepare()


def test_an_activation_that_no_backward_pass_reads_is_an_error():
    moved = placement.Moves(0, 0, {"residual": 8}, frozenset({"residual", "idle"}))
    program = placement.Program("train_step", moved, 0, None, None)
    placement.check(Offload(activations=("residual",)), [program])
    with pytest.raises(UserError, match=r"activations=idle: nothing moves.*names in the program: idle, residual"):
        placement.check(Offload(activations=("idle",)), [program])


def test_a_program_that_leaves_arrays_on_the_device_is_an_error():
    moved = placement.Moves(0, 8, {}, frozenset())
    with pytest.raises(UserError, match=r"offload optimizer: 100 bytes .* of train_step .* and 40 are"):
        placement.check(Offload(optimizer=1.0), [placement.Program("train_step", moved, 100, 40, 0)])
    placement.check(Offload(optimizer=1.0), [placement.Program("train_step", moved, 100, 100, 0)])
    kept = placement.Moves(8, 8, {"residual": 8}, frozenset({"residual"}))
    with pytest.raises(UserError, match=r"activations=residual: .*train_step keeps them all in device memory"):
        placement.check(Offload(activations=("residual",)), [placement.Program("train_step", kept, 0, 0, 0)])


def test_parameters_in_host_memory_that_nothing_fetches_are_an_error():
    idle = placement.Program("grads", placement.Moves(0, 0, {}, frozenset()), 8, None, None)
    with pytest.raises(UserError, match="offload parameters: no program of the step brings anything from host memory"):
        placement.check(Offload(parameters=True), [idle])


def test_offloaded_parameters_need_a_remat_policy(tmp_path):
    with pytest.raises(UserError, match=r"offload parameters with remat=none: .* expected remat=full, dots"):
        run_of(tmp_path, offload="parameters", remat="none")


def test_an_optimizer_without_state_cannot_be_offloaded(tmp_path):
    with pytest.raises(UserError, match=r"offload optimizer: this optimizer keeps nothing of a matrix's size"):
        run_of(tmp_path, offload="optimizer", optim=OptimConfig(SGD(momentum=0.0)))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_activations_move_under_every_remat_policy(remat):
    setup = Setup(ONE_LAYER, remat=remat)
    step = dataclasses.replace(setup.step, offload=Offload(activations=("gate", "query")))
    moved = placement.moves(jax.make_jaxpr(step.grads)(setup.params, packed_batch()))
    tokens = packed_batch()["tokens"].size
    assert moved.named == {"gate": tokens * LLAMA.d_ff * 4, "query": tokens * LLAMA.n_heads * LLAMA.head_dim * 4}


# ------------------------------------------------------------------------------------------------- the TPU's compiler

TPU = ModelConfig(
    "llama", vocab_size=1024, d_model=512, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=128, d_ff=1024,
    max_seq_len=256, tie_embeddings=True,
)  # fmt: skip


def on_tpu(tmp_path, offload):
    """The memory of the compiled step on one chip of four."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = TrainConfig(
        run=str(tmp_path), model=TPU, mesh="fsdp=2,tensor=2", data=DataConfig(batch_size=8, seq_len=128),
        remat="full", offload=offload,
    )  # fmt: skip
    run = AbstractRun(config, TPU, devices)
    run.prepare()
    ((graph, _),) = run.launcher.programs
    return run, graph


@pytest.mark.slow
def test_the_tpu_compiler_keeps_in_host_memory_exactly_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    _, plain = on_tpu(tmp_path, "")
    assert plain.stats.host_bytes == 0
    run, graph = on_tpu(tmp_path, EVERYTHING)
    shards = [*run.params.values(), *run.opt_state.values()]
    away = [x for x in shards if x.sharding.memory_kind == HOST]
    arguments = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in away)
    # Two moments of every matrix, and the layers' kernels themselves, a quarter each.
    D, F, A, V, L = 512, 1024, 512 * (4 + 2 + 2 + 4) * 128, 1024, 6
    layers = L * (A + 3 * D * F)
    assert arguments == (2 * (layers + V * D) + layers) * 4 // 4
    assert graph.stats.host_argument_bytes == arguments
    assert plain.stats.argument_bytes - graph.stats.argument_bytes == arguments
    # bfloat16 residuals and, in float32, attention's outputs and normalisers, of all layers.
    B, T = 8, 128
    kept = L * B * T * (D * 2 + 4 * 128 * 4 + 4 * 4) // 4
    assert graph.stats.host_temporary_bytes == kept
    # A transfer is started and awaited apart, and other work can come in between.
    assert "dynamic-slice-start" in graph.text and "dynamic-update-slice-start" in graph.text
