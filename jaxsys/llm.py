"""A model to call from Python: ``load``, then generate, stream and score."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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
from jaxsys.serve.request import Request, Result
from jaxsys.serve.sampling import Sampling, token_ids, whole
from jaxsys.serve.text import Text
from jaxsys.tokenizer import Tokenizer
from parallelism import ACTIVATIONS, PARAMETERS, MeshSpec, plan, put, refuse_idle_axes
from parallelism.errors import UserError, unknown_name

DTYPES = ("float32", "bfloat16")

SETTINGS = [field.name for field in dataclasses.fields(Sampling)]

# Neither weights nor pages lie over the axis of long documents, so that it would only repeat what they cost.
_SERVING = ACTIVATIONS.override("seq=none,residual=tensor:replicate")

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
    host_kv_bytes: int = 0,
    say: Callable[[str], object] | None = None,
) -> LLM:
    """A model ready to generate: weights on their devices, every graph compiled.

    model: a native checkpoint or run, a Hugging Face directory, a GGUF file, a Hub id, or a name that a package
    resolves (``smollm2-135m-instruct``). mesh: as ``tensor=2``; empty is one device. dtype: of the weights,
    ``float32`` or ``bfloat16``. max_context: tokens of a sequence, prompt included; None is as many as the model and
    the pool allow. kv_bytes: what the pool of keys and values may take; host_kv_bytes: host memory for what it has no
    room for. numerics: ``fast``, or ``invariant``, in which a token's log-probability is bitwise the same sampled or
    scored, whatever shares its batch. say: called with a line where programs must be compiled, which takes long.
    Raises UserError for anything wrong with these.
    """
    if str(dtype) not in DTYPES:
        raise unknown_name("dtype", str(dtype), DTYPES)
    if not isinstance(mesh, str):
        raise UserError(f"mesh: found {mesh!r:.40}, expected text such as 'tensor=2', or '' for one device")
    config = EngineConfig(max_context, kv_bytes, host_kv_bytes, numerics=numerics)
    source = resolve(model)
    spec = MeshSpec.parse(mesh)
    tokenizer = Tokenizer.of(source)
    enable_persistent_cache()
    devices = spec.build()
    decoder, params = _read(source, devices, dtype)
    graphs = Graphs(devices, say=say)
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
        refuse_idle_axes(placed, _SERVING, model.activation_axes)
        return model.with_layout(placed.layout), put(placed, pretrained.reader)
    except UserError:
        if attempts == 1 or steps <= set(source.path.glob("step-*")):
            raise
    return _read(source, devices, dtype, attempts - 1)


class LLM:
    """An engine and its tokenizer. Prompts are text, or lists of token ids. For one thread.

    Settings are the fields of ``jaxsys.serve.sampling.Sampling``; generation ends at the tokenizer's end-of-text tokens
    unless ``stop`` names others. chat: a text is a user's message, put into the model's template.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine, self.tokenizer = engine, tokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.engine.model.config

    def generate(self, prompts: Sequence[Prompt], *, n: int = 1, chat: bool = False, **settings: Any) -> list[Result]:
        """n results a prompt, in order; all run together. Raises UserError, before any runs, for a bad prompt.

        With a seed the i-th of a prompt has seed + i.
        """
        requests = self.submit(prompts, self.sampling(**settings), n=n, chat=chat)
        self.engine.run(requests)
        return [self.result(request) for request in requests]

    def stream(self, prompt: Prompt, *, chat: bool = False, **settings: Any) -> Iterator[str]:
        """The text of one result piece by piece, whole characters each; they add up to ``generate``'s text."""
        request = self.request(self.encode(prompt, chat), self.sampling(**settings))

        def queued() -> Iterator[str]:  # when the first piece is asked for: a stream that nobody reads holds nothing
            self.engine.add(request)
            yield from self.pieces(request)

        return queued()

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, chat: bool = False) -> list[Request]:
        """Queues n requests a prompt with the engine, or none if one is bad; they end only where ``sampling`` says."""
        requests = self.requests(prompts, sampling, n=n, chat=chat)
        for request in requests:
            self.engine.add(request)
        return requests

    def requests(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, chat: bool = False
    ) -> list[Request]:
        """n requests a prompt, in order; not queued yet. Raises UserError if one is bad."""
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts: found {prompts!r:.40}, expected a list of prompts: put it in brackets")
        whole("n", n, 1)
        return [each for prompt in prompts for each in self.siblings(self.encode(prompt, chat), sampling, n)]

    def siblings(self, tokens: Sequence[int], sampling: Sampling, n: int) -> list[Request]:
        """n requests for one prompt, which is computed once; not queued yet."""
        requests: list[Request] = []
        for i in range(n):
            seed = None if sampling.seed is None else (sampling.seed + i) % 2**32
            requests.append(self.request(tokens, dataclasses.replace(sampling, seed=seed)))
            requests[i].leader = requests[0] if i else None
        return requests

    def request(self, tokens: Sequence[int], sampling: Sampling) -> Request:
        """A request whose text is kept; not queued yet."""
        request = self.engine.make_request(tokens, sampling)
        request.text = Text(lambda: self.tokenizer.stream(skip_special=True), sampling.stop_text, sampling.min_tokens)
        return request

    def pieces(self, request: Request) -> Iterator[str]:
        """The text of a request of the engine as it is made."""
        assert request.text is not None
        given = 0
        for _ in self.engine.stream(request, STREAM_STEPS):
            if piece := request.text.sure[given:]:
                given += len(piece)
                yield piece
        if piece := request.text.finish()[given:]:
            yield piece

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The natural log-probability of each token given those before it: [n - 1] float32 for n tokens.

        The first token has nothing before it and no entry: entry i is of token i + 1.
        """
        if not isinstance(sequences, Iterable):
            raise UserError(f"score: found {sequences!r:.40}, expected a list of lists of token ids")
        requests = self.scoring(sequences)
        for request in requests:
            self.engine.add(request)
        self.engine.run(requests)
        return [np.array(request.prompt_logprobs, np.float32) for request in requests]

    def scoring(self, sequences: Iterable[Sequence[int]]) -> list[Request]:
        """Requests whose ``prompt_logprobs`` will be the scores of sequences; not queued yet."""
        sampling = Sampling(max_tokens=0, prompt_logprobs=True)
        return [self.engine.make_request(sequence, sampling) for sequence in sequences]

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
        assert request.text is not None
        return Result(
            text=request.text.finish(),
            tokens=request.tokens[request.prompt_tokens :],
            logprobs=np.array(request.logprobs, np.float32),
            prompt_tokens=request.tokens[: request.prompt_tokens],
            finish_reason=request.finish_reason,
            versions=request.versions,
            processed_logprobs=np.array(request.processed, np.float32),
            top_logprobs=request.top,
            prompt_logprobs=np.array(request.prompt_logprobs, np.float32),
            prompt_top_logprobs=request.prompt_top,
        )

    def sampling(self, **settings: Any) -> Sampling:
        """Settings that end at the tokenizer's end-of-text tokens unless they say otherwise."""
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise unknown_name("sampling setting", unknown[0], SETTINGS)
        if settings.get("stop") is None:
            settings["stop"] = self.tokenizer.eos_ids
        if not isinstance(settings["stop"], tuple):
            settings["stop"] = tuple(token_ids("sampling: stop", settings["stop"]))
        if isinstance(settings.get("stop_text"), str):
            settings["stop_text"] = (settings["stop_text"],)
        return Sampling(**settings)
