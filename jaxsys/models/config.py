"""What a decoder transformer is, as data: no family has code of its own beyond these fields."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np

from jaxsys.configuration import BadValue, expect, expect_at_least, expect_positive

Activation = Literal["silu", "gelu_tanh"]

MAX_LAYERS = 10_000  # beyond any model: a damaged file may say 10**9, and every layer costs names and descriptions


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """RoPE frequencies stretched by wavelength (Llama 3.1 model card; ``rope_type: llama3``)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        expect_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position")
        if self.high_freq_factor <= self.low_freq_factor:
            raise BadValue(
                "high_freq_factor", self.high_freq_factor, f"more than low_freq_factor={self.low_freq_factor}"
            )


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
    activation: Activation = "silu"
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0

    def __post_init__(self) -> None:
        from jaxsys.models.families import FAMILIES  # the families make configurations: they import this module

        expect(self, " or ".join(FAMILIES), lambda name: name in FAMILIES, "family")
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
        expect_at_least(self, 1, *sizes)
        expect(self, f"at most {MAX_LAYERS}", lambda n: n <= MAX_LAYERS, "n_layers")
        expect(self, "an even number (rotary embedding turns pairs)", lambda n: n % 2 == 0, "head_dim")
        expect(self, f"a multiple of n_kv_heads={self.n_kv_heads}", lambda n: n % self.n_kv_heads == 0, "n_heads")
        expect_positive(self, "norm_eps", "rope_theta", "attention_scale", "attention_softcap", "logit_softcap")
        expect_positive(self, "embed_scale")
        expect(self, "a finite number", lambda _: True, "norm_offset")
        expect(self, " or ".join(get_args(Activation)), lambda name: name in get_args(Activation), "activation")
        expect(self, f"none, or one for each of n_layers={self.n_layers}", self._one_a_layer, "windows")
        expect(self, "windows of at least 1", lambda windows: all(w is None or w >= 1 for w in windows), "windows")

    def _one_a_layer(self, values: tuple) -> bool:
        return len(values) in (0, self.n_layers)

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

    def flops_per_token(self, contexts: np.ndarray) -> float:
        """Floating-point operations of one forward and backward pass, a token on average.

        contexts: for each token the keys it attends to where no window cuts them, itself included. The masked half of
        a row is not work (so this is half the attention term of PaLM, appendix B).
        """
        windows = self.windows or (None,) * self.n_layers
        keys = sum(float(np.mean(contexts if w is None else np.minimum(contexts, w))) for w in windows)
        return 6.0 * self.matmul_parameters() + 12.0 * self.n_heads * self.head_dim * keys
