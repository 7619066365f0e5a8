"""The models that the benchmarks measure, here and in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxsys.models.config import ModelConfig
from jaxsys.models.pretrained import export_hf
from jaxsys.models.state import build
from jaxsys.tokenizer import Tokenizer

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
    "llama-125m": ModelConfig(
        "llama",
        vocab_size=32000,
        d_model=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=4,
        head_dim=64,
        d_ff=2048,
        max_seq_len=2048,
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


def write_random(config: ModelConfig, directory: Path) -> None:
    """A Hugging Face directory with random weights, the same each time, and a tokenizer of bytes."""
    random = np.random.default_rng(0)
    logical = build(config, dtype="float32", storage="listed").layout.logical
    arrays = (
        (name, np.ones(a.shape, np.float32) if "norm" in a.axes else random.normal(0, 0.02, a.shape).astype(np.float32))
        for name, a in logical.items()
    )
    export_hf(directory, config, arrays, dtype="float32", token_ids={}, save_tokenizer=byte_tokenizer().save)


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(backend)


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
