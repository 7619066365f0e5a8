"""A model to call from asyncio: calls of many tasks run together, in the batches of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import numpy as np

from jaxsys.llm import LLM, Prompt
from jaxsys.serve.request import Request, Result
from jaxsys.serve.service import Service
from jaxsys.serve.watch import Watch
from parallelism.errors import UserError

_CLOSED = "the AsyncLLM was closed: await its calls before that, or have close(seconds) wait for them"


class AsyncLLM:
    """``LLM.generate``, ``stream`` and ``score`` for asyncio; a task that is cancelled has its requests dropped.

    llm: which nobody else uses from now on. max_queue: requests that may wait. service: one that runs the engine of
    ``llm`` already, as in a run that trains and serves; without it there is one of its own, which ``close`` ends.
    Calls raise UserError for what is wrong with them, ``jaxsys.serve.service.Busy`` where too many wait, and
    ``Closed`` where none is taken any more.
    """

    def __init__(self, llm: LLM, *, max_queue: int = 1024, service: Service | None = None):
        self.llm, self._own = llm, service is None
        self.service = Service(llm.engine, max_queue=max_queue, closed=_CLOSED) if service is None else service

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, seconds: float = 0.0) -> None:
        """Takes no more calls, waits so long for those there are, and cancels the rest."""
        if self._own:
            await asyncio.to_thread(self.service.close, seconds)

    async def generate(
        self, prompts: Sequence[Prompt], *, n: int = 1, chat: bool = False, **settings: Any
    ) -> list[Result]:
        """n results a prompt, in order, as ``LLM.generate`` gives them."""
        requests = await asyncio.to_thread(self.llm.requests, prompts, self.llm.sampling(**settings), n=n, chat=chat)
        await self._finished(requests)
        return [self.llm.result(request) for request in requests]

    async def stream(self, prompt: Prompt, *, chat: bool = False, **settings: Any) -> AsyncIterator[str]:
        """The text of one result piece by piece, whole characters each; queued when the first is asked for."""
        (request,) = await asyncio.to_thread(self.llm.requests, [prompt], self.llm.sampling(**settings), chat=chat)
        assert request.text is not None
        watch, given = Watch(self.service, [request], each=True), 0
        try:
            watch.submit()
            async for (state,) in watch.states():
                done = state.finish_reason is not None
                piece = request.text.finish()[given:] if done else request.text.sure[given : state.sure]
                if piece:
                    given += len(piece)
                    yield piece
        finally:
            watch.cancel()

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The natural log-probability of each token given those before it, as ``LLM.score`` gives them."""
        if not isinstance(sequences, Iterable):
            raise UserError(f"score: found {sequences!r:.40}, expected a list of lists of token ids")
        requests = self.llm.scoring(sequences)
        await self._finished(requests)
        return [np.array(request.prompt_logprobs, np.float32) for request in requests]

    async def _finished(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        watch = Watch(self.service, requests, each=False)
        try:
            watch.submit()
            await watch.finished()
        finally:
            watch.cancel()
