"""What the model being trained makes of text: evaluation, samples and a server, by one engine on the live weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxsys.data.packing import NO_TARGET, Batch
from jaxsys.graphs import Graphs
from jaxsys.live import Live
from jaxsys.llm import LLM
from jaxsys.models.state import Model
from jaxsys.serve.engine import FAST, Engine, EngineConfig, pool_size, replicas_of
from jaxsys.serve.pool import least_bytes, pool_dtype
from jaxsys.serve.request import Request, Result
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Size
from jaxsys.serve.service import Service
from jaxsys.tokenizer import Tokenizer
from jaxsys.train.config import TrainConfig
from parallelism.errors import UserError
from parallelism.layout import Layout

VIEW = "compute"
# Who they are, for fairness between the clients of a server.
EVALUATION, SAMPLES = "evaluation of the run", "samples of the run"


class Inference:
    """An engine on a run's live weights, for what its configuration asks for.

    Where training computes in another dtype than that of its masters, or keeps them in host memory (then shardings say
    where the device has them), or stores them otherwise than ``model`` does (trained says how, shardings where the
    model's are), a view of them is served: the one copy there is, refreshed when weights moved. Compiles
    its graphs in the constructor. Every process of a job takes part, in the same order: what is launched is a function
    of configuration, data and weights.
    service: that runs the engine, where there is a server; otherwise it runs when it is called, and ``rest`` gives the
    memory of its pool and its view back.
    Raises UserError for prompts that the model's context cannot hold and for settings that are not valid.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        live: Live,
        graphs: Graphs,
        tokenizer: Tokenizer,
        shardings: Mapping[str, NamedSharding] | None = None,
        trained: Layout | None = None,
    ):
        c, s = config.sample, config.serve
        layouts = None if trained is None else (trained, model.layout)
        self._live, self._view = live, live.view(VIEW, model.compute_dtypes(config.compute_dtype), shardings, layouts)
        self._sampling = Sampling(c.max_tokens, c.temperature, seed=config.seed, stop=tokenizer.eos_ids)
        encode = tokenizer.encode_message if c.chat else tokenizer.encode
        self._prompts = [encode(prompt) for prompt in c.prompts]
        serves = s.port is not None
        contexts = [len(prompt) + c.max_tokens for prompt in self._prompts]
        contexts += [config.data.seq_len] if config.eval_batches else []
        replicas = replicas_of(graphs)
        served = served_context(config, model, replicas) if serves else 0
        contexts += [served] if serves else []
        context = min(max(contexts), model.config.max_seq_len)
        chunks = sorted(size for size in FAST if size.queries > 1)
        # All that a server has, or those that suit what is asked for: each takes its time to compile.
        sizes: tuple[Size, ...] = (min(FAST),) if self._prompts else ()
        if config.eval_batches:
            tokens = config.data.batch_size // config.accumulate * config.data.seq_len // replicas
            rows = min(max(chunks[0].rows, 1 << (tokens - 1).bit_length()), chunks[-1].rows)
            sizes += (Size(rows, chunks[-1].sequences, rows * chunks[-1].queries // chunks[-1].rows),)
        sizes = FAST if serves else sizes
        dtype = pool_dtype(live.like(self._view))
        least = least_bytes(model, replicas, context, EngineConfig.page_size, dtype)
        options = EngineConfig(
            max_context=None if serves and s.max_context is None and context == served else context,
            kv_bytes=s.kv_bytes if serves else max(EngineConfig.kv_bytes, least),
            host_kv_bytes=s.host_kv_bytes,
            numerics=config.numerics,
            sizes=None if config.numerics == "invariant" else sizes,
            new_weights=s.new_weights,
        )
        self.service: Service | None = None
        self.llm = LLM(Engine(model, live, graphs, options, view=self._view), tokenizer)
        self._samples()  # refused now rather than at the first sample
        self.rest()

    @property
    def keeps(self) -> bool:
        """Whether updates may have to leave the parameters that they replace."""
        return self._view is None and self.llm.engine.config.new_weights == "finish"

    @property
    def view_bytes(self) -> int:
        """Bytes of the copy that is served over all devices; 0 when the masters themselves are."""
        return self._live.views[self._view].bytes if self._view else 0

    def samples(self) -> list[Result]:
        """One result a prompt of the configuration, from the newest weights."""
        requests = self._samples()
        self._run(requests, SAMPLES)
        return [self.llm.result(request) for request in requests]

    def losses(self, batches: Iterable[Batch], tick: Callable[[], object] = lambda: None) -> tuple[float, int]:
        """Sum of -log p over the targets of packed batches [B, T], in nats, and how many. tick: called along the way.

        Each piece of a document in a row is scored by itself, as rows do not see each other in training either.
        """
        known = (tokens for batch in batches for tokens in pieces(batch))
        requests = self.llm.scoring(tokens for tokens in known if len(tokens) > 1)
        self._run(requests, EVALUATION, tick)
        scores = [request.prompt_logprobs for request in requests]
        return -float(sum(np.sum(score, dtype=np.float64) for score in scores)), sum(map(len, scores))

    def _samples(self) -> list[Request]:
        return [self.llm.request(prompt, self._sampling) for prompt in self._prompts]

    def _run(self, requests: Sequence[Request], client: str, tick: Callable[[], object] = lambda: None) -> None:
        for request in requests:
            request.client = client
        if self.service is not None:
            self.service.run(requests)
            return
        for request in requests:
            self.llm.engine.add(request)
        self.llm.engine.run(requests, tick)

    def rest(self) -> None:
        """Gives back the memory that evaluation and samples took, unless a server has it."""
        if self.service is None:
            self.llm.engine.give_back()


def served_context(config: TrainConfig, model: Model, replicas: int) -> int:
    """Tokens of a request of the run's clients, prompt included. Needs no array and no program.

    Raises UserError for a ``serve.max_context`` and a ``serve.kv_bytes`` that the model does not allow.
    """
    kept = model.compute_dtypes(config.compute_dtype)["embed.kernel"]
    dtype = pool_dtype({"embed.kernel": jax.ShapeDtypeStruct((), kept)})
    evaluated = min(config.data.seq_len, model.config.max_seq_len) if config.eval_batches else 1
    try:
        for context in (evaluated, config.serve.max_context):  # in the same pool
            served, _ = pool_size(model, EngineConfig(context, config.serve.kv_bytes), dtype, replicas)
        return served
    except UserError as error:
        raise UserError(f"serve.{error}") from None


def pieces(batch: Batch) -> Iterable[list[int]]:
    """Tokens of each document in each row of a packed batch, and the target after the last where there is one."""
    for row in range(len(batch["tokens"])):
        segments = batch["segments"][row]
        for segment in range(1, segments.max(initial=0) + 1):
            (at,) = np.nonzero(segments == segment)
            tokens, last = batch["tokens"][row, at].tolist(), int(batch["targets"][row, at[-1]])
            yield tokens if last == NO_TARGET else [*tokens, last]
