"""Parameters that are not trained: which, how they are stored, the step against optax, and what their saves cost."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import step_cases
from step_cases import DEEP, LENGTH, ROWS, STEPS, TOLERANCE, _is_adam, compare, config_of, steps
from tiny_models import Setup, host_arrays, packed_batch, quickly_compiled, x64
from tiny_runs import MODEL, make_config, quiet, state_bytes

from checkpoint import open_checkpoint
from jaxsys.models.state import build
from jaxsys.train.abstract import AbstractRun
from jaxsys.train.config import CheckpointConfig
from jaxsys.train.freeze import cuts, frozen, trained
from jaxsys.train.trainer import Trainer
from parallelism.errors import UserError

NAMES = ["embed.kernel", *(f"layers.{i}.{part}" for i in range(12) for part in ("a.kernel", "b.scale")), "norm.scale"]


# ------------------------------------------------------------------------------------------------------------ which


def test_patterns_choose_in_order():
    assert frozen((), NAMES) == set()
    assert frozen(("embed.kernel", "layers.1.*"), NAMES) == {"embed.kernel", "layers.1.a.kernel", "layers.1.b.scale"}
    last = {name for name in NAMES if name.startswith(("layers.10.", "layers.11."))}
    assert frozen(("*", "!layers.1[01].*"), NAMES) == set(NAMES) - last
    assert frozen(("*", "!layers.*", "layers.*.scale"), NAMES) == {n for n in NAMES if n.endswith("scale")} | {NAMES[0]}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("embd.kernel",), "unknown array in freeze 'embd.kernel': did you mean 'embed.kernel'"),
        (("*", "!layers.12.a.kernel"), "did you mean 'layers.*.a.kernel'"),
        (("embed.*", "!layers.3.*"), "nothing that it matches (layers.3.a.kernel) is frozen by a pattern before it"),
        (("layers.*", "embed.*", "norm.*"), "all 26 arrays, so that nothing is left to train"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_in_a_line(patterns, said):
    with pytest.raises(UserError) as error:
        frozen(patterns, NAMES)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_stacks_are_cut_where_other_arrays_are_frozen():
    chosen = frozen(("layers.[0-2].*", "layers.3.a.kernel"), NAMES)
    assert cuts(chosen, NAMES) == (3, 4)
    assert cuts(frozen(("embed.*", "layers.*.scale"), NAMES), NAMES) == ()
    model = dataclasses.replace(MODEL, n_layers=4)
    whole = build(model, storage="stacked").layout
    chosen = frozen(("*", "!layers.3.*", "!norm.*"), whole.logical)
    built = build(model, storage="stacked", cuts=cuts(chosen, whole.logical))
    parts = built.layout
    assert {key: x.shape for key, x in jax.eval_shape(built.init, 0).items()} == {k: s.shape for k, s in parts.items()}
    assert {key.split(".")[1] for key in parts if key.startswith("layers.")} == {"0-2", "3-3"}
    assert parts.logical == whole.logical
    assert trained(parts, chosen).logical.keys() == whole.logical.keys() - chosen
    with pytest.raises(UserError, match=r"layers\.0-3\.\S+ with layers that are trained, and stages need one stack"):
        trained(whole, chosen)


# --------------------------------------------------------------------------------------------------------- the step

# Fewer gradients have a smaller norm.
OPTIM = dataclasses.replace(step_cases.OPTIM, clip_norm=0.25)
LAST = ("*", "!layers.4.*", "!layers.3.mlp.*")  # and so not the embedding, which is the head too


def oracle(model, chosen):
    """``step_cases.on_one_device`` with the gradients of frozen parameters set to zero, and optax told of them."""
    with x64(), quickly_compiled():
        setup = Setup(DEEP[model], dtype="float64", optim=OPTIM)
        adam, layout = OPTIM.optimizer, setup.plan.layout
        decayed = {key: "norm" not in stored.axes for key, stored in layout.items() if key not in chosen}
        adamw = optax.chain(
            optax.clip_by_global_norm(OPTIM.clip_norm),
            optax.adamw(
                OPTIM.learning_rate, adam.b1, adam.b2, adam.eps, weight_decay=adam.weight_decay,
                mask=lambda params: {k: decayed.get(k, False) for k in params},
            ),
        )  # fmt: skip
        transform = optax.multi_transform(
            {"trained": adamw, "frozen": optax.set_to_zero()},
            {key: "frozen" if key in chosen else "trained" for key in layout},
        )

        def step(params, state, batch):
            grads, sums = setup.step.grads(params, batch)
            grads = {key: g * (key not in chosen) for key, g in grads.items()}
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
                held = {k: x for k, x in getattr(adamw, moment).items() if k not in chosen}
                arrays |= {f"optimizer.{moment}.{key}": x for key, x in held.items()}
            found.append((jax.tree.map(np.asarray, arrays), {name: float(x) for name, x in metrics.items()}))
        assert found[0][1]["grad_norm"] > OPTIM.clip_norm, "nothing is clipped: the comparison would not show it"
        return found


def config(model, freeze, **changes):
    defaults = {
        "method": "ring", "offload": "", "activations": "", "zero": 3, "residual": "context", "groups": 0,
        "batches": "rows", "dtype": "float64", "remat": "none", "accumulate": 2,
    }  # fmt: skip
    made = config_of(model, **{**defaults, **changes})
    return dataclasses.replace(made, model=DEEP[model], freeze=freeze, optim=OPTIM)


@pytest.mark.parametrize(
    ("model", "freeze", "options"),
    [
        ("llama", LAST, {"storage": "listed", "groups": 2}),
        ("llama", LAST, {"storage": "stacked", "fsdp": 2, "remat": "full", "offload": "optimizer,parameters"}),
        ("gemma2", LAST, {"storage": "stacked", "tensor": 2, "data": 2, "accumulate": 1}),
        ("gemma2", ("embed.*", "layers.*.mlp.*", "*norm*"), {"stages": 2}),
    ],
)
def test_a_step_equals_optax_with_gradients_zeroed_by_hand(model, freeze, options):
    stages = options.pop("stages", 1)
    made = config(model, freeze, **options)
    if stages > 1:
        made = dataclasses.replace(made, mesh=f"stage={stages}", storage=None)
    chosen = frozen(freeze, build(DEEP[model], storage="listed").layout.logical)
    run = steps(made)
    compare(run, oracle(model, chosen), TOLERANCE["float64"])
    with x64():
        before = host_arrays(DEEP[model], "float64")
    for arrays, _ in run:
        assert all(arrays[name].tobytes() == before[name].tobytes() for name in chosen)
        assert not any(f"optimizer.{moment}.{name}" in arrays for name in chosen for moment in ("mu", "nu"))


def test_no_gradient_is_computed_below_what_is_trained():
    def products(freeze):
        run = AbstractRun(config("llama", freeze, storage="listed", dtype="float32"), DEEP["llama"])
        batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in run.launcher.batch.items()}
        traced = str(jax.make_jaxpr(run.step.grads)(run.params, batch))
        forward = str(jax.make_jaxpr(lambda p, b: run.step._forward(p, b)[:2])(run.params, batch))
        return traced.count("dot_general") - forward.count("dot_general")

    assert products(("*", "!layers.4.*")) < products(()) * 0.3  # of five layers one, and the head's input


# ------------------------------------------------------------------------------------------------------------- a run

DEPTH = 12
TWO = ("*", f"!layers.{DEPTH - 2}.*", f"!layers.{DEPTH - 1}.*")


def run_config(run, material, **changes):
    deep = dataclasses.replace(MODEL, n_layers=DEPTH)
    levels = CheckpointConfig(every=1, keep=10)
    return make_config(
        run, material, **{"model": deep, "freeze": TWO, "steps": 3, "eval_batches": 0, "checkpoint": levels, **changes}
    )


def train(config, stop_at=None):
    with Trainer(config, quiet()) as trainer:
        return trainer.run(stop_at), trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory, material):
    path = tmp_path_factory.mktemp("frozen") / "run"
    train(run_config(path, material), stop_at=2)
    train(run_config(path, material, storage="stacked"))
    return path


def written(run, step):
    """Bytes of a step's own files, the manifest left out."""
    return sum(p.stat().st_size for p in (Path(run) / "checkpoints" / f"step-{step:08}").glob("data-*"))


def test_a_save_writes_what_changed(run):
    states = {step: state_bytes(run, step) for step in (1, 2, 3)}
    for step in (2, 3):
        changed = [n for n, raw in states[step].items() if raw != states[step - 1][n]]
        assert sorted({name.split("layers.")[1].split(".")[0] for name in changed if "layers." in name}) == ["10", "11"]
        nbytes = sum(len(states[step][name]) for name in changed)
        assert nbytes <= written(run, step) <= 1.1 * nbytes
    assert written(run, 1) >= sum(map(len, states[1].values()))
    assert open_checkpoint(run / "checkpoints" / "step-00000003").verify().ok


def test_what_is_frozen_may_not_change_on_resume(run, material):
    with pytest.raises(UserError) as error:
        Trainer(run_config(run, material, freeze=("embed.*",)), quiet())
    assert "trained other parameters: freeze=['*', '!layers.10.*'" in str(error.value)
    same = ("embed.*", "norm.*", "layers.?.*")  # other words for it
    with Trainer(run_config(run, material, freeze=same), quiet()) as trainer:
        assert trainer.step == 3
