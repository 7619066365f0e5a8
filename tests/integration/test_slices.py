"""Two TPU slices, compiled for ahead of time: gradients are summed inside a slice before they cross to the other."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.graphs import Graphs
from jaxsys.models.config import ModelConfig
from jaxsys.models.state import build
from jaxsys.optim import OptimConfig, Optimizer
from jaxsys.train.step import Step
from parallelism import PARAMETERS, MeshSpec, plan
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


def train_step(mesh):
    """The text of a compiled train step, and the bytes of a whole gradient."""
    model = build(MODEL, storage="stacked")
    placed = plan(model.layout, mesh, PARAMETERS, model.units)
    optimizer = Optimizer(OptimConfig(), placed.layout, 10)
    step = Step(model.with_layout(placed.layout), optimizer, jnp.dtype("bfloat16"), "full", placed.shardings)
    layout, like = optimizer.layout_of_state()
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    params = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed.shardings[k]) for k, s in placed.layout.items()}
    state = {
        k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed.shardings[like[k]] if like[k] else whole)
        for k, s in layout.items()
    }
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: jax.ShapeDtypeStruct((1, 32, 256), jnp.int32, sharding=rows) for name in names}
    out = jax.tree.map(lambda array: array.sharding, (params, state))
    graph = Graphs(mesh).compile(
        "train_step", step.fused, params, state, np.int32(0), batch, donate=(0, 1), out_shardings=(*out, None)
    )
    return graph.compiled.as_text(), sum(stored.nbytes for stored in placed.layout.values())


@pytest.mark.parametrize("spec", ["data=2,slices=2,fsdp=16", "data=32,slices=2"])
def test_only_a_devices_part_of_the_gradient_crosses_to_the_other_slice(devices, spec):
    """16 devices a slice: each sends a sixteenth of the gradient (float32) and small change, whether or not parameters
    are split."""
    text, gradient = train_step(MeshSpec.parse(spec).build(devices))
    assert gradient / 16 <= sent_to_other_slices(text) <= 1.5 * gradient / 16


def test_one_slice_sends_nothing_to_others(devices):
    text, _ = train_step(MeshSpec.parse("fsdp=16").build(devices[:16]))
    assert sent_to_other_slices(text) == 0
