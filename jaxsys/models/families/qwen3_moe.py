"""Qwen3-MoE (arXiv:2505.09388): mixtures of many small experts, and each head's queries and keys normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsys.models.config import Experts, ModelConfig
from jaxsys.models.families import hugging_face
from jaxsys.models.families.fields import Fields
from parallelism.errors import UserError

ARCHITECTURE = "Qwen3MoeForCausalLM"
NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
}
# Read only where use_sliding_window is set, which is not supported.
WINDOW = ("sliding_window", "max_window_layers")


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    fields = Fields(values, where)
    fields.expect("model_type", "qwen3_moe")
    fields.expect("architectures", [ARCHITECTURE])
    fields.expect("attention_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("use_sliding_window", False)
    shape = hugging_face.take_shape(fields)
    layers, number = shape["n_layers"], _take_number(fields, values)
    step, dense = fields.take("decoder_sparse_step", int, 1), fields.take("mlp_only_layers", list, [])
    if not all(type(i) is int and 0 <= i < layers for i in dense):
        raise UserError(f"{where}: mlp_only_layers is {dense!r}, expected numbers of the {layers} layers")
    config = ModelConfig(
        family="qwen3_moe",
        **shape,
        head_dim=fields.take("head_dim", int, shape["d_model"] // shape["n_heads"]),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        activation=hugging_face.take_activation(fields, "hidden_act"),
        qk_norm="head",
        experts=Experts(
            number=number,
            per_token=fields.take("num_experts_per_tok", int, 8),
            width=fields.take("moe_intermediate_size", int, 768),
            normalise=fields.take("norm_topk_prob", bool, False),
            dense_layers=tuple(i for i in range(layers) if i in dense or (i + 1) % step),
            balance_loss=hugging_face.take_balance_loss(fields),
        ),
    )
    fields.finish((*hugging_face.HARMLESS, *WINDOW))
    return config


def _take_number(fields: Fields, values: Mapping[str, Any]) -> int:
    """Newer versions of transformers write it under another name, or both."""
    number = fields.take("num_experts", int, values.get("num_local_experts", 128))
    fields.expect("num_local_experts", number)
    return number


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    e = hugging_face.experts_of(config, "qwen3_moe")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3_moe",
        "hidden_act": hugging_face.activation_to_hf(config),
        "use_sliding_window": False,
        "sliding_window": None,
        "num_experts": e.number,
        "num_experts_per_tok": e.per_token,
        "moe_intermediate_size": e.width,
        "norm_topk_prob": e.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(e.dense_layers),
        **hugging_face.balance_loss_to_hf(config),
        **hugging_face.shape_to_hf(config),
    }


def weight_names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    return hugging_face.weight_names(config, NORMS)


def redundant_weights(config: ModelConfig) -> dict[str, str | np.ndarray]:
    return {hugging_face.HF_HEAD: hugging_face.EMBED} if config.tie_embeddings else {}
