"""Configuration files: what is read, what is refused, and that the two directions agree."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.models.config import Experts, Llama3Scaling, ModelConfig
from jaxsys.models.families import FAMILIES, family
from parallelism import UserError

SMOLLM2 = {  # of HuggingFaceTB/SmolLM2-135M-Instruct
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
GEMMA2 = {  # of google/gemma-2-9b
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": None,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}
MIXTRAL = {  # of mistralai/Mixtral-8x7B-v0.1
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN3_MOE = {  # of Qwen/Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(values, **changes):
    values = {**values, **changes}
    return family(values["model_type"], "config.json").config_from_hf(values, "config.json")


def test_smollm2():
    assert read(SMOLLM2) == ModelConfig(
        family="llama",
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_seq_len=8192,
        norm_eps=1e-5,
        tie_embeddings=True,
        rope_theta=100_000.0,
    )


def test_gemma2():
    config = read(GEMMA2)
    assert config.windows == (4096, None) * 21
    assert (config.scale, config.attention_softcap, config.logit_softcap) == (1 / 16, 50.0, 30.0)
    assert (config.embed_scale, config.norm_offset, config.post_norms) == (3584**0.5, 1.0, True)
    assert (config.activation, config.tie_embeddings) == ("gelu_tanh", True)


def test_gemma2_reads_layer_types_where_they_are_written():
    kinds = ["full_attention"] * 41 + ["sliding_attention"]
    assert read(GEMMA2, layer_types=kinds).windows == (None,) * 41 + (4096,)


def test_gemma2_caps_are_off_when_null_and_the_default_when_absent():
    assert read(GEMMA2, attn_logit_softcapping=None).attention_softcap is None
    absent = {k: v for k, v in GEMMA2.items() if not k.endswith("softcapping")}
    assert (read(absent).attention_softcap, read(absent).logit_softcap) == (50.0, 30.0)


def test_mixtral():
    config = read(MIXTRAL)
    assert config.experts == Experts(number=8, per_token=2, width=14336)
    assert (config.head_dim, config.qk_norm, config.windows) == (128, None, ())
    assert read(MIXTRAL, sliding_window=4096).windows == (4096,) * 32
    # 12.9 billion of 46.7 billion parameters are active, 0.13 of them in the embedding.
    assert round(config.matmul_parameters() / 1e8) == 127


def test_qwen3_moe():
    config = read(QWEN3_MOE)
    assert config.experts == Experts(number=128, per_token=8, width=768)
    assert (config.head_dim, config.qk_norm) == (128, "head")
    assert round(config.matmul_parameters() / 1e8) == 30
    with pytest.raises(UserError, match="use_sliding_window is True"):
        read(QWEN3_MOE, use_sliding_window=True)


def test_dense_layers_of_qwen3_moe_are_those_named_and_those_between_steps():
    dense = read(QWEN3_MOE, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]).experts.dense_layers
    assert dense == (0, 2, 3, 4)


@pytest.mark.parametrize("values", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3_moe"])
def test_the_load_balance_loss_is_that_of_transformers_where_it_gives_out_the_routers_logits(values):
    assert read(values).experts.balance_loss == 0.0
    found = read(values, output_router_logits=True, router_aux_loss_coef=0.02)
    assert found.experts.balance_loss == 0.02


def test_unsupported_architecture_names_those_supported():
    with pytest.raises(UserError, match=r"config\.json: architecture 'qwen2' is not supported; .*gemma2, llama"):
        family("qwen2", "config.json")


@pytest.mark.parametrize(
    ("values", "field", "value"),
    [
        (SMOLLM2, "architectures", ["LlamaForSequenceClassification"]),
        (SMOLLM2, "attention_bias", True),
        (SMOLLM2, "mlp_bias", True),
        (SMOLLM2, "attention_dropout", 0.1),
        (SMOLLM2, "hidden_act", "gelu"),
        (SMOLLM2, "rope_interleaved", True),
        (SMOLLM2, "sliding_window", 4096),
        (SMOLLM2, "quantization_config", {"bits": 4}),
        (SMOLLM2, "num_hidden_layers", 0),
        (SMOLLM2, "num_hidden_layers", "30"),
        (SMOLLM2, "num_hidden_layers", True),
        (SMOLLM2, "tie_word_embeddings", 1),
        (GEMMA2, "attention_bias", True),
        (GEMMA2, "use_bidirectional_attention", True),
        (GEMMA2, "hidden_act", "gelu"),
        (GEMMA2, "hidden_activation", "relu"),
        (GEMMA2, "layer_types", ["full_attention"]),
        (GEMMA2, "layer_types", ["chunked_attention"] * 42),
        (GEMMA2, "sliding_window", -1),
        (MIXTRAL, "router_jitter_noise", 0.1),
        (MIXTRAL, "num_local_experts", 0),
        (QWEN3_MOE, "attention_bias", True),
        (QWEN3_MOE, "num_local_experts", 64),
    ],
)
def test_field_without_support_is_an_error_that_names_field_and_value(values, field, value):
    with pytest.raises(UserError) as error:
        read(values, **{field: value})
    assert "config.json" in str(error.value)
    assert field in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "rms_norm_eps", "max_position_embeddings"])
def test_missing_field_is_an_error_that_names_it(field):
    with pytest.raises(UserError, match=f"config.json: field '{field}' is missing"):
        read({k: v for k, v in SMOLLM2.items() if k != field})


# --------------------------------------------------------------------------------------------------- rotary embedding


def test_llama3_scaling_in_the_old_fields():
    config = read(SMOLLM2, rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE)
    assert (config.rope_theta, config.rope_scaling) == (500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))


def test_llama3_scaling_in_the_new_field():
    new = {**LLAMA3_ROPE, "rope_theta": 500_000.0}
    values = {k: v for k, v in SMOLLM2.items() if not k.startswith("rope")}
    assert read(values, rope_parameters=new) == read(SMOLLM2, rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE)


def test_the_oldest_spelling_of_the_rope_type():
    old = {"type" if k == "rope_type" else k: v for k, v in LLAMA3_ROPE.items()}
    assert read(SMOLLM2, rope_scaling=old) == read(SMOLLM2, rope_scaling=LLAMA3_ROPE)


def test_original_length_is_the_model_length_where_it_is_not_said():
    rope = {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}
    assert read(SMOLLM2, max_position_embeddings=1000, rope_scaling=rope).rope_scaling.original_max_position == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type is 'yarn', supported are default and llama3",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {**LLAMA3_ROPE, "attention_factor": 2.0}}, "attention_factor is 2.0"),
        ({"rope_scaling": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor' is missing"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is both 5.0 and 100000.0"),
        (
            {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {**LLAMA3_ROPE, "factor": 2.0}},
            "rope_parameters and rope_scaling disagree",
        ),
    ],
)
def test_rotary_fields_without_support_are_errors(changes, message):
    with pytest.raises(UserError) as error:
        read(SMOLLM2, **changes)
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------------- both directions


@st.composite
def configs(draw):
    name = draw(st.sampled_from(list(FAMILIES)))
    layers, kv_heads = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    positive = st.floats(1e-3, 1e6)
    config = ModelConfig(
        family=name,
        vocab_size=draw(st.integers(1, 1000)),
        d_model=draw(st.integers(1, 1000)),
        n_layers=layers,
        n_heads=kv_heads * draw(st.integers(1, 4)),
        n_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 64)),
        d_ff=draw(st.integers(1, 1000)),
        max_seq_len=draw(st.integers(1, 1000)),
        norm_eps=draw(positive),
        tie_embeddings=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        rope_theta=draw(positive),
        rope_scaling=draw(
            st.none()
            | st.builds(Llama3Scaling, positive, st.floats(1e-3, 1.0), st.floats(1.5, 1e6), st.integers(1, 1000))
        ),
    )  # fmt: skip
    if name == "llama":
        return config
    if name != "gemma2":
        number = draw(st.integers(1, 32))
        experts = Experts(
            number,
            draw(st.integers(1, number)),
            draw(st.integers(1, 1000)) if name == "qwen3_moe" else config.d_ff,
            normalise=name == "mixtral" or draw(st.booleans()),
            dense_layers=tuple(sorted(draw(st.sets(st.integers(0, layers - 1))))) if name == "qwen3_moe" else (),
            balance_loss=draw(st.just(0.0) | positive),
        )
        heads = {"d_model": config.head_dim * config.n_heads} if name == "olmoe" else {}
        norm = {"olmoe": "width", "qwen3_moe": "head", "mixtral": None}[name]
        return dataclasses.replace(config, experts=experts, qk_norm=norm, **heads)
    window = draw(st.integers(1, 1000))
    windows = tuple(draw(st.lists(st.sampled_from([window, None]), min_size=layers, max_size=layers)))
    scalar = draw(st.integers(1, 1000))
    return dataclasses.replace(
        config,
        windows=windows if any(windows) else (),
        attention_scale=None if scalar == config.head_dim else float(scalar) ** -0.5,
        attention_softcap=draw(st.none() | positive),
        logit_softcap=draw(st.none() | positive),
        post_norms=True,
        norm_offset=1.0,
        embed_scale=config.d_model**0.5,
    )


@given(configs())
def test_config_to_hf_is_the_inverse_of_config_from_hf(config):
    kind = FAMILIES[config.family]
    assert kind.config_from_hf(kind.config_to_hf(config), "config.json") == config


def test_gemma2_with_two_windows_cannot_be_written():
    config = dataclasses.replace(read(GEMMA2), windows=(8, 16) * 21)
    with pytest.raises(UserError, match=r"windows of \[8, 16\]"):
        FAMILIES["gemma2"].config_to_hf(config)
