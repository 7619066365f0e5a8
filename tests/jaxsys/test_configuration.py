"""Configuration: round trip through JSON, changes by dotted names, errors that name the key."""

import dataclasses
import json
import math
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.configuration import dumps, from_dict, override, to_dict
from jaxsys.models import mlp
from jaxsys.models.config import Activation, Llama3Scaling, ModelConfig
from jaxsys.optim import SGD, WSD, Adafactor, AdamW, Constant, Cosine, OptimConfig
from jaxsys.train.config import CheckpointConfig, DataConfig, SampleConfig, TrainConfig
from parallelism.errors import UserError


@dataclasses.dataclass(frozen=True)
class Momentum:
    decay: float = 0.9
    nesterov: bool = False


@dataclasses.dataclass(frozen=True)
class Newton:
    steps: int
    damping: float | None = None


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int | None, ...] = ()
    names: tuple[str, ...] = ()
    label: str | None = None

    def __post_init__(self):
        if len(self.sizes) > 4:
            raise ValueError("at most four sizes")


@dataclasses.dataclass(frozen=True)
class Outer:
    run: str
    method: Momentum | Newton = Momentum()
    inner: Inner = Inner()
    optional: Inner | None = None
    rate: float = 1e-3
    count: int = 1
    on: bool = False
    mode: Literal["slow", "fast"] = "slow"


floats = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(
    Inner,
    sizes=st.lists(st.none() | st.integers(), max_size=4).map(tuple),
    names=st.lists(st.text()).map(tuple),
    label=st.none() | st.text(),
)
configs = st.builds(
    Outer,
    run=st.text(),
    method=st.builds(Momentum, floats, st.booleans()) | st.builds(Newton, st.integers(), st.none() | floats),
    inner=inners,
    optional=st.none() | inners,
    rate=floats,
    count=st.integers(),
    on=st.booleans(),
    mode=st.sampled_from(["slow", "fast"]),
)
DEFAULT = Outer("here")


def error(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(configs)
@settings(deadline=None)
def test_json_gives_back_the_configuration(config):
    assert from_dict(Outer, json.loads(dumps(config))) == config


@given(configs)
@settings(deadline=None)
def test_every_key_set_from_its_own_value_gives_back_the_configuration(config):
    values = to_dict(config)
    plain = [f"{key}={json.dumps(values[key])}" for key in ("rate", "count", "on")]
    sizes = json.dumps(values["inner"]["sizes"])
    assert override(config, [*plain, f"mode={config.mode}", f"inner.sizes={sizes}"]) == config


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("count=3", {"count": 3}),
        ("rate=1e-4", {"rate": 1e-4}),
        ("rate=2", {"rate": 2.0}),
        ("rate=.5", {"rate": 0.5}),
        ("rate=+5.e-1", {"rate": 0.5}),
        ("on=True", {"on": True}),
        ("on = false", {"on": False}),
        ("mode=fast", {"mode": "fast"}),
        ("run=3", {"run": "3"}),
        ("run=a=b", {"run": "a=b"}),
        ("run=none", {"run": "none"}),
        ("method=momentum", {"method": Momentum()}),
        ("method.decay=0.5", {"method": Momentum(0.5)}),
        ("inner.label=none", {"inner": Inner(label=None)}),
        ("inner.label=true", {"inner": Inner(label="true")}),
        ("inner.sizes=8", {"inner": Inner(sizes=(8,))}),
        ("inner.sizes=8, none,16", {"inner": Inner(sizes=(8, None, 16))}),
        ("inner.sizes=[8,null]", {"inner": Inner(sizes=(8, None))}),
        ("inner.sizes=", {"inner": Inner()}),
        ("inner.names=a,b", {"inner": Inner(names=("a", "b"))}),
        ("optional=inner", {"optional": Inner()}),
    ],
)
def test_assignment_sets_its_key(assignment, expected):
    assert override(DEFAULT, [assignment]) == dataclasses.replace(DEFAULT, **expected)


def test_assignments_are_checked_as_a_whole_in_order():
    changed = override(
        DEFAULT, ["method=newton", "method.steps=3", "optional=inner", "optional.label=x", "count=1", "count=2"]
    )
    assert changed == dataclasses.replace(DEFAULT, method=Newton(3), optional=Inner(label="x"), count=2)


def test_the_configuration_that_is_overridden_stays():
    override(DEFAULT, ["count=9"])
    assert Outer("here") == DEFAULT


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("method.kind=newton", ["configuration key method.kind: found 'newton'", "give method=newton"]),
        ("method.kind=newtn", ["unknown method 'newtn'", "'newton'"]),
        ("cuont=1", ["'cuont'", "'count'"]),
        ("method.dekay=1", ["'method.dekay'", "'method.decay'"]),
        ("method=momentun", ["'momentun'", "'momentum'"]),
        ("method=sgd", ["'sgd'", "momentum, newton"]),
        ("method=newton", ["method", "steps"]),
        ("count=1.5", ["count", "1.5", "int"]),
        ("count=many", ["count", "'many'", "int"]),
        ("count=true", ["count", "True", "int"]),
        ("on=1", ["on", "1", "bool"]),
        ("rate=fast", ["rate", "'fast'", "float"]),
        ("rate=none", ["rate", "'none'", "float"]),
        ("mode=medium", ["mode", "'medium'", "slow, fast"]),
        ("inner.sizes=8,b", ["inner.sizes", "'b'", "int or none"]),
        ("inner.sizes=1,2,3,4,5", ["inner", "at most four sizes"]),
        ("optional.label=x", ["optional is None", "optional.label"]),
        ("run.x=1", ["run.x", "'here'"]),
        ("inner=other", ["'inner'", "'other'", "inner.sizes"]),
        ("count", ["'count'", "KEY=VALUE"]),
    ],
)
def test_bad_assignment_is_one_line_that_names_key_and_value(assignment, parts):
    message = error(override, DEFAULT, [assignment])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"run": "x", "colour": 1}, ["'colour'"]),
        ({}, ["run"]),
        ({"run": "x", "method": {"decay": 1.0}}, ["method", "momentum, newton"]),
        ({"run": "x", "method": {"kind": "newton"}}, ["method", "steps"]),
        ({"run": "x", "method": "newton"}, ["method", "steps"]),
        ({"run": "x", "inner": {"size": []}}, ["'inner.size'", "'inner.sizes'"]),
        ({"run": "x", "inner": 3}, ["inner", "3"]),
        ({"run": "x", "inner": None}, ["inner", "None"]),
        ({"run": "x", "inner": {"sizes": "8"}}, ["inner.sizes", "'8'"]),
    ],
)
def test_bad_json_values_are_one_line_that_names_the_key(values, parts):
    message = error(from_dict, Outer, values)
    assert all(part in message for part in parts), message


