"""Gemma 2 (arXiv:2408.00118): local and global attention in turn, soft caps, a norm on both sides of each part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoint.formats.gguf import GGUFHeader
from jaxsys.models.config import ModelConfig
from jaxsys.models.families import gguf, hugging_face
from jaxsys.models.families.fields import Fields
from parallelism.errors import UserError

ARCHITECTURE = "Gemma2ForCausalLM"
NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention_post_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}
GGUF_NORMS = {
    "attention_norm.scale": "attn_norm.weight",
    "attention_post_norm.scale": "post_attention_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "mlp_post_norm.scale": "post_ffw_norm.weight",
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def config_from_hf(values: Mapping[str, Any], where: str) -> ModelConfig:
    fields = Fields(values, where)
    fields.expect("model_type", "gemma2")
    fields.expect("architectures", [ARCHITECTURE])
    fields.expect("attention_bias", False)
    fields.expect("attention_dropout", 0.0)
    fields.expect("use_bidirectional_attention", False)
    activation = hugging_face.take_activation(fields, "hidden_activation")
    fields.expect("hidden_act", values["hidden_activation"])  # written beside it by older versions, read by none
    shape = hugging_face.take_shape(fields)
    config = ModelConfig(
        family="gemma2",
        **shape,
        **_constants(shape["d_model"]),
        head_dim=(head_dim := fields.take("head_dim", int)),
        attention_scale=_scale(fields.take("query_pre_attn_scalar", float), head_dim),
        attention_softcap=_take_cap(fields, values, "attn_logit_softcapping", 50.0),
        logit_softcap=_take_cap(fields, values, "final_logit_softcapping", 30.0),
        tie_embeddings=fields.take("tie_word_embeddings", bool, True),
        activation=activation,
    )
    kinds = fields.take("layer_types", list, [GLOBAL if i % 2 else LOCAL for i in range(config.n_layers)])
    if len(kinds) != config.n_layers or not all(kind in (LOCAL, GLOBAL) for kind in kinds):
        raise UserError(f"{where}: layer_types is {kinds!r}, expected {config.n_layers} of {LOCAL!r} and {GLOBAL!r}")
    window = fields.take("sliding_window", int, None)
    if window is None and LOCAL in kinds:
        raise UserError(f"{where}: field 'sliding_window' is missing; fetch the file again")
    fields.finish(hugging_face.HARMLESS)
    windows = tuple(window if kind == LOCAL else None for kind in kinds) if LOCAL in kinds else ()
    return dataclasses.replace(config, windows=windows)


def _take_cap(fields: Fields, values: Mapping[str, Any], name: str, default: float) -> float | None:
    """null is no cap; a field that is not there is transformers' default."""
    return fields.take(name, float, None if name in values else default)


def _constants(d_model: int) -> dict[str, Any]:
    """What no file says. transformers rounds the embedding's factor to the weights' dtype, and so does the decoder."""
    return {"post_norms": True, "norm_offset": 1.0, "embed_scale": math.sqrt(d_model)}


def _scale(scalar: float, head_dim: int) -> float | None:
    return None if scalar == head_dim else scalar**-0.5


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    windows = {w for w in config.windows if w is not None}
    if len(windows) > 1:
        raise UserError(f"windows of {sorted(windows)} in one model: a gemma2 config.json holds one sliding_window")
    activation = hugging_face.activation_to_hf(config)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "gemma2",
        "hidden_act": activation,
        "hidden_activation": activation,
        "query_pre_attn_scalar": round(config.scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": next(iter(windows), None),
        "layer_types": [GLOBAL if config.window(i) is None else LOCAL for i in range(config.n_layers)],
        "use_bidirectional_attention": None,
        **hugging_face.shape_to_hf(config),
    }


def weight_names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    return hugging_face.weight_names(config, NORMS)


def redundant_weights(config: ModelConfig) -> dict[str, str | np.ndarray]:
    return {hugging_face.HF_HEAD: hugging_face.EMBED} if config.tie_embeddings else {}


def config_from_gguf(file: GGUFHeader) -> ModelConfig:
    fields = gguf.architecture_fields(file, "gemma2")
    shape = gguf.take_shape(fields, file)
    window = fields.take("attention.sliding_window", int)
    # The file has no query_pre_attn_scalar; the 27B model, of 46 layers, is the one where it is not head_dim.
    scalar = shape["d_model"] / shape["n_heads"] if shape["n_layers"] == 46 else shape["head_dim"]
    config = ModelConfig(
        family="gemma2",
        **shape,
        **_constants(shape["d_model"]),
        attention_scale=_scale(scalar, shape["head_dim"]),
        attention_softcap=gguf.decimal(fields.take("attn_logit_softcapping", float)),
        logit_softcap=gguf.decimal(fields.take("final_logit_softcapping", float)),
        activation="gelu_tanh",
    )
    fields.finish()
    return dataclasses.replace(config, windows=tuple(None if i % 2 else window for i in range(config.n_layers)))


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    named = {
        "attention.sliding_window": next((w for w in config.windows if w is not None), None),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    # What is not there is found missing when the metadata is read again.
    return {**gguf.shape_to_gguf(config), **{name: value for name, value in named.items() if value is not None}}


def gguf_names(config: ModelConfig) -> dict[str, str]:
    return gguf.gguf_names(config, GGUF_NORMS)


def redundant_gguf(config: ModelConfig) -> dict[str, str | np.ndarray]:
    return {}


def undo_gguf(config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    # The converter adds the offset to every norm.
    return array - np.float32(config.norm_offset) if name.endswith("norm.scale") else array


def to_gguf(config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    return array + array.dtype.type(config.norm_offset) if name.endswith("norm.scale") else array
