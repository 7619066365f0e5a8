"""The models that the benchmarks measure, here and in torch."""

from __future__ import annotations

from typing import Any

from jaxsys.models.config import ModelConfig

MODELS = {
    "llama-25m": ModelConfig(
        "llama",
        vocab_size=8192,
        d_model=384,
        n_layers=8,
        n_heads=6,
        n_kv_heads=6,
        head_dim=64,
        d_ff=1536,
        max_seq_len=1024,
    ),
    "smollm2-135m": ModelConfig(
        "llama",
        vocab_size=49152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_seq_len=2048,
        rope_theta=100_000.0,
        tie_embeddings=True,
    ),
}


def torch_model(config: ModelConfig, seed: int = 0) -> Any:
    """The same architecture in transformers, random weights, or None where torch or transformers is missing."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
        )
    )
