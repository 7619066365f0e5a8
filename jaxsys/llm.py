"""A model to call from Python: ``load``, then generate, stream and score."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsys.graphs import Graphs, enable_persistent_cache
from jaxsys.hub import ModelSource, resolve
from jaxsys.live import Live
from jaxsys.models.config import ModelConfig
from jaxsys.models.pretrained import Pretrained
from jaxsys.models.state import Model, build
from jaxsys.serve.engine import Engine, EngineConfig
from jaxsys.serve.forward import Numerics
from jaxsys.serve.request import Request, Result, Sampling, token_ids
from jaxsys.tokenizer import Tokenizer
from parallelism import ACTIVATIONS, PARAMETERS, MeshSpec, plan, put, refuse_idle_axes
from parallelism.errors import UserError, unknown_name

DTYPES = ("float32", "bfloat16")

Prompt = str | Sequence[int]

# Tokens between two looks of the host while somebody reads along.
STREAM_STEPS = 4


def load(
    model: str | os.PathLike[str],
    mesh: str = "",
    dtype: str = "float32",
    max_context: int | None = None,
    kv_bytes: int = EngineConfig.kv_bytes,
    numerics: Numerics = "fast",
) -> LLM:
    """A model ready to generate: weights on their devices, every graph compiled.

    model: a native checkpoint or run, a Hugging Face directory, a GGUF file, a Hub id, or a name that a package
    resolves (``smollm2-135m-instruct``). mesh: as ``tensor=2``; empty is one device. dtype: of the weights,
    ``float32`` or ``bfloat16``. max_context: tokens of a sequence, prompt included; None is as many as the model and
    the pool allow. kv_bytes: what the pool of keys and values may take. numerics: ``fast``, or ``invariant``, in which
    a token's log-probability is bitwise the same sampled or scored, whatever shares its batch.
    Raises UserError for anything wrong with these.
    """
    if str(dtype) not in DTYPES:
        raise unknown_name("dtype", str(dtype), DTYPES)
    if not isinstance(mesh, str):
        raise UserError(f"mesh: found {mesh!r:.40}, expected text such as 'tensor=2', or '' for one device")
    config = EngineConfig(max_context=max_context, kv_bytes=kv_bytes, numerics=numerics)
    source = resolve(model)
    spec = MeshSpec.parse(mesh)
    tokenizer = Tokenizer.of(source)
    enable_persistent_cache()
    devices = spec.build()
    refuse_idle_axes(devices.shape, PARAMETERS, ACTIVATIONS)
    decoder, params = _read(source, devices, dtype)
    graphs = Graphs(devices)
    engine = Engine(decoder, Live(params, graphs), graphs, config, name=str(source.path))
    graphs.freeze()
    return LLM(engine, tokenizer)


def _read(source: ModelSource, devices: Mesh, dtype: str, attempts: int = 4) -> tuple[Model, dict[str, jax.Array]]:
    """The model as it lies on ``devices``, and its parameters.

    A run that trains may delete the checkpoint that is being read: then it begins again, with the newest.
    """
    steps = set(source.path.glob("step-*"))
    try:
        pretrained = Pretrained.open(source)
        model = build(pretrained.config, dtype=dtype)
        placed = plan(model.layout, devices, PARAMETERS, model.units)
        return model.with_layout(placed.layout), put(placed, pretrained.reader)
    except UserError:
        if attempts == 1 or steps <= set(source.path.glob("step-*")):
            raise
    return _read(source, devices, dtype, attempts - 1)


class LLM:
    """An engine and its tokenizer. Prompts are text, or lists of token ids. For one thread.

    Sampling arguments are those of ``jaxsys.serve.request.Sampling``; generation ends at the tokenizer's
    end-of-text tokens unless ``stop`` names others. chat: a text is a user's message, put into the model's template.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.engine.model.config

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
        chat: bool = False,
    ) -> list[Result]:
        """One result a prompt, in order; all run together. Raises UserError, before any runs, for a bad prompt."""
        sampling = self._sampling(max_tokens, temperature, top_k, top_p, seed, stop)
        requests = self.submit(prompts, sampling, chat)
        self.engine.run(requests)
        return [self.result(request) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[int] | None = None,
        chat: bool = False,
    ) -> Iterator[str]:
        """The text of one result piece by piece, whole characters each; they add up to ``generate``'s text."""
        sampling = self._sampling(max_tokens, temperature, top_k, top_p, seed, stop)
        request = self.engine.make_request(self.encode(prompt, chat), sampling)

        def queued() -> Iterator[str]:  # when the first piece is asked for: a stream that nobody reads holds nothing
            self.engine.add(request)
            yield from self.pieces(request)

        return queued()

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, chat: bool = False) -> list[Request]:
        """Queues prompts with the engine, for ``pieces`` and ``result``; ends only where ``sampling`` says."""
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts: found {prompts!r:.40}, expected a list of prompts: put it in brackets")
        return self._queue([self.encode(prompt, chat) for prompt in prompts], sampling)

    def pieces(self, request: Request) -> Iterator[str]:
        """The text of a request of the engine as it is made."""
        text = self.tokenizer.stream(skip_special=True)
        for token in self.engine.stream(request, STREAM_STEPS):
            if piece := text.push(token):
                yield piece
        if piece := text.finish():
            yield piece

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The natural log-probability of each token given those before it: [n - 1] float32 for n tokens.

        The first token has nothing before it and no entry: entry i is of token i + 1.
        """
        if not isinstance(sequences, Iterable):
            raise UserError(f"score: found {sequences!r:.40}, expected a list of lists of token ids")
        requests = self._queue(sequences, Sampling(max_tokens=0), score=True)
        self.engine.run(requests)
        return [np.array(request.prompt_logprobs, np.float32) for request in requests]

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """Token ids of a prompt, as ``generate`` takes it."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_message(prompt) if chat else self.tokenizer.encode(prompt)
        if chat:
            raise UserError("prompt: found token ids with chat=True, expected text: give text, or chat=False")
        return token_ids("prompt", prompt, "text or a list of token ids")

    def result(self, request: Request) -> Result:
        """What a finished request came to."""
        assert request.finish_reason is not None
        made = request.tokens[request.prompt_tokens :]
        return Result(
            self.tokenizer.decode(made, skip_special=True),
            made,
            np.array(request.logprobs, np.float32),
            request.tokens[: request.prompt_tokens],
            request.finish_reason,
            request.versions,
        )

    def _sampling(
        self,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        stop: Sequence[int] | None,
    ) -> Sampling:
        ends = self.tokenizer.eos_ids if stop is None else stop
        return Sampling(max_tokens, temperature, top_k, top_p, seed, tuple(token_ids("sampling: stop", ends)))

    def _queue(self, prompts: Iterable[Sequence[int]], sampling: Sampling, *, score: bool = False) -> list[Request]:
        """All of them or, if one is bad, none."""
        requests = [self.engine.make_request(prompt, sampling, score=score) for prompt in prompts]
        for request in requests:
            self.engine.add(request)
        return requests
