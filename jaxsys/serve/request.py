"""What is asked for, how far it is, and what came out. Plain Python."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from parallelism.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    max_tokens: tokens to make at most; 0 makes none.
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: choose among the k most likely tokens (those equal to the last of them included); 0 is off.
    top_p: then choose among the fewest most likely tokens whose probabilities sum to at least this; 1 is off.
    seed: the same seed gives the same tokens, whatever else is in the batch; None draws one.
    stop: token ids that end the text; the one that does is the last of the result.

    Raises UserError for a value out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        whole("sampling: max_tokens", self.max_tokens, 0, 2**31 - 1)
        whole("sampling: top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            whole("sampling: seed", self.seed, 0, 2**32 - 1)
        _real("temperature", self.temperature, 0.0, math.inf)
        _real("top_p", self.top_p, math.ulp(0.0), 1.0)
        for token in token_ids("sampling: stop", self.stop):
            whole("sampling: stop token", token, 0, 2**31 - 1)


def whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raises UserError unless ``value`` is a whole number from ``low`` to ``high``."""
    number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not number or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{name}={value!r}, expected a whole number {allowed}")


def token_ids(name: str, value: object, expected: str = "a list of token ids") -> list[int]:
    """``value`` as a list of token ids. Raises UserError for what is no sequence of whole numbers."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise UserError(f"{name}: found {value!r:.40}, expected {expected}")
    ids = []
    for token in value:
        try:
            if isinstance(token, bool):
                raise TypeError
            ids.append(operator.index(token))
        except TypeError:
            raise UserError(f"{name}: found {token!r:.40} among its tokens, expected whole numbers") from None
    return ids


def _real(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high or not math.isfinite(value):  # type: ignore[arg-type]
        least = "more than 0" if low == math.ulp(0.0) else f"at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise UserError(f"sampling: {name}={value!r}, expected a number of {least}{most}")


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence on its way. There are no phases: ``computed`` catches up with ``tokens``.

    tokens: the prompt, then what was made. computed: how many of them have keys and values in the pool.
    seed: the one in use. score: whether the log-probabilities of the prompt's own tokens are wanted.
    pages: pages of the pool, in order of position. logprobs, versions: one a made token (see Result).
    prompt_logprobs: of each prompt token but the first, given those before it, where ``score``.
    client: whose it is, for fairness. priority: the lower the more urgent. leader: one with the same prompt that goes
    before it, so that it is computed once.
    The scheduler's own: number, in order of arrival; version, of the weights that made its keys and values; root and
    digests, of its full pages (see ``jaxsys.serve.pages``).
    """

    prompt_tokens: int
    tokens: list[int]
    sampling: Sampling
    seed: int
    score: bool = False
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    client: str = ""
    priority: int = 0
    leader: Request | None = None
    number: int = 0
    version: int | None = None
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

    def take(self, token: int, logprob: float, version: int) -> None:
        """Appends a made token, and finishes if it is the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token in self.sampling.stop:
            self.finish_reason = "stop"
        elif self.made >= self.sampling.max_tokens:
            self.finish_reason = "length"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one prompt came to.

    tokens: what was made, a stop token included; text: of it, special tokens left out.
    logprobs: [len(tokens)] float32, natural logarithm of the model's own probability of each token: before
        temperature, top-k and top-p. versions: of the weights that made each token.
    finish_reason: ``stop`` (a stop token), ``length`` (max_tokens, or the end of the context) or ``cancelled``.
    """

    text: str
    tokens: list[int]
    logprobs: np.ndarray
    prompt_tokens: Sequence[int]
    finish_reason: FinishReason
    versions: list[int]
