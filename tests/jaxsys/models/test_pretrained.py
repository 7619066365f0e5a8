"""Files of tiny models, written and run by transformers: read, checked, run, written again."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_models import FAMILIES, GOLDENS, load
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import Level, Manager
from checkpoint.formats.safetensors import SafetensorsDir, write_safetensors
from jaxsys import configuration
from jaxsys.kernels.attention import Rows
from jaxsys.models.pretrained import Pretrained, expected_weights, export_hf, file_shape
from jaxsys.models.state import build
from parallelism import MeshSpec, UserError, plan, put, to_host
from parallelism.layout import Layout, Logical, Stored

TOLERANCE = 2e-4  # of logits, float32; reached: 1.2e-5 (smollm2), 6e-6 (the others)


def edit(directory, weights=lambda arrays: arrays, **config):
    """Changes the files of a copied model: its arrays by ``weights``, its configuration by keyword."""
    files = SafetensorsDir(directory)
    arrays = weights({name: files.read(name) for name in files})
    (directory / "model.safetensors").unlink()
    write_safetensors(directory, arrays.items())
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, **config}))


@pytest.fixture
def copy(tmp_path):
    def make(name):
        return shutil.copytree(GOLDENS / name, tmp_path / name)

    return make


def whole(pretrained, dtype=np.float32):
    """Every logical array, read whole."""
    return {
        name: pretrained.reader(
            dataclasses.replace(logical, dtype=np.dtype(dtype)), (slice(None),) * len(logical.shape)
        )
        for name, logical in expected_weights(pretrained.config).items()
    }


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("storage", ["listed", "stacked"])
def test_logits_equal_those_of_transformers(golden, storage, forward):
    expected = np.load(golden / "logits.npz")
    got = forward(Pretrained.open(golden), expected["tokens"][None], storage)[0]
    assert np.abs(got - expected["logits"]).max() < TOLERANCE


def test_golden_logits_show_each_feature_of_gemma2(forward):
    """The golden fails a model that leaves out a window, a soft cap or the scale."""
    opened, golden = Pretrained.open(GOLDENS / "gemma2"), np.load(GOLDENS / "gemma2" / "logits.npz")
    for without in ({"windows": ()}, {"attention_softcap": None}, {"logit_softcap": None}, {"attention_scale": None}):
        changed = dataclasses.replace(opened, config=dataclasses.replace(opened.config, **without))
        assert np.abs(forward(changed, golden["tokens"][None])[0] - golden["logits"]).max() > 100 * TOLERANCE, without


def test_golden_logits_show_the_weights_of_experts(forward):
    """The goldens fail a model that leaves out one of them."""
    changes = {"olmoe": {"normalise": True}, "qwen3_moe": {"normalise": False}, "mixtral": {"per_token": 1}}
    for name, change in changes.items():
        opened, golden = Pretrained.open(GOLDENS / name), np.load(GOLDENS / name / "logits.npz")
        experts = dataclasses.replace(opened.config.experts, **change)
        changed = dataclasses.replace(opened, config=dataclasses.replace(opened.config, experts=experts))
        assert np.abs(forward(changed, golden["tokens"][None])[0] - golden["logits"]).max() > 100 * TOLERANCE, name


def test_golden_logits_show_llama3_scaling(forward):
    opened, golden = Pretrained.open(GOLDENS / "llama3"), np.load(GOLDENS / "llama3" / "logits.npz")
    changed = dataclasses.replace(opened, config=dataclasses.replace(opened.config, rope_scaling=None))
    assert np.abs(forward(changed, golden["tokens"][None])[0] - golden["logits"]).max() > 100 * TOLERANCE


def test_embedding_factor_is_rounded_to_the_dtype_of_the_weights():
    """As transformers does: sqrt(32) is 5.6569, in bfloat16 5.65625."""
    # A layer of zeros, and a norm that only divides by sqrt(eps): what comes out is the scaled embedding.
    config = dataclasses.replace(Pretrained.open(GOLDENS / "gemma2").config, n_layers=1, windows=(), norm_eps=1e12)
    model = build(config, dtype=jnp.bfloat16, storage="listed")
    params = {key: np.ones(s.shape, s.dtype) * (key == "embed.kernel") for key, s in model.layout.items()}
    token = np.ones((1, 1), np.int32)
    hidden = jax.jit(lambda params: model.bind(params)(token, Rows(token, token))[0])(params)
    np.testing.assert_allclose(np.asarray(hidden, np.float64) * 1e6, 5.65625, rtol=1e-6)


def test_every_logical_array_is_expected_and_named(golden):
    config = Pretrained.open(golden).config
    logical = build(config, storage="stacked").layout.logical
    assert expected_weights(config) == logical


@functools.cache
def opened_with_weights(family):
    opened = Pretrained.open(GOLDENS / family)
    return opened, list(expected_weights(opened.config).values())


@settings(deadline=None)  # opening a family's files counts against the first box of it
@given(st.data())
def test_a_box_is_that_box_of_the_whole(data):
    opened, weights = opened_with_weights(data.draw(st.sampled_from(FAMILIES)))
    logical = data.draw(st.sampled_from(weights))
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in logical.shape]
    box = tuple(slice(a, b) for a, b in bounds)
    expected = opened.reader(logical, (slice(None),) * len(box))[box]
    np.testing.assert_array_equal(opened.reader(logical, box), expected, strict=True)


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_reader_casts_to_the_logical_dtype(dtype):
    opened = Pretrained.open(GOLDENS / "llama2")
    for name, array in whole(opened, dtype).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, whole(opened)[name].astype(dtype))


@pytest.mark.parametrize("storage", ["listed", "stacked"])
def test_sharded_load_holds_the_same_arrays(storage):
    opened = Pretrained.open(GOLDENS / "llama3")
    model = build(opened.config, storage=storage)
    devices = min(2, jax.device_count())
    placed = plan(model.layout, MeshSpec(tensor=devices).build(jax.devices()[:devices]), units=model.units)
    got = to_host(placed.layout, put(placed, opened.reader))
    assert got.keys() == whole(opened).keys()
    for name, array in whole(opened).items():
        np.testing.assert_array_equal(got[name], array)


def test_old_and_new_spelling_of_the_rope_fields_mean_the_same(copy):
    directory = copy("llama3")
    new = Pretrained.open(directory).config
    values = json.loads((directory / "config.json").read_text())
    rope = values.pop("rope_parameters")
    old = {**values, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": values.pop("dtype")}
    (directory / "config.json").write_text(json.dumps(old))
    assert Pretrained.open(directory).config == new


# ---------------------------------------------------------------------------------------------------- weights, strictly


def without(name):
    return lambda arrays: {k: v for k, v in arrays.items() if k != name}


def test_missing_weight_is_named(copy):
    directory = copy("llama2")
    edit(directory, without("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"missing weight 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        Pretrained.open(directory)


def test_unused_weight_is_named(copy):
    directory = copy("gemma2")
    edit(directory, lambda arrays: {**arrays, "model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)})
    with pytest.raises(UserError, match=r"not used: weight 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        Pretrained.open(directory)


def test_transposed_weight_is_named_with_both_shapes(copy):
    directory = copy("llama2")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(directory, lambda arrays: {**arrays, name: arrays[name].T})
    with pytest.raises(UserError, match=rf"'{name}' has shape \(32, 64\), the configuration calls for \(64, 32\)"):
        Pretrained.open(directory)


def test_missing_expert_is_named(copy):
    directory = copy("olmoe")
    edit(directory, without("model.layers.1.mlp.experts.5.up_proj.weight"))
    with pytest.raises(UserError, match=r"missing weight 'model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight'"):
        Pretrained.open(directory)


def test_what_only_training_reads_of_experts_is_no_hindrance_to_an_export(tmp_path):
    opened = Pretrained.open(GOLDENS / "olmoe")
    experts = dataclasses.replace(opened.config.experts, capacity_factor=2.0, balance_loss=0.02, z_loss=0.1)
    config = dataclasses.replace(opened.config, experts=experts)
    export_hf(tmp_path / "out", config, whole(opened).items(), dtype="float32", token_ids={})
    assert Pretrained.open(tmp_path / "out").config.experts == dataclasses.replace(
        opened.config.experts, balance_loss=0.02
    )


@pytest.mark.parametrize(("change", "named"), [({"shared_width": 8}, "experts"), ({"scale": 2.0}, "experts")])
def test_experts_that_a_family_does_not_have_cannot_be_exported(tmp_path, change, named):
    opened = Pretrained.open(GOLDENS / "olmoe")
    config = dataclasses.replace(opened.config, experts=dataclasses.replace(opened.config.experts, **change))
    with pytest.raises(UserError, match=f"cannot express this model's {named}"):
        export_hf(tmp_path / "out", config, whole(opened).items(), dtype="float32", token_ids={})


def test_weight_that_is_no_float_is_named(copy):
    directory = copy("llama2")
    edit(directory, lambda arrays: {**arrays, "model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(UserError, match=r"'model\.norm\.weight' has dtype int8"):
        Pretrained.open(directory)


def test_head_that_repeats_the_tied_embedding_is_accepted(copy):
    directory = copy("smollm2")
    edit(directory, lambda arrays: {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"]})
    assert Pretrained.open(directory).config.tie_embeddings


def test_head_that_differs_from_the_tied_embedding_is_an_error(copy):
    directory = copy("smollm2")
    edit(directory, lambda arrays: {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"'lm_head\.weight' differs from weight 'model\.embed_tokens\.weight'"):
        Pretrained.open(directory)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_saved_rotary_frequencies_are_accepted_and_checked(copy, dtype):
    directory = copy("llama2")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    inverse = (10_000.0 ** -(np.arange(0, 8, 2) / 8)).astype(dtype)
    edit(directory, lambda arrays: {**arrays, name: inverse})
    Pretrained.open(directory)
    edit(directory, lambda arrays: {**arrays, name: (1.1 * inverse.astype(np.float32)).astype(dtype)})
    with pytest.raises(UserError, match=r"inv_freq' differs from what the configuration gives"):
        Pretrained.open(directory)


# ------------------------------------------------------------------------------------------------------ bad input files


def test_missing_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such path"):
        Pretrained.open(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 200_000])
def test_damaged_config_is_an_error(copy, text):
    directory = copy("llama2")
    (directory / "config.json").write_text(text, "latin-1")
    with pytest.raises(UserError, match=r"config\.json: (not JSON|holds list)"):
        Pretrained.open(directory)


HOSTILE = [
    ("llama2", "num_hidden_layers", 10**9, "n_layers: found 1000000000, expected at most 10000"),
    ("gemma2", "num_hidden_layers", 10**9, "n_layers: found 1000000000, expected at most 10000"),
    ("llama2", "head_dim", 10**12, "'model.layers.0.self_attn.k_proj.weight' has shape"),
    ("llama2", "head_dim", 10**400, "head_dim is 1000"),
    ("llama2", "rms_norm_eps", 10**400, "rms_norm_eps is 1000"),
    ("llama2", "rms_norm_eps", float("inf"), "rms_norm_eps is inf, expected a positive float"),
    ("gemma2", "layer_types", [["x"]], "layer_types is [['x']]"),
    ("mixtral", "num_local_experts", 10**9, "experts.number: found 1000000000, expected at most 200000"),
    ("olmoe", "num_experts_per_tok", 9, "per_token: found 9, expected at most number=8"),
    ("qwen3_moe", "mlp_only_layers", [3], "mlp_only_layers is [3], expected numbers of the 3 layers"),
    ("llama2", "model_type", ["llama"], "architecture ['llama'] is not supported"),
]


@pytest.mark.parametrize(("golden", "field", "value", "message"), HOSTILE)
def test_a_configuration_that_no_model_has_is_refused_at_once(copy, golden, field, value, message):
    directory = copy(golden)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(UserError) as error:
        Pretrained.open(directory)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_truncated_weights_are_an_error(copy):
    directory = copy("llama2")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="truncated"):
        Pretrained.open(directory)


# ------------------------------------------------------------------------------------------------------------ exporting

TOKENS = {"bos": 1, "eos": [2, 3]}


def export(opened, directory, dtype="float32", change=lambda arrays: arrays, **more):
    export_hf(directory, opened.config, change(whole(opened)).items(), dtype=dtype, token_ids=TOKENS, **more)


def test_export_reloads_as_the_same_model(golden, tmp_path):
    opened = Pretrained.open(golden)
    export(opened, tmp_path / "out")
    again = Pretrained.open(tmp_path / "out")
    assert again.config == opened.config
    for name, array in whole(opened).items():
        np.testing.assert_array_equal(whole(again)[name], array)


def test_export_from_device_arrays_is_the_same_file(tmp_path):
    opened = Pretrained.open(GOLDENS / "gemma2")
    model, params = load(opened, "stacked")
    arrays = to_host(model.layout, params)
    export_hf(tmp_path / "out", opened.config, arrays.items(), dtype="float32", token_ids={})
    again = whole(Pretrained.open(tmp_path / "out"))
    for name, array in whole(opened).items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_casts_and_says_so(tmp_path, dtype):
    export(Pretrained.open(GOLDENS / "llama2"), tmp_path / "out", dtype)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["dtype"], values["torch_dtype"]) == (dtype, dtype)
    assert {str(a.dtype) for a in SafetensorsDir(tmp_path / "out").values()} == {dtype}


def test_export_writes_token_ids_and_tokenizer(tmp_path):
    opened = Pretrained.open(GOLDENS / "llama2")
    export(opened, tmp_path / "out", save_tokenizer=lambda directory: (directory / "tokenizer.json").write_text("{}"))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [2, 3], None)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_export_leaves_a_full_directory_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="not an empty directory"):
        export(Pretrained.open(GOLDENS / "llama2"), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("norm.scale"), "missing weight 'norm.scale'"),
        (lambda a: {**a, "extra": a["norm.scale"]}, "'extra' is given twice or is none"),
        (lambda a: {**a, "norm.scale": a["norm.scale"][:-1]}, "'norm.scale' has shape (31,), the model's is (32,)"),
        (lambda a: {**a, "norm.scale": a["norm.scale"] * 1e6}, "'norm.scale' has values beyond float16"),
    ],
)
def test_failed_export_names_the_array_and_leaves_nothing(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        export(Pretrained.open(GOLDENS / "llama2"), tmp_path / "out", "float16", change)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_export_leaves_nothing(tmp_path):
    def interrupt(directory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(Pretrained.open(GOLDENS / "llama2"), tmp_path / "out", save_tokenizer=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_export_of_what_the_family_cannot_express_names_the_field(tmp_path):
    opened = Pretrained.open(GOLDENS / "llama2")
    strange = dataclasses.replace(opened, config=dataclasses.replace(opened.config, logit_softcap=30.0))
    with pytest.raises(UserError, match=r"llama config\.json cannot express this model's logit_softcap"):
        export(strange, tmp_path / "out")


def test_export_to_an_unknown_dtype_is_an_error(tmp_path):
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        export(Pretrained.open(GOLDENS / "llama2"), tmp_path / "out", "int8")


def test_file_shape_merges_heads_and_head_size_only():
    logical = Logical("o", (32, 4, 8), np.dtype(np.float32), ("embed", "heads", "head_dim"))
    assert file_shape(logical) == (32, 32)


# -------------------------------------------------------------------------------------------------- native checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(golden, arrays, meta)``: the golden model as a native checkpoint; returns its directory."""

    def make(golden, change=lambda arrays: arrays, meta=lambda meta: meta, step=3):
        opened = Pretrained.open(GOLDENS / golden)
        arrays = change(whole(opened))
        layout = Layout(
            Stored(n, a.shape, a.dtype, (None,) * a.ndim, (Logical(n, a.shape, a.dtype, (None,) * a.ndim),))
            for n, a in arrays.items()
        )
        manager = Manager([Level("disk", tmp_path / "run", keep=1)])
        described = meta({"model": configuration.to_dict(opened.config)})
        manager.save(step, {n: jax.device_put(a) for n, a in arrays.items()}, layout, described).wait()
        manager.close()
        return next((tmp_path / "run").glob(f"step*{step}"))

    return make


