"""What is asked for, how far it is, and what came out. Plain Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxsys.serve.sampling import Sampling
from jaxsys.serve.text import Text

Top = list[tuple[int, float]]
FinishReason = Literal["stop", "length", "cancelled"]


class Made(NamedTuple):
    """A token that was made. logprob: the model's own. processed: of the distribution that was drawn from, and
    top: the most likely tokens with the model's own log-probabilities, where they are wanted.
    """

    token: int
    logprob: float
    processed: float | None = None
    top: Top | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence on its way. There are no phases: ``computed`` catches up with ``tokens``.

    tokens: the prompt, then what was made. computed: how many of them have keys and values in the pool.
    seed: the one in use. pages: pages of the pool, in order of position.
    logprobs, versions, processed, top: one a made token (see Result). prompt_logprobs, prompt_top: of each prompt token
    but the first, given those before it, where they are wanted.
    text: of what is made, where somebody wants it; it may end the request.
    client: whose it is, for fairness. priority: the lower the more urgent. leader: one with the same prompt that goes
    before it, so that it is computed once.
    undone: times that new weights took what was computed of it.
    The scheduler's own: number, in order of arrival; replica, where it runs; version, of the weights that made its
    keys and values; bound, of those that it is to end with; root and digests, of its full pages (see
    ``jaxsys.serve.pages``).
    """

    prompt_tokens: int
    tokens: list[int]
    sampling: Sampling
    seed: int
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    processed: list[float] = dataclasses.field(default_factory=list)
    top: list[Top] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top: list[Top] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    text: Text | None = None
    client: str = ""
    priority: int = 0
    leader: Request | None = None
    undone: int = 0
    number: int = 0
    replica: int = 0
    version: int | None = None
    bound: int | None = None
    root: bytes = b""
    digests: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def made(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def goal(self) -> int:
        """Tokens that must be computed before something comes of it: a last token that nothing follows need not be."""
        return len(self.tokens) if self.sampling.max_tokens else len(self.tokens) - 1

    @property
    def longest(self) -> int:
        """Positions of the pool that it can come to use."""
        return max(self.prompt_tokens + self.sampling.max_tokens - 1, 0)

    def restart(self) -> None:
        """Forgets what was made."""
        del self.tokens[self.prompt_tokens :]
        for made in (self.logprobs, self.versions, self.processed, self.top, self.prompt_logprobs, self.prompt_top):
            made.clear()
        if self.text is not None:
            self.text.restart()

    def take(self, made: Made, version: int) -> None:
        """Appends a made token, and finishes if it is the last."""
        self.tokens.append(made.token)
        self.logprobs.append(made.logprob)
        self.versions.append(version)
        if made.processed is not None:
            self.processed.append(made.processed)
        if made.top is not None:
            self.top.append(made.top)
        ended = self.text is not None and self.text.push(made.token)
        if ended or made.token in self.sampling.stop:
            self.finish_reason = "stop"
        elif self.made >= self.sampling.max_tokens:
            self.finish_reason = "length"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one prompt came to.

    tokens: what was made, a stop token included; text: of it, special tokens left out, up to a stop text.
    logprobs: [len(tokens)] float32, natural logarithm of the model's own probability of each token: before
        penalties, temperature and what else chooses. processed_logprobs: of the distribution that was drawn from,
        empty if not wanted. top_logprobs: for each token the most likely ones, (token, log-probability), by the model.
    prompt_logprobs, prompt_top_logprobs: the same of the prompt's tokens but the first, empty if not wanted.
    versions: of the weights that made each token.
    finish_reason: ``stop`` (a stop token), ``length`` (max_tokens, or the end of the context) or ``cancelled``.
    """

    text: str
    tokens: list[int]
    logprobs: np.ndarray
    prompt_tokens: Sequence[int]
    finish_reason: FinishReason
    versions: list[int]
    processed_logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    top_logprobs: list[Top] = dataclasses.field(default_factory=list)
    prompt_logprobs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    prompt_top_logprobs: list[Top] = dataclasses.field(default_factory=list)
