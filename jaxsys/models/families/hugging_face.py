"""What the Hugging Face files of all families have in common: shared fields, rotary embedding, name tables.

transformers 5 writes ``rope_parameters`` and ``dtype`` where older versions write ``rope_theta``, ``rope_scaling`` and
``torch_dtype``. Both are read, and both are written, so that either reads our files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxsys.models.config import Activation, Experts, Llama3Scaling, ModelConfig
from jaxsys.models.families.fields import Fields
from parallelism.errors import UserError

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Says nothing of what the model computes: bookkeeping, token ids (the tokenizer's files have them), defaults of
# generation and of fresh initialisation, and switches of one implementation.
HARMLESS = {
    *("_name_or_path", "_attn_implementation_autoset", "transformers_version", "transformers.js_config"),
    *("is_llama_config", "unsloth_version", "unsloth_fixed", "id2label", "label2id", "return_dict"),
    *("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("initializer_range", "use_cache", "cache_implementation", "pretraining_tp"),
    *("router_aux_loss_coef",),  # where the load-balance loss is off
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "repetition_penalty"),
}

ATTENTION = {
    "attention.q.kernel": "self_attn.q_proj.weight",
    "attention.k.kernel": "self_attn.k_proj.weight",
    "attention.v.kernel": "self_attn.v_proj.weight",
    "attention.o.kernel": "self_attn.o_proj.weight",
}
MLP = {
    "mlp.gate.kernel": "mlp.gate_proj.weight",
    "mlp.up.kernel": "mlp.up_proj.weight",
    "mlp.down.kernel": "mlp.down_proj.weight",
}
EXPERTS = {
    "experts.router.kernel": "mlp.gate.weight",
    "experts.gate.kernel": "mlp.experts.{}.gate_proj.weight",
    "experts.up.kernel": "mlp.experts.{}.up_proj.weight",
    "experts.down.kernel": "mlp.experts.{}.down_proj.weight",
}
"""Of a layer with experts: {} is the number of the expert, each of which has a tensor of its own."""

EMBED, HEAD = "embed.kernel", "head.kernel"
HF_EMBED, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_names(
    config: ModelConfig, norms: Mapping[str, str], experts: Mapping[str, str] = EXPERTS
) -> dict[str, str | tuple[str, ...]]:
    """Logical name -> tensor name, or one for each expert; ``norms`` are a layer's, by the name inside the layer, and
    ``experts`` those of a layer that has some."""
    names: dict[str, str | tuple[str, ...]] = {EMBED: HF_EMBED, "norm.scale": "model.norm.weight"}
    for i in range(config.n_layers):
        e = config.experts_of(i)
        for ours, theirs in {**ATTENTION, **(MLP if e is None else experts), **norms}.items():
            name = f"model.layers.{i}.{theirs}"
            several = e is not None and "{}" in name
            names[f"layers.{i}.{ours}"] = tuple(map(name.format, range(e.number))) if e and several else name
    return names if config.tie_embeddings else {**names, HEAD: HF_HEAD}


def take_balance_loss(fields: Fields) -> float:
    """transformers adds its load-balance loss only where it gives out the router's logits."""
    if not fields.take("output_router_logits", bool, False):
        return 0.0
    return fields.take("router_aux_loss_coef", float)


def balance_loss_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of ``take_balance_loss``."""
    assert config.experts is not None
    if not config.experts.balance_loss:
        return {"output_router_logits": False}
    return {"output_router_logits": True, "router_aux_loss_coef": config.experts.balance_loss}


def experts_of(config: ModelConfig, family: str) -> Experts:
    """The experts of a model that is to be written as one of a family that has no others."""
    if config.experts is None:
        raise UserError(f"a {family} config.json cannot express a model without experts")
    return config.experts


def take_shape(fields: Fields, rope_theta: float = 10_000.0) -> dict[str, Any]:
    """The arguments of ModelConfig that all families name alike; head_dim is the family's, and so is the default of
    rope_theta."""
    heads = fields.take("num_attention_heads", int)
    max_seq_len = fields.take("max_position_embeddings", int)
    theta, scaling = _take_rope(fields, max_seq_len, rope_theta)
    return {
        "vocab_size": fields.take("vocab_size", int),
        "d_model": fields.take("hidden_size", int),
        "n_layers": fields.take("num_hidden_layers", int),
        "n_heads": heads,
        "n_kv_heads": fields.take("num_key_value_heads", int, heads),
        "d_ff": fields.take("intermediate_size", int),
        "max_seq_len": max_seq_len,
        "norm_eps": fields.take("rms_norm_eps", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def take_activation(fields: Fields, name: str) -> Activation:
    """The activation that the field ``name`` says, by our name."""
    theirs = fields.take(name, str)
    if theirs not in ACTIVATIONS:
        raise UserError(f"{fields.where}: {name} is {theirs!r}, supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def activation_to_hf(config: ModelConfig) -> str:
    """The inverse of ``take_activation``."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)


def shape_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of ``take_shape``, and the fields that hold for every model here."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    }


def _take_rope(fields: Fields, max_seq_len: int, default: float) -> tuple[float, Llama3Scaling | None]:
    """rope_theta and scaling, from the old fields, the new one, or both where they agree."""
    new, old = fields.take("rope_parameters", dict, {}), fields.take("rope_scaling", dict, {})
    theta = fields.take("rope_theta", float, None)
    told: dict[str, Any] = {}
    for values in (new, old):
        values = {"rope_type": values["type"], **values} if "type" in values else dict(values)
        inner = Fields({"rope_theta": values.pop("rope_theta", None)}, fields.where).take("rope_theta", float, None)
        if inner is not None and theta is not None and inner != theta:
            raise UserError(f"{fields.where}: rope_theta is both {inner} and {theta}; remove the wrong one")
        theta = inner if inner is not None else theta
        values.pop("type", None)
        if told and values and told != values:
            raise UserError(f"{fields.where}: rope_parameters and rope_scaling disagree; remove the wrong one")
        told = told or values
    theta = default if theta is None else theta
    rope = Fields(told, f"{fields.where}: rope_parameters")
    kind = rope.take("rope_type", str, "default")
    if kind not in ("default", "llama3"):
        raise UserError(f"{fields.where}: rope_type is {kind!r}, supported are default and llama3")
    rope.expect("partial_rotary_factor", 1.0)
    scaling = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=rope.take("factor", float),
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
            original_max_position=rope.take("original_max_position_embeddings", int, max_seq_len),
        )
    rope.finish()
    return theta, scaling
