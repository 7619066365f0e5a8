"""Writes tests/goldens: what transformers computes, so that ordinary tests need no torch (extra ``parity``).

python scripts/goldens.py                            tiny random models with their logits
python scripts/goldens.py --smollm2 MODEL.gguf       greedy continuations of SmolLM2 (a minute)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
PROMPT_TOKENS = 48
NEW_TOKENS = 48

SHAPE = {"vocab_size": 128, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {
    # Head size 16 at theta 10000 has wavelengths 6 to 20000: with 64 original positions these are kept (below 16),
    # blended (16 to 64) and divided (above).
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY: dict[str, tuple[type, dict[str, Any]]] = {
    "llama2": (
        transformers.LlamaConfig,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "llama3": (
        transformers.LlamaConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": LLAMA3_ROPE,
            "rms_norm_eps": 1e-5,
        },
    ),
    "smollm2": (
        transformers.LlamaConfig,
        {
            "hidden_size": 72,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "rms_norm_eps": 1e-5,
        },
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
}
"""Tiny configurations: name -> class and what differs from its defaults and SHAPE."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "In 1969, the first people",
    "To bake a loaf of bread, you need",
    "List of planets in the solar system:\n1.",
    "The difference between weather and climate is",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
)


def tiny_model(name: str, seed: int) -> Any:
    """A random transformers model in float32 whose norms and soft caps matter: large weights, norms off their start."""
    kind, options = TINY[name]
    torch.manual_seed(seed)
    config = kind(**SHAPE, **options, initializer_range=0.2, dtype="float32", attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def prompt(seed: int) -> np.ndarray:
    """[PROMPT_TOKENS] random int32 token ids."""
    return np.random.default_rng(seed).integers(3, SHAPE["vocab_size"], PROMPT_TOKENS).astype(np.int32)


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """tokens [T] to float32 logits [T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().numpy()


def model_from_gguf(path: Path) -> Any:
    """The transformers model, in float32, on the weights that transformers reads and dequantises (no accelerate)."""
    config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, dtype="float32")
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    if missing != ["lm_head.weight"] * config.tie_word_embeddings or unexpected:
        raise SystemExit(f"{path}: transformers misses {missing} and does not know {unexpected}")
    model.tie_weights()
    return model


def write_tiny(directory: Path) -> None:
    for seed, name in enumerate(TINY):
        shutil.rmtree(directory / name, ignore_errors=True)
        model, tokens = tiny_model(name, seed), prompt(seed)
        model.save_pretrained(directory / name)
        (directory / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(directory / name / "logits.npz", tokens=tokens, logits=logits(model, tokens))
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")


def write_smollm2(gguf: Path, path: Path) -> None:
    """Greedy continuations by transformers, which dequantises the file itself, in float32."""
    where, file = str(gguf.parent), gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = model_from_gguf(gguf)
    rows = []
    for text in PROMPTS:
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        # A continuation goes on after an end-of-text token: the test is of the model, not of stopping.
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            # Without a mask, generate takes the chat prompt's <|im_end|>, which is also the padding token, for padding.
            options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW_TOKENS, "do_sample": False}
            whole = model.generate(tokens, **options)
            top = model(whole).logits[0, tokens.shape[1] - 1 : -1].topk(2)
        new = whole[0, tokens.shape[1] :].tolist()
        if new != top.indices[:, 0].tolist():
            raise SystemExit(f"{text!r}: transformers' cached decode and its whole forward pass disagree")
        margin = float((top.values[:, 0] - top.values[:, 1]).min())
        row = {"prompt": text, "prompt_tokens": tokens[0].tolist(), "tokens": new, "smallest_margin": round(margin, 4)}
        rows.append(row)
        print(f"{margin:.4f} {text!r} -> {tokenizer.decode(new)!r}", flush=True)
    made = {"file": file, "transformers": transformers.__version__, "dtype": "float32"}
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"made": {json.dumps(made)}, "continuations": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="MODEL.gguf")
    arguments = parser.parse_args()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    if arguments.smollm2:
        write_smollm2(arguments.smollm2, GOLDENS / "smollm2_greedy.json")
    else:
        write_tiny(GOLDENS)


if __name__ == "__main__":
    main()
