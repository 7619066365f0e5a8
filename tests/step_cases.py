"""What a train step can be made of, and each combination run through ``AbstractRun`` and its ``Launcher``.

The oracle is one device in float64 with optax itself: no mesh, no storage, no launcher.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from tiny_models import (
    EXPERTS,
    GEMMA2,
    LLAMA,
    ZERO,
    Setup,
    arranged,
    assert_near,
    host_arrays,
    packed_batch,
    quickly_compiled,
    x64,
)

from jaxsys.models.config import Experts
from jaxsys.optim import AdamW, Constant, OptimConfig
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import DataConfig, TrainConfig
from jaxsys.train.launch import batch_grid
from parallelism import put, to_host
from parallelism.sequence import METHODS

# Whoever would lease live weights.
NOBODY: Any = SimpleNamespace(held=False, begin_update=lambda: (False, False), publish=lambda params: None)

MODELS = {
    "llama": LLAMA,
    "gemma2": GEMMA2,
    "qwen3_moe": dataclasses.replace(
        LLAMA, family="qwen3_moe", qk_norm="head", n_layers=1, tie_embeddings=False,
        experts=Experts(4, 2, 10, balance_loss=0.3, z_loss=0.1),
    ),
    "shared": EXPERTS,
    "capacity": dataclasses.replace(
        EXPERTS, experts=dataclasses.replace(EXPERTS.experts, routing="sigmoid", capacity_factor=0.9, dense_layers=())
    ),
}  # fmt: skip
DENSE = ["llama", "gemma2"]
DEEP = {
    "llama": dataclasses.replace(LLAMA, n_layers=5),
    "gemma2": dataclasses.replace(GEMMA2, n_layers=5, windows=(5, None, 5, None, 3)),
    "qwen3_moe": dataclasses.replace(MODELS["qwen3_moe"], n_layers=3),
    "capacity": dataclasses.replace(MODELS["capacity"], n_layers=5),
}
"""As many layers as no number of stages divides."""
AXES = ("data", "fsdp", "tensor", "context", "expert")
OPTIONS = {
    "storage": ("listed", "stacked"),
    "remat": ("none", "full", "dots"),
    "accumulate": (1, 2),
    "groups": (0, 2),  # update groups of the split step; 0 is the fused one
    "zero": tuple(ZERO),
    "residual": ("context+tensor", "context"),
    "offload": ("", "optimizer", "optimizer=0.5", "parameters", "optimizer,parameters"),
    "activations": ("", "activations=residual", "activations=residual+mlp_residual"),
    "batches": ("rows", "documents"),  # documents: arranged by parallelism.balance
    "dtype": ("float64", "float32"),
}  # fmt: skip
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
STEPS = 2
ROWS, LENGTH = 16, 16
# Adam divides a gradient by the root of its mean square. Where an element is near zero, as some of a large array always
# are, that is a sign, and rounding decides it: no two orders of summation agree. With an epsilon of the size of the
# gradients (of norm 1, over some ten thousand elements) the update is smooth, and as accurate as they are. The learning
# rate is a power of two, as schedules are in float32; two small steps of it lead nowhere where float32 is worse.
OPTIM = OptimConfig(AdamW(b1=0.8, b2=0.9, eps=1e-2), Constant(), learning_rate=2**-8, clip_norm=1.0)


def methods(context, method):
    """One of the four where no row is split."""
    return (context > 1) | (method == METHODS[0])


def experts(model, expert):
    """For all else the axis is like ``fsdp``."""
    return (expert == 1) | ~np.isin(model, DENSE)


def fetched(remat, offload):
    return (remat != "none") | ~(np.char.find(offload, "parameters") >= 0)


def arrangeable(context, model, batches):
    return (batches == "rows") | ((context > 1) & (model != "capacity"))


CONSTRAINTS = (methods, experts, fetched, arrangeable)
"""What can go together; see ``covering.product``."""


@functools.cache
def on_one_device(model, deep=False):
    """After each step: logical parameters and optimizer state, and the metrics."""
    with x64(), quickly_compiled():
        setup = Setup((DEEP if deep else MODELS)[model], dtype="float64", optim=OPTIM)
        adam = OPTIM.optimizer
        decayed = {key: "norm" not in stored.axes for key, stored in setup.plan.layout.items()}
        transform = optax.chain(
            optax.clip_by_global_norm(OPTIM.clip_norm),
            optax.adamw(OPTIM.learning_rate, adam.b1, adam.b2, adam.eps, weight_decay=adam.weight_decay, mask=decayed),
        )

        def step(params, state, batch):
            grads, sums = setup.step.grads(params, batch)
            mean = jax.tree.map(lambda g: g / sums["targets"], grads)
            updates, state = transform.update(mean, state, params)
            return optax.apply_updates(params, updates), state, setup.step.finish((grads, sums), 0)[1]

        params, batch, found = setup.params, setup.place(packed_batch(ROWS, LENGTH)), []
        state = transform.init(params)
        graph = setup.graphs.compile("oracle", step, params, state, batch)
        for _ in range(STEPS):
            params, state, metrics = graph(params, state, batch)
            (adamw,) = (each for each in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(each))
            arrays = {"optimizer.count": adamw.count, **params}
            for moment in ("mu", "nu"):
                arrays |= {f"optimizer.{moment}.{key}": x for key, x in getattr(adamw, moment).items()}
            found.append((jax.tree.map(np.asarray, arrays), {name: float(x) for name, x in metrics.items()}))
        assert found[0][1]["grad_norm"] > OPTIM.clip_norm, "nothing is clipped: the comparison would not show it"
        assert (found[0][1].get("expert_dropped", 0) > 0) == (model == "capacity")
        return found


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def config_of(model, method, offload, activations, zero, residual, groups, batches, dtype, **more):
    """The training run of one combination."""
    axes = {axis: more.pop(axis) for axis in AXES if axis in more}
    data = DataConfig(batch_size=ROWS, seq_len=LENGTH)
    if batches == "documents":  # as much room again, so that no document has to be cut
        data = DataConfig(batch_size=2 * ROWS, seq_len=LENGTH, split_shares=(0.5,))
    return TrainConfig(
        run="none", model=MODELS[model], mesh=",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1),
        data=data, optim=OPTIM, steps=STEPS, step_form="split" if groups else "fused", update_groups=groups or 1,
        context_method=method, activation_rules=f"residual={residual}", parameter_dtype=dtype, compute_dtype=dtype,
        offload=",".join(filter(None, (offload, activations))), **ZERO[zero], **more,
    )  # fmt: skip


def host_batch(config, run):
    """The batch as a loader would give it."""
    batch = packed_batch(ROWS, LENGTH)
    if not config.data.split_shares:
        return batch
    grid = batch_grid(config, run.mesh, run.activation_rules)
    return arranged(batch, grid, config.data.split_shares[0])


def steps(config):
    """After each step, of a run that begins like the oracle: logical parameters and state, and the metrics."""
    with x64(config.parameter_dtype == "float64"), quickly_compiled():
        run = AbstractRun(config, config.model)
        arrays = host_arrays(config.model, config.parameter_dtype)
        params = put(run.stored, lambda logical, box: arrays[logical.name][box])
        state = put(run.optimizer_plan, lambda logical, box: np.zeros(logical.shape, logical.dtype)[box])
        run.prepare()
        batch, found = run.launcher.place(host_batch(config, run)), []
        for n in range(STEPS):
            params, state, metrics, _ = run.launcher.launch(params, state, batch, n, lambda *_: 0.0, NOBODY)
            for placed, arrays in ((run.stored, params), (run.optimizer_plan, state)):
                for key, array in arrays.items():
                    want = placed.shardings[key]
                    assert array.sharding.is_equivalent_to(want, array.ndim), key
                    assert array.sharding.memory_kind == want.memory_kind, key
            host = to_host(run.layout, {**params, **state})
            found.append((host, {name: float(x) for name, x in metrics.items()}))
        return found


def check(case):
    """Two steps of AdamW with clipping equal one device: metrics, gradients (the first ``mu`` is a multiple of them),
    parameters, optimizer state; and all of it lies where it should."""
    compare(steps(config_of(**case)), on_one_device(case["model"]), TOLERANCE[case["dtype"]])


def compare(run, oracle, tolerance):
    """What ``steps`` and ``on_one_device`` give."""
    for (found, metrics), (expected, expected_metrics) in zip(run, oracle, strict=True):
        assert metrics == pytest.approx(expected_metrics, rel=tolerance)
        assert_near(_roots(found), _roots(expected), tolerance)


def _roots(arrays):
    """Mean squares by their roots: their own relative errors are twice the gradients'."""
    return {name: np.sqrt(x) if name.startswith("optimizer.nu.") else x for name, x in arrays.items()}