MODEL = ModelConfig("llama", vocab_size=8, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=8)
BAD = [
    (MODEL, {name: 0}) for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
] + [
    (MODEL, {"family": "mamba"}),
    (MODEL, {"max_seq_len": 0}),
    (MODEL, {"head_dim": 3}),
    (MODEL, {"n_heads": 3}),
    (MODEL, {"activation": "relu"}),
    (MODEL, {"norm_eps": 0.0}),
    (MODEL, {"rope_theta": -1.0}),
    (MODEL, {"rope_theta": math.inf}),
    (MODEL, {"windows": (4,)}),
    (MODEL, {"windows": (None, 0)}),
    (MODEL, {"attention_scale": 0.0}),
    (MODEL, {"attention_softcap": -1.0}),
    (MODEL, {"logit_softcap": 0.0}),
    (MODEL, {"embed_scale": math.nan}),
    (MODEL, {"norm_offset": math.nan}),
    (Llama3Scaling(), {"factor": 0.0}),
    (Llama3Scaling(), {"low_freq_factor": 0.0}),
    (Llama3Scaling(), {"high_freq_factor": 1.0}),
    (Llama3Scaling(), {"original_max_position": 0}),
    (AdamW(), {"b1": 1.0}),
    (AdamW(), {"b2": -0.1}),
    (AdamW(), {"eps": 0.0}),
    (AdamW(), {"weight_decay": -0.1}),
    (SGD(), {"momentum": 1.0}),
    (SGD(), {"weight_decay": math.nan}),
    (SGD(momentum=0.0), {"nesterov": True}),
    (Adafactor(), {"decay_rate": 0.0}),
    (Adafactor(), {"eps": 0.0}),
    (Adafactor(), {"clipping_threshold": 0.0}),
    (Adafactor(), {"min_factored": 0}),
    (Adafactor(), {"weight_decay": -1.0}),
    (OptimConfig(), {"learning_rate": -1.0}),
    (OptimConfig(), {"learning_rate": math.inf}),
    (OptimConfig(), {"learning_rate": math.nan}),
    (OptimConfig(), {"clip_norm": 0.0}),
    (Constant(), {"warmup_steps": -1}),
    (Cosine(), {"warmup_steps": -1}),
    (Cosine(), {"final": 1.1}),
    (WSD(), {"warmup_steps": -1}),
    (WSD(), {"final": -0.1}),
    (WSD(), {"decay": 2.0}),
    (DataConfig(), {"source": ""}),
    (DataConfig(), {"tokenizer": ""}),
    (DataConfig(), {"seq_len": 0}),
    (DataConfig(), {"limit": 0}),
    (DataConfig(), {"heldout": 1.0}),
    (CheckpointConfig(), {"keep": 0}),
    (CheckpointConfig(), {"ram": ""}),
    (CheckpointConfig(), {"ram_every": 0}),
    (CheckpointConfig(), {"every": 0}),
    (CheckpointConfig(), {"keep_every": 0}),
    (CheckpointConfig(), {"keep_best": -1}),
    (CheckpointConfig(), {"remote": ""}),
    (CheckpointConfig(), {"remote_every": 0}),
    (CheckpointConfig(), {"remote_keep": 0}),
    (CheckpointConfig(), {"staging_mb": 0}),
    (CheckpointConfig(), {"peers": 1}),  # where there is no ram
    (CheckpointConfig(ram="/dev/shm"), {"peers": 0}),
    (SampleConfig(), {"max_tokens": 0}),
    (SampleConfig(), {"temperature": -1.0}),
    (TrainConfig("x"), {"run": ""}),
    (TrainConfig("x"), {"init_from": ""}),
    (TrainConfig("x"), {"steps": 0}),
    (TrainConfig("x"), {"seed": 2**31}),
    (TrainConfig("x"), {"eval_batches": -1}),
]


@pytest.mark.parametrize(("config", "change"), BAD, ids=lambda part: str(part) if isinstance(part, dict) else "")
def test_a_value_that_makes_no_sense_is_refused_by_its_key(config, change):
    ((key, value),) = change.items()
    assert f"configuration key {key}: found {value!r}, expected" in error(lambda: dataclasses.replace(config, **change))


def test_the_key_of_a_refused_value_is_the_whole_one():
    for assignment in ("data.heldout=1", "checkpoint.keep=0", "optim.learning_rate=-1.0", "optim.optimizer.b1=1.0"):
        key = assignment.partition("=")[0]
        assert f"configuration key {key}: found" in error(override, TrainConfig("x"), [assignment])


def test_the_activations_of_a_configuration_are_those_of_the_model():
    assert set(get_args(Activation)) == set(mlp.ACTIVATIONS)
