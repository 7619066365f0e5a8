"""What the model being trained says: the decode engine on the trainer's own arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import NamedSharding

from jaxsys.graphs import Graphs
from jaxsys.live import Live
from jaxsys.llm import LLM
from jaxsys.models.state import Model
from jaxsys.serve.engine import Engine, EngineConfig
from jaxsys.serve.request import Result
from jaxsys.serve.sampling import Sampling
from jaxsys.serve.scheduler import Size
from jaxsys.tokenizer import Tokenizer
from jaxsys.train.config import SampleConfig

# One graph: a few prompts now and then are not worth compiling more shapes.
SIZES = (Size(16, 16),)
VIEW = "compute"


class Samples:
    """Continuations of a run's prompts by whatever weights are live.

    Where training computes in another dtype than that of its masters, or keeps them in host memory (then shardings say
    where the device has them), a view of them is served: the one copy there is, refreshed when weights moved. Compiles
    its graphs in the constructor. Every process of a job takes the same samples together: which tokens come is a
    function of prompts, weights and seed.
    Raises UserError for prompts that the model's context cannot hold and for settings that are not valid.
    """

    def __init__(
        self,
        config: SampleConfig,
        model: Model,
        live: Live,
        graphs: Graphs,
        tokenizer: Tokenizer,
        compute_dtype: Any,
        seed: int,
        shardings: Mapping[str, NamedSharding] | None = None,
    ):
        self._sampling = Sampling(config.max_tokens, config.temperature, seed=seed, stop=tokenizer.eos_ids)
        self._live, self._view = live, live.view(VIEW, model.compute_dtypes(compute_dtype), shardings)
        encode = tokenizer.encode_message if config.chat else tokenizer.encode
        prompts = [encode(prompt) for prompt in config.prompts]
        longest = max(len(prompt) for prompt in prompts) + config.max_tokens
        context = min(longest, model.config.max_seq_len)
        engine = Engine(model, live, graphs, EngineConfig(max_context=context, sizes=SIZES), view=self._view)
        self._llm, self._prompts = LLM(engine, tokenizer), prompts
        for request in self._llm.submit(prompts, self._sampling):  # refused now rather than at the first sample
            engine.cancel(request)

    @property
    def view_bytes(self) -> int:
        """Bytes of the copy that is served over all devices; 0 when the masters themselves are."""
        return self._live.views[self._view].bytes if self._view else 0

    def take(self) -> list[Result]:
        """One result a prompt, from the newest weights."""
        requests = self._llm.submit(self._prompts, self._sampling)
        self._llm.engine.run(requests)
        return [self._llm.result(request) for request in requests]
