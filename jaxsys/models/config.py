"""What a decoder transformer is, as data: no family has code of its own beyond these fields."""

from __future__ import annotations

import dataclasses
import math

MAX_LAYERS = 10_000  # beyond any model: a damaged file may say 10**9, and every layer costs names and descriptions


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """RoPE frequencies stretched by wavelength (Llama 3.1 model card; ``rope_type: llama3``)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder transformer.

    windows: one entry a layer, the number of positions a token sees (itself included); None sees all.
        An empty tuple means that every layer sees all.
    attention_scale: what scores are multiplied by; None is head_dim ** -0.5.
    attention_softcap, logit_softcap: c * tanh(x / c) on scores or logits (Gemma 2, section 2).
    norm_offset: RMSNorm multiplies by (offset + scale); Gemma stores scale - 1.
    post_norms: a second RMSNorm after attention and after the MLP, before the residual sum (Gemma 2).
    embed_scale: token embeddings are multiplied by it.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    activation: str = "silu"
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0

    def __post_init__(self):
        if self.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers: found {self.n_layers}, expected at most {MAX_LAYERS}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} query heads do not group over {self.n_kv_heads} key/value heads")
        if self.windows and len(self.windows) != self.n_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.n_layers} layers")

    @property
    def query_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: all kernels and the output projection, no embedding lookup."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.d_model * self.d_ff) + self.vocab_size * self.d_model

    def flops_per_token(self, mean_context: float) -> float:
        """Floating-point operations of one forward and backward pass, a token.

        mean_context: keys a token attends to on average, T/2 for causal rows of length T: the masked half
        is not work (so this is half the attention term of PaLM, appendix B).
        """
        windows = self.windows or (None,) * self.n_layers
        keys = sum(min(mean_context, w if w else math.inf) for w in windows)
        return 6.0 * self.matmul_parameters() + 12.0 * self.n_heads * self.head_dim * keys
