"""Three small models, a mesh and a batch for each, and the comparison of arrays that tests use."""

import contextlib
import dataclasses

import jax
import numpy as np

from jaxsys.graphs import Graphs
from jaxsys.models.config import Experts, ModelConfig
from jaxsys.models.state import build
from jaxsys.optim import OptimConfig, Optimizer
from jaxsys.train.step import Step
from parallelism import ACTIVATIONS, PARAMETERS, MeshSpec, balance, plan, put, to_host
from parallelism.zero import state_plans

# Nine query and three key/value heads divide over no tensor axis, a vocabulary of 67 over none but itself.
LLAMA = ModelConfig(
    "llama", vocab_size=67, d_model=32, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=4, d_ff=48,
    max_seq_len=64, tie_embeddings=True,
)  # fmt: skip
GEMMA2 = ModelConfig(
    "gemma2", vocab_size=67, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64,
    tie_embeddings=True, activation="gelu_tanh", windows=(5, None), attention_scale=0.3, attention_softcap=4.0,
    logit_softcap=3.0, post_norms=True, norm_offset=1.0, embed_scale=32**0.5,
)  # fmt: skip
# A dense layer and one of experts; queries and keys are normalised over heads that a tensor axis pads.
EXPERTS = dataclasses.replace(
    LLAMA, qk_norm="width",
    experts=Experts(8, 3, 10, shared_width=6, scale=1.5, dense_layers=(0,), balance_loss=0.5, z_loss=0.1),
)  # fmt: skip
MODELS = {"llama": LLAMA, "gemma2": GEMMA2}
WHOLE, SPLIT = "embed=none,expert_embed=none", "embed=fsdp+expert,expert_embed=fsdp"
ZERO = {
    1: {"parameter_rules": WHOLE, "gradient_rules": WHOLE, "optimizer_rules": SPLIT},
    2: {"parameter_rules": WHOLE, "gradient_rules": SPLIT, "optimizer_rules": SPLIT},
    3: {},
}
"""Rules of each level, for ``Setup``."""


@contextlib.contextmanager
def _configured(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def x64(on=True):
    return _configured("jax_enable_x64", on)


def quickly_compiled():
    """Machine code without LLVM's optimisations, in two thirds of the time; XLA's own passes are what they are."""
    return _configured("jax_disable_most_optimizations", True)


def host_arrays(config, dtype, seed=0):
    """Logical arrays with values far from those of initialisation, so that every gradient is large."""
    rng = np.random.default_rng(seed)
    logical = build(config, dtype=dtype, storage="listed").layout.logical
    return {
        # The same values in every precision.
        name: ((1.0 if "norm" in a.axes else 0.0) + 0.3 * rng.standard_normal(a.shape)).astype("float32").astype(dtype)
        for name, a in logical.items()
    }


def packed_batch(rows=8, length=16, vocabulary=67, seed=1):
    """Two documents and some padding a row; some tokens are no targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length))
    cut = rng.integers(3, length - 4, (rows, 1))
    end = length - rng.integers(0, 3, (rows, 1))
    at = np.arange(length)[None]
    segments = np.where(at < cut, 1, 2) * (at < end)
    positions = np.where(at < cut, at, at - cut) * (at < end)
    targets = np.where((at < end) & (rng.random((rows, length)) > 0.1), rng.integers(0, vocabulary, tokens.shape), -1)
    batch = {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions}
    return {name: value.astype(np.int32) for name, value in batch.items()}


def arranged(batch, grid, share):
    """The documents of a batch of rows where ``parallelism.balance`` puts them; share: of the split regions."""
    flat = {name: value.ravel() for name, value in batch.items()}
    used = np.flatnonzero(flat["segments"])
    begins = np.flatnonzero(flat["positions"][used] == 0)
    found = balance.plan(np.diff(begins, append=len(used)), grid, balance.split_sizes([share], grid))
    assert found.cut == 0
    source, segments, positions = found.arrange()
    at = used[source]
    return {
        "tokens": np.where(source < 0, 0, flat["tokens"][at]),
        "targets": np.where(source < 0, -1, flat["targets"][at]),
        "segments": segments, "positions": positions, "split": found.split,
    }  # fmt: skip


class Setup:
    """A step of one model on one mesh, its parameters from host arrays, its graphs."""

    def __init__(
        self, config, mesh="", *, dtype="float32", storage="listed", remat="none", optim=None, compute=None, steps=10,
        seed=0, method="ring", parameter_rules="", gradient_rules="", optimizer_rules="", activation_rules="",
    ):  # fmt: skip
        self.mesh = MeshSpec.parse(mesh).build()
        model = build(config, dtype=dtype, storage=storage)
        table = PARAMETERS.override(parameter_rules)
        self.plan = plan(model.layout, self.mesh, table, model.units)
        self.shardings = state_plans(
            self.plan, table.override(gradient_rules), table.override(optimizer_rules), model.units
        ).shardings
        arrays = host_arrays(config, dtype, seed)
        self.params = put(self.plan, lambda logical, box: arrays[logical.name][box])
        self.optimizer = Optimizer(optim or OptimConfig(), self.plan.layout, steps)
        self.step = Step(
            model.with_layout(self.plan.layout), self.optimizer, jax.numpy.dtype(compute or dtype), remat,
            self.shardings, method,
        )  # fmt: skip
        self.graphs = Graphs(self.mesh, ACTIVATIONS.override(activation_rules))

    def place(self, batch, microbatches=None):
        """[B, T] over the data axes, or with ``microbatches`` [A, B/A, T]."""
        from jax.sharding import NamedSharding, PartitionSpec

        axes = ("data", "fsdp", "expert")
        if microbatches is None:
            return {k: jax.device_put(v, NamedSharding(self.mesh, PartitionSpec(axes))) for k, v in batch.items()}
        sharding = NamedSharding(self.mesh, PartitionSpec(None, axes))
        return {k: jax.device_put(v.reshape(microbatches, -1, v.shape[-1]), sharding) for k, v in batch.items()}

    def host(self, arrays, layout=None):
        return to_host(layout or self.plan.layout, arrays)

    def grads(self, batch):
        """Logical gradients on the host, and the totals."""
        placed = self.place(batch)
        graph = self.graphs.compile("grads", self.step.grads, self.params, placed)
        grads, totals = graph(self.params, placed)
        return self.host(grads), {name: float(value) for name, value in totals.items() if isinstance(value, jax.Array)}


def assert_near(found, expected, tolerance):
    """Each array, norm-wise: |found - expected| <= tolerance * |expected|."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        norm = np.linalg.norm(np.asarray(want, np.float64))
        error = np.linalg.norm(np.asarray(found[name], np.float64) - np.asarray(want, np.float64))
        assert norm > 0, f"{name} is zero: the comparison says nothing"
        assert error <= tolerance * norm, f"{name}: relative error {error / norm:.1e}, allowed {tolerance:.0e}"