def test_native_checkpoint_is_the_same_model(golden, checkpoint):
    opened, native = Pretrained.open(golden), Pretrained.open(checkpoint(golden.name))
    assert native.config == opened.config
    for name, array in whole(opened).items():
        np.testing.assert_array_equal(whole(native)[name], array, strict=True)


def test_native_checkpoint_may_hold_an_optimizer(checkpoint):
    path = checkpoint("llama2", lambda a: {**a, "optimizer.count": np.zeros((), np.int32)})
    assert whole(Pretrained.open(path)).keys() == whole(Pretrained.open(GOLDENS / "llama2")).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("norm.scale"), "missing weight 'norm.scale'"),
        (lambda a: {**a, "extra": a["norm.scale"]}, "not used: weight 'extra'"),
        (lambda a: {**a, "norm.scale": a["norm.scale"][:-1]}, "'norm.scale' has shape (31,)"),
    ],
)
def test_native_weights_that_do_not_fit_are_named(checkpoint, change, message):
    with pytest.raises(UserError) as error:
        Pretrained.open(checkpoint("llama2", change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 2}, "unknown configuration key 'model.n_layer': did you mean 'model.n_layers'"),
        ({"n_kv_heads": 3}, "configuration key model.n_heads: found 4, expected a multiple of n_kv_heads=3"),
        ({"n_kv_heads": 0}, "configuration key model.n_kv_heads: found 0, expected at least 1"),
        ({"windows": [4]}, "configuration key model.windows: found (4,), expected none, or one for each of n_layers=2"),
        ({"n_layers": 10**9}, "n_layers: found 1000000000, expected at most 10000"),
        ({"n_heads": "4"}, "model.n_heads: found '4', expected int"),
        ({"family": "qwen2"}, "configuration key model.family: found 'qwen2', expected gemma2 or llama"),
    ],
)
def test_native_configuration_that_makes_no_model_is_an_error(checkpoint, change, message):
    path = checkpoint("llama2", meta=lambda meta: {"model": {**meta["model"], **change}})
    with pytest.raises(UserError) as error:
        Pretrained.open(path)
    assert message in str(error.value)


def test_checkpoint_of_something_else_is_an_error(checkpoint):
    with pytest.raises(UserError, match="meta has no 'model'"):
        Pretrained.open(checkpoint("llama2", meta=lambda meta: {}))
