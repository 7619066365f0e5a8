"""OLMoE (arXiv:2409.02060): mixtures of many small experts, and queries and keys normalised over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsys.models.config import Experts, ModelConfig
from jaxsys.models.families import hugging_face
from jaxsys.models.families.fields import Fields

ARCHITECTURE = "OlmoeForCausalLM"
NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
}


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    fields = Fields(values, where)
    fields.expect("model_type", "olmoe")
    fields.expect("architectures", [ARCHITECTURE])
    fields.expect("attention_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("clip_qkv", None)
    shape = hugging_face.take_shape(fields)
    head_dim = shape["d_model"] // shape["n_heads"]
    fields.expect("head_dim", head_dim)
    config = ModelConfig(
        family="olmoe",
        **shape,
        head_dim=head_dim,
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        activation=hugging_face.take_activation(fields, "hidden_act"),
        qk_norm="width",
        experts=Experts(
            number=fields.take("num_experts", int, 64),
            per_token=fields.take("num_experts_per_tok", int, 8),
            width=shape["d_ff"],
            normalise=fields.take("norm_topk_prob", bool, False),
            balance_loss=hugging_face.take_balance_loss(fields),
        ),
    )
    fields.finish(hugging_face.HARMLESS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    e = hugging_face.experts_of(config, "olmoe")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "olmoe",
        "hidden_act": hugging_face.activation_to_hf(config),
        "clip_qkv": None,
        "num_experts": e.number,
        "num_experts_per_tok": e.per_token,
        "norm_topk_prob": e.normalise,
        **hugging_face.balance_loss_to_hf(config),
        **hugging_face.shape_to_hf(config),
        "intermediate_size": e.width,
    }


def weight_names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    return hugging_face.weight_names(config, NORMS)


def redundant_weights(config: ModelConfig) -> dict[str, str | np.ndarray]:
    return {hugging_face.HF_HEAD: hugging_face.EMBED} if config.tie_embeddings else {}
