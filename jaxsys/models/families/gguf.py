"""What the GGUF files of all families have in common: metadata fields and name tables.

Keys and names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoint.formats.gguf import GGUFHeader
from jaxsys.models.config import ModelConfig
from jaxsys.models.families.fields import Fields
from jaxsys.models.families.hugging_face import EMBED, HEAD
from parallelism.errors import UserError

GGUF_EMBED, GGUF_HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

ATTENTION_AND_MLP = {
    "attention.q.kernel": "attn_q.weight",
    "attention.k.kernel": "attn_k.weight",
    "attention.v.kernel": "attn_v.weight",
    "attention.o.kernel": "attn_output.weight",
    "mlp.gate.kernel": "ffn_gate.weight",
    "mlp.up.kernel": "ffn_up.weight",
    "mlp.down.kernel": "ffn_down.weight",
}


def gguf_names(config: ModelConfig, norms: Mapping[str, str]) -> dict[str, str]:
    """Logical name -> tensor name; ``norms`` are a layer's, by the name inside the layer."""
    names = {EMBED: GGUF_EMBED, "norm.scale": "output_norm.weight"}
    for i in range(config.n_layers):
        for ours, theirs in {**ATTENTION_AND_MLP, **norms}.items():
            names[f"layers.{i}.{ours}"] = f"blk.{i}.{theirs}"
    return names if config.tie_embeddings else {**names, HEAD: GGUF_HEAD}


def architecture_fields(file: GGUFHeader, architecture: str) -> Fields:
    """The metadata that describes the architecture, without its prefix."""
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    return Fields(values, f"{file.path}: {architecture}")


def take_shape(fields: Fields, file: GGUFHeader) -> dict[str, Any]:
    """The arguments of ModelConfig that all families name alike.

    Vocabulary size and tying are read off the tensors: old files have no key for the first, none has for the second.
    """
    if GGUF_EMBED not in file.tensors:
        raise UserError(f"{file.path}: the weight {GGUF_EMBED} is missing; fetch the file again")
    vocab_size = file.tensors[GGUF_EMBED].shape[0]
    fields.expect("vocab_size", vocab_size)
    d_model, heads = fields.take("embedding_length", int), fields.take("attention.head_count", int)
    head_dim = fields.take("attention.key_length", int, d_model // heads)
    fields.expect("attention.value_length", head_dim)
    fields.expect("rope.dimension_count", head_dim)
    fields.expect("rope.scaling.type", "none")
    fields.expect("attention.causal", True)
    fields.expect("expert_count", 0)
    fields.expect("expert_used_count", 0)
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_layers": fields.take("block_count", int),
        "n_heads": heads,
        "n_kv_heads": fields.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "d_ff": fields.take("feed_forward_length", int),
        "max_seq_len": fields.take("context_length", int),
        "norm_eps": decimal(fields.take("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": decimal(fields.take("rope.freq_base", float, 10_000.0)),
        "tie_embeddings": GGUF_HEAD not in file.tensors,
    }


def shape_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of ``take_shape``."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }


def decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05 for the 9.99999975e-06 that the file holds."""
    return float(str(np.float32(value)))
