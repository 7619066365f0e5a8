"""A tiny random model, and engines of it."""

import functools

import jax
import numpy as np

from jaxsys.graphs import Graphs
from jaxsys.kernels.attention import Rows
from jaxsys.live import Live
from jaxsys.models.config import ModelConfig
from jaxsys.models.state import build
from jaxsys.serve.engine import Engine, EngineConfig
from jaxsys.serve.scheduler import Size
from parallelism import PARAMETERS, MeshSpec, plan, put

CONFIG = ModelConfig("llama", 97, 32, 2, 6, 2, 8, 48, max_seq_len=96, tie_embeddings=True)
WINDOWED = ModelConfig(
    "gemma2", 97, 32, 2, 4, 2, 8, 48, max_seq_len=96, windows=(7, None), attention_softcap=20.0, logit_softcap=10.0,
    post_norms=True,
)  # fmt: skip
SIZES = (Size(1, 1), Size(4, 4), Size(16, 4, queries=4))


@functools.cache
def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Logical arrays by name, large enough that greedy choices are clear and varied."""
    rng = np.random.default_rng(0)
    logical = build(config, storage="listed").layout.logical
    return {
        name: rng.standard_normal(a.shape, np.float32) * (1.0 if "norm" in name else 0.3) for name, a in logical.items()
    }


class Reference:
    """The whole forward of whole rows: what the engine has to equal."""

    def __init__(self, config: ModelConfig):
        self.model = build(config)
        self.params = put(
            plan(self.model.layout, MeshSpec().build()), lambda logical, box: weights(config)[logical.name][box]
        )

        @jax.jit
        def logits(params, tokens, segments, positions):
            decoder = self.model.bind(params)
            return decoder.logits(decoder(tokens, Rows(segments, positions))[0])

        self._logits = logits

    def log_softmax(self, tokens: list[int]) -> np.ndarray:
        """[len(tokens), V]"""
        T = 96
        row = np.zeros((1, T), np.int32)
        row[0, : len(tokens)] = tokens
        segments = (np.arange(T) < len(tokens)).astype(np.int32)[None]
        logits = np.asarray(self._logits(self.params, row, segments, np.arange(T, dtype=np.int32)[None]), np.float64)[0]
        logits = logits[: len(tokens)]
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def greedy(self, prompt: list[int], n: int) -> tuple[list[int], list[float]]:
        tokens, logprobs = list(prompt), []
        for _ in range(n):
            last = self.log_softmax(tokens)[-1]
            tokens.append(int(last.argmax()))
            logprobs.append(float(last.max()))
        return tokens[len(prompt) :], logprobs


def make_engine(
    config: ModelConfig = CONFIG, *, mesh: str = "", dtype: str = "float32", storage: str | None = None, **options
) -> Engine:
    options = {"sizes": SIZES, "page_size": 8, "max_steps": 8, "kv_bytes": 1 << 20} | options
    devices = MeshSpec.parse(mesh).build()
    model = build(config, dtype=dtype, storage=storage)
    placed = plan(model.layout, devices, PARAMETERS, model.units)
    graphs = Graphs(devices)
    params = put(placed, lambda logical, box: weights(config)[logical.name][box].astype(logical.dtype))
    engine = Engine(model.with_layout(placed.layout), Live(params, graphs), graphs, EngineConfig(**options))
    graphs.freeze()
    return engine
