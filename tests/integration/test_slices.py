"""Two TPU slices, compiled for ahead of time: gradients are summed inside a slice before they cross to the other."""

import importlib.util
import os

import jax
import pytest

from jaxsys.models.config import ModelConfig
from jaxsys.train import DataConfig, TrainConfig
from jaxsys.train.abstract import AbstractRun
from parallelism.collectives import sent_to_other_slices

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (extra tpu)")

MODEL = ModelConfig(
    "llama", vocab_size=4096, d_model=512, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=64, d_ff=1536,
    max_seq_len=256, tie_embeddings=True,
)  # fmt: skip


@pytest.fixture
def devices(monkeypatch):
    """Two slices of 16 chips, none of which is here."""
    for name, value in {
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices


def train_step(mesh, devices):
    """The text of a compiled train step, and the bytes of a whole gradient."""
    data = DataConfig(batch_size=32, seq_len=256)
    config = TrainConfig(run="slices", model=MODEL, mesh=mesh, data=data, remat="full")
    run = AbstractRun(config, MODEL, devices)
    run.prepare()
    (graph,) = (graph for graph in run.graphs if graph.name == "train_step")
    return graph.text, sum(stored.nbytes for stored in run.plan.layout.values())


@pytest.mark.parametrize("spec", ["data=2,slices=2,fsdp=16", "data=32,slices=2"])
def test_only_a_devices_part_of_the_gradient_crosses_to_the_other_slice(devices, spec):
    """16 devices a slice: each sends a sixteenth of the gradient (float32) and small change, whether or not parameters
    are split."""
    text, gradient = train_step(spec, devices)
    assert gradient / 16 <= sent_to_other_slices(text) <= 1.5 * gradient / 16


def test_one_slice_sends_nothing_to_others(devices):
    text, _ = train_step("fsdp=16", devices[:16])
    assert sent_to_other_slices(text) == 0
