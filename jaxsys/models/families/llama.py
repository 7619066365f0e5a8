"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), and SmolLM2, which is a Llama with tied embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoint.formats.gguf import GGUFHeader
from jaxsys.models.config import Llama3Scaling, ModelConfig
from jaxsys.models.families import gguf, hugging_face
from jaxsys.models.families.fields import Fields
from jaxsys.models.rope import frequencies

ARCHITECTURE = "LlamaForCausalLM"
NORMS = {"attention_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight"}
GGUF_NORMS = {"attention_norm.scale": "attn_norm.weight", "mlp_norm.scale": "ffn_norm.weight"}


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    fields = Fields(values, where)
    fields.expect("model_type", "llama")
    fields.expect("architectures", [ARCHITECTURE])
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("rope_interleaved", False)
    shape = hugging_face.take_shape(fields)
    config = ModelConfig(
        family="llama",
        **shape,
        head_dim=fields.take("head_dim", int, shape["d_model"] // shape["n_heads"]),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        activation=hugging_face.take_activation(fields, "hidden_act"),
    )
    fields.finish(hugging_face.HARMLESS)
    return config


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": hugging_face.activation_to_hf(config),
        "mlp_bias": False,
        **hugging_face.shape_to_hf(config),
    }


def weight_names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    return hugging_face.weight_names(config, NORMS)


def redundant_weights(config: ModelConfig) -> dict[str, str | np.ndarray]:
    # Conversions of the first Llamas saved each layer's rotary frequencies as a buffer.
    unscaled = frequencies(dataclasses.replace(config, rope_scaling=None))
    values: dict[str, str | np.ndarray] = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": unscaled for i in range(config.n_layers)
    }
    return {**values, hugging_face.HF_HEAD: hugging_face.EMBED} if config.tie_embeddings else values


def config_from_gguf(file: GGUFHeader) -> ModelConfig:
    fields = gguf.architecture_fields(file, "llama")
    config = ModelConfig(family="llama", **gguf.take_shape(fields, file))
    fields.finish()
    if gguf.ROPE_FACTORS in file.tensors:
        # The file keeps what each frequency is divided by instead of the scaling's parameters. The largest is
        # the factor; the others are assumed to be as in Llama 3.1, which redundant_gguf then checks.
        factor = float(file.read(gguf.ROPE_FACTORS).max())
        config = dataclasses.replace(config, rope_scaling=Llama3Scaling(factor))
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    return gguf.shape_to_gguf(config)


def gguf_names(config: ModelConfig) -> dict[str, str]:
    return gguf.gguf_names(config, GGUF_NORMS)


def redundant_gguf(config: ModelConfig) -> dict[str, str | np.ndarray]:
    if config.rope_scaling is None:
        return {}
    return {gguf.ROPE_FACTORS: frequencies(dataclasses.replace(config, rope_scaling=None)) / frequencies(config)}


def undo_gguf(config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    if not name.endswith(("attention.q.kernel", "attention.k.kernel")):
        return array
    # llama.cpp rotates neighbouring rows (0, 1), the model here rows (0, h/2): its converter interleaved the halves.
    rows, width = array.shape
    pairs = array.reshape(rows // config.head_dim, config.head_dim // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def to_gguf(config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    if not name.endswith(("attention.q.kernel", "attention.k.kernel")):
        return array
    rows, width = array.shape
    halves = array.reshape(rows // config.head_dim, 2, config.head_dim // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)
