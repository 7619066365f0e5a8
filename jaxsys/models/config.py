"""What a decoder transformer is, as data: no family has code of its own beyond these fields."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np

from jaxsys.configuration import BadValue, expect, expect_at_least, expect_positive

Activation = Literal["silu", "gelu_tanh"]
Routing = Literal["softmax", "sigmoid"]
QKNorm = Literal["head", "width"]

# Beyond any model: a damaged file may say 10**9, and every layer and expert costs names and descriptions.
MAX_LAYERS = 10_000
MAX_LAYER_EXPERTS = 200_000


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
class Experts:
    """Mixture-of-experts feed-forward layers: each token goes to ``per_token`` of ``number`` gated linear units.

    width: feed-forward width of one expert. shared_width: of one more that every token goes through (DeepSeekMoE, Dai
      et al. 2024); 0 for none.
    routing: scores of the experts are the softmax or the sigmoid of the router's logits; the highest are chosen.
    normalise: the weights of the chosen are divided by their sum. scale: and multiplied by this.
    dense_layers: layers that have an ordinary MLP of width ``d_ff`` instead.

    What follows is of training alone; files of models do not have it, and serving drops nothing.
    capacity_factor: an expert takes so many times its even share of a row's tokens and drops the rest; None drops none.
    balance_loss: coefficient of the load-balance loss E * sum_i f_i P_i, with the fraction of tokens f_i that go to
      expert i and its mean probability P_i over the whole batch, mean over layers (Fedus et al. 2021, section 2.2; f
      sums to ``per_token``, which is the loss of an even load).
    z_loss: coefficient of the mean over tokens and layers of the squared log-sum-exp of the router's logits (Zoph et
      al. 2022, section 3.3).
    """

    number: int
    per_token: int
    width: int
    routing: Routing = "softmax"
    normalise: bool = True
    scale: float = 1.0
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()
    capacity_factor: float | None = None
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "number", "per_token", "width")
        expect(self, f"at most number={self.number}", lambda n: n <= self.number, "per_token")
        expect(self, " or ".join(get_args(Routing)), lambda name: name in get_args(Routing), "routing")
        expect_positive(self, "scale", "capacity_factor")
        expect_at_least(self, 0, "shared_width", "balance_loss", "z_loss")
        expect(
            self,
            "layers in rising order",
            lambda l: list(l) == sorted(set(l)) and min(l, default=0) >= 0,
            "dense_layers",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder transformer.

    d_ff: feed-forward width of the layers that have no experts.

    windows: one entry a layer, the number of positions a token sees (itself included); None sees all.
        An empty tuple means that every layer sees all.
    attention_scale: what scores are multiplied by; None is head_dim ** -0.5.
    attention_softcap, logit_softcap: c * tanh(x / c) on scores or logits (Gemma 2, section 2).
    norm_offset: RMSNorm multiplies by (offset + scale); Gemma stores scale - 1.
    post_norms: a second RMSNorm after attention and after the MLP, before the residual sum (Gemma 2).
    embed_scale: token embeddings are multiplied by it.
    qk_norm: queries and keys are normalised before rotation: each head by itself (Qwen3), or all together (OLMoE).
    experts: the feed-forward layers are mixtures of experts.
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
    qk_norm: QKNorm | None = None
    experts: Experts | None = None

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
        expect(self, " or ".join(get_args(QKNorm)), lambda name: name in get_args(QKNorm), "qk_norm")
        if (e := self.experts) is not None:
            if e.number * self.n_layers > MAX_LAYER_EXPERTS:
                raise BadValue("experts.number", e.number, f"at most {MAX_LAYER_EXPERTS} experts in all layers")
            if max(e.dense_layers, default=0) >= self.n_layers:
                raise BadValue("experts.dense_layers", e.dense_layers, f"layers below n_layers={self.n_layers}")

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

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of a layer; None where it has an ordinary MLP."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    @property
    def inference(self) -> ModelConfig:
        """Without what only training reads, and a ``d_ff`` that no layer has: what files of a model can say."""
        if self.experts is None:
            return self
        plain = dataclasses.replace(self.experts, capacity_factor=None, balance_loss=0.0, z_loss=0.0)
        dense = any(self.experts_of(layer) is None for layer in range(self.n_layers))
        return dataclasses.replace(self, experts=plain, d_ff=self.d_ff if dense else plain.width)

    def matmul_parameters(self) -> int:
        """Parameters that multiply every token: all kernels (of a layer's experts as many as a token goes to) and the
        output projection, no embedding lookup."""
        D = self.d_model
        total = self.n_layers * D * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads) + self.vocab_size * D
        for layer in range(self.n_layers):
            e = self.experts_of(layer)
            width = self.d_ff if e is None else e.per_token * e.width + e.shared_width
            total += 3 * D * width + (0 if e is None else D * e.number)
        return total

    def flops_per_token(self, contexts: np.ndarray) -> float:
        """Floating-point operations of one forward and backward pass, a token on average.

        contexts: for each token the keys it attends to where no window cuts them, itself included. The masked half of
        a row is not work (so this is half the attention term of PaLM, appendix B).
        """
        windows = self.windows or (None,) * self.n_layers
        keys = sum(float(np.mean(contexts if w is None else np.minimum(contexts, w))) for w in windows)
        return 6.0 * self.matmul_parameters() + 12.0 * self.n_heads * self.head_dim * keys
