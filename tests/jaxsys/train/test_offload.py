"""State, parameters and activations in host memory: runs saved and resumed, and proof that things move.

That steps give the same results is in ``test_step_covering.py``.
"""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import LLAMA, Setup, packed_batch
from tiny_runs import MODEL, make_config, quiet, state_bytes

from jaxsys.models.config import ModelConfig
from jaxsys.models.state import build
from jaxsys.optim import SGD, OptimConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import DataConfig, SampleConfig, TrainConfig
from jaxsys.train.trainer import Trainer
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


def train(tmp_path, material, name, stop_at=None, **changes):
    """A run's summary, the memories that its state lies in, and what its samples hold on the device besides."""
    config = make_config(
        tmp_path / name, material, mesh="fsdp=2", remat="full", storage="stacked", steps=4, eval_every=2, **changes
    )
    with Trainer(config, quiet()) as trainer:
        summary = trainer.run(stop_at)
        memories = set(where({**trainer.params, **trainer.opt_state}).values())
        return summary, memories, trainer.inference.view_bytes if trainer.inference else None


@pytest.mark.parametrize(
    ("first", "then"),
    [({"offload": EVERYTHING}, {}), pytest.param({}, {"offload": EVERYTHING}, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_from_its_checkpoint_with_offload_and_without(tmp_path, material, first, then):
    straight, memories, _ = train(tmp_path, material, "straight")
    assert memories == {False}
    begun, before, _ = train(tmp_path, material, "resumed", 2, **first, step_form="split", update_groups=2)
    ended, after, _ = train(tmp_path, material, "resumed", **then)
    assert before == ({True, False} if first else {False}) and after == ({True, False} if then else {False})
    np.testing.assert_allclose([*begun.losses, *ended.losses], straight.losses, rtol=1e-5)
    assert ended.heldout_after == pytest.approx(straight.heldout_after, rel=1e-5)
    found, expected = (state_bytes(tmp_path / name, 4) for name in ("resumed", "straight"))
    assert found.keys() == expected.keys()
    for name in expected:
        if name.endswith("kernel"):
            have, want = (np.frombuffer(state[name], np.float32) for state in (found, expected))
            assert np.linalg.norm(have - want) <= 1e-4 * np.linalg.norm(want), name


def test_what_is_saved_from_host_memory_is_what_was_there(tmp_path, material):
    """Bit for bit: a run resumed with offload is the run that was never stopped, samples taken on the way or not."""
    options = {"offload": EVERYTHING, "sample": SampleConfig(("The",), max_tokens=2)}
    straight, memories, served = train(tmp_path, material, "straight", offload=EVERYTHING)
    begun, _, served = train(tmp_path, material, "resumed", 2, **options)
    ended, _, _ = train(tmp_path, material, "resumed", offload=EVERYTHING)
    assert memories == {True, False}
    assert served == sum(stored.nbytes for stored in build(MODEL).layout.values())  # one view, on the device
    assert [*begun.losses, *ended.losses] == straight.losses
    assert state_bytes(tmp_path / "resumed", 4) == state_bytes(tmp_path / "straight", 4)


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
    step = dataclasses.replace(setup.step, offload=Offload(activations=("gate",)))
    moved = placement.moves(jax.make_jaxpr(step.grads)(setup.params, packed_batch()))
    tokens = packed_batch()["tokens"].size
    assert moved.named == {"gate": tokens * LLAMA.d_ff * 4}


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
