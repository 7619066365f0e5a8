"""The real GPU compiler, without a GPU: small steps compiled ahead of time for H100s. Needs JAX's CUDA plugin."""

import dataclasses
import importlib.util

import pytest

if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
    pytest.skip("needs JAX's CUDA plugin (extra cuda)", allow_module_level=True)

from aot_serving import serve

from jaxsys.models.config import ModelConfig
from jaxsys.serve.scheduler import Size
from parallelism.placement import host_bytes, is_matrix
from scripts.aot_report import Recipe, compile_recipe

MODEL = ModelConfig(
    "llama", vocab_size=4096, d_model=512, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1024, max_seq_len=8192
)  # fmt: skip
ROWS, LENGTH, DEVICES = 8, 1024, 4
FSDP = Recipe(MODEL, f"h100:1x{DEVICES}", f"fsdp={DEVICES}", (ROWS, LENGTH))
OFFLOAD = "optimizer,parameters,activations=residual"


@pytest.fixture(scope="module")
def offloaded():
    return compile_recipe(dataclasses.replace(FSDP, changes={"offload": OFFLOAD}), print)


def test_a_step_fits_replicates_nothing_by_accident_and_reduce_scatters_its_gradients(offloaded):
    assert offloaded.faults() == []
    assert offloaded.run.model.storage == "stacked"
    sent = {c.kind for c in offloaded.explanation.collectives if "fsdp" in c.axes and c.nbytes > 1 << 16}
    assert sent == {"all-gather", "reduce-scatter"}


def test_what_lies_in_host_memory_is_what_arithmetic_says(offloaded):
    run, (graph, _) = offloaded.run, offloaded.run.launcher.programs[0]
    kernels = sum(run.plan.layout[key].nbytes for key in run.model.layer_kernels)
    matrices = sum(stored.nbytes for stored in run.plan.layout.values() if is_matrix(stored))
    residual = MODEL.n_layers * ROWS * LENGTH * MODEL.d_model * 2  # bfloat16, what enters each layer
    assert residual // DEVICES == graph.stats.host_temporary_bytes  # and no copy of a stack
    assert graph.stats.host_argument_bytes == (kernels + 2 * matrices) // DEVICES
    assert graph.stats.host_argument_bytes == host_bytes((run.params, run.opt_state))
    assert offloaded.explanation.memory.host == graph.stats.host_bytes


def test_a_step_that_does_not_fit_is_a_fault(offloaded):
    """The report compares by itself: this compiler does not."""
    memory = offloaded.explanation.memory
    assert memory.capacity == 80e9
    small = dataclasses.replace(memory, capacity=memory.total - 1)
    result = dataclasses.replace(offloaded, explanation=dataclasses.replace(offloaded.explanation, memory=small))
    assert [fault.split(":")[0] for fault in result.faults()] == ["does not fit"]


@pytest.mark.parametrize(("mesh", "size"), [("", Size(128, 16, queries=16)), ("tensor=4", Size(16, 16))])
def test_a_served_step_leaves_the_pool_where_it_is_and_attends_by_the_kernel(mesh, size):
    served = serve(f"h100:1x{DEVICES}", mesh, size)
    assert served.storage == "stacked"
    assert served.faults("__gpu$xla.gpu.triton") == []
