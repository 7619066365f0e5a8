"""Mixtral (arXiv:2401.04088): every feed-forward layer is a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsys.models.config import Experts, ModelConfig
from jaxsys.models.families import hugging_face
from jaxsys.models.families.fields import Fields
from parallelism.errors import UserError

ARCHITECTURE = "MixtralForCausalLM"
NORMS = {"attention_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight"}
EXPERTS = {
    "experts.router.kernel": "block_sparse_moe.gate.weight",
    "experts.gate.kernel": "block_sparse_moe.experts.{}.w1.weight",
    "experts.up.kernel": "block_sparse_moe.experts.{}.w3.weight",
    "experts.down.kernel": "block_sparse_moe.experts.{}.w2.weight",
}


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    fields = Fields(values, where)
    fields.expect("model_type", "mixtral")
    fields.expect("architectures", [ARCHITECTURE])
    fields.expect("attention_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("router_jitter_noise", 0.0)
    shape = hugging_face.take_shape(fields, rope_theta=1e6)
    window = fields.take("sliding_window", int, None)
    config = ModelConfig(
        family="mixtral",
        **shape,
        head_dim=fields.take("head_dim", int, shape["d_model"] // shape["n_heads"]),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        activation=hugging_face.take_activation(fields, "hidden_act"),
        windows=() if window is None else (window,) * shape["n_layers"],
        experts=Experts(
            number=fields.take("num_local_experts", int, 8),
            per_token=fields.take("num_experts_per_tok", int, 2),
            width=shape["d_ff"],
            balance_loss=hugging_face.take_balance_loss(fields),
        ),
    )
    fields.finish(hugging_face.HARMLESS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    e = hugging_face.experts_of(config, "mixtral")
    windows = set(config.windows) or {None}
    if len(windows) > 1:
        raise UserError(
            f"a mixtral config.json cannot express windows of {sorted(map(str, windows))}: give all layers one"
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "mixtral",
        "hidden_act": hugging_face.activation_to_hf(config),
        "sliding_window": windows.pop(),
        "num_local_experts": e.number,
        "num_experts_per_tok": e.per_token,
        "router_jitter_noise": 0.0,
        **hugging_face.balance_loss_to_hf(config),
        **hugging_face.shape_to_hf(config),
        "intermediate_size": e.width,
    }


def weight_names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    return hugging_face.weight_names(config, NORMS, EXPERTS)


def redundant_weights(config: ModelConfig) -> dict[str, str | np.ndarray]:
    return {hugging_face.HF_HEAD: hugging_face.EMBED} if config.tie_embeddings else {}
