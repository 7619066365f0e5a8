"""How tokens are chosen: what may be asked for, checked where it is made. Plain Python."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from parallelism.errors import UserError

# What one graph has room for, for each sequence.
STOPS, BIASES, ALTERNATIVES = 16, 320, 20
# Settings as large as they may be keep logits, of float32 and of bfloat16, far from what is infinite.
LARGEST = 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen. docs/serving.md says what exactly each does, and in which order.

    max_tokens: tokens to make at most; 0 makes none. min_tokens: no token of ``stop`` is made before so many.
    repetition_penalty: logits of tokens that are in the prompt or were made are divided by it where positive,
        multiplied where negative; 1 is off. presence_penalty, frequency_penalty: taken from the logits of tokens that
        were made, once, and for each time.
    logit_bias: added to the logits of tokens, {token: bias}. allowed_tokens: no others are made; None allows all.
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: choose among the k most likely tokens (those equal to the last of them included); 0 is off.
    top_p: then choose among the fewest most likely tokens whose probabilities sum to at least this; 1 is off.
    min_p: then among those at least this times as likely as the most likely; 0 is off.
    seed: the same seed gives the same tokens, whatever else is in the batch; None draws one. The noise is a function of
        seed and position alone: requests with the same seed draw with the same noise, whatever their prompts.
    stop: token ids that end the text; the one that does is the last of the result. stop_text: texts that end it; they
        are no part of the result's text.
    logprobs: so many most likely tokens are reported with their log-probabilities for each that is made, at most
        ``ALTERNATIVES``. processed_logprobs: the log-probabilities under the distribution that was drawn from, too.
    prompt_logprobs: those of the prompt's own tokens, too.

    Raises UserError for a value out of range; numbers that have no range of their own are at most ``LARGEST``.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[int, ...] = ()
    min_tokens: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    allowed_tokens: tuple[int, ...] | None = None
    stop_text: tuple[str, ...] = ()
    logprobs: int = 0
    processed_logprobs: bool = False
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        whole("sampling: max_tokens", self.max_tokens, 0, 2**31 - 1)
        whole("sampling: min_tokens", self.min_tokens, 0, 2**31 - 1)
        whole("sampling: top_k", self.top_k, 0, 2**31 - 1)
        whole("sampling: logprobs", self.logprobs, 0, ALTERNATIVES)
        if self.seed is not None:
            whole("sampling: seed", self.seed, 0, 2**32 - 1)
        _real("temperature", self.temperature, 0.0, LARGEST)
        _real("top_p", self.top_p, math.ulp(0.0), 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 1 / LARGEST, LARGEST)
        _real("presence_penalty", self.presence_penalty, -LARGEST, LARGEST)
        _real("frequency_penalty", self.frequency_penalty, -LARGEST, LARGEST)
        for name in ("processed_logprobs", "prompt_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"sampling: {name}={getattr(self, name)!r}, expected True or False")
        self._check_tokens()
        if self.min_tokens > self.max_tokens:
            raise UserError(f"sampling: min_tokens={self.min_tokens}, expected at most max_tokens, {self.max_tokens}")
        if self.min_tokens and len(self.stop) > STOPS:
            raise UserError(f"sampling: min_tokens with {len(self.stop)} stop tokens, expected at most {STOPS}")

    def _check_tokens(self) -> None:
        for token in token_ids("sampling: stop", self.stop):
            whole("sampling: stop token", token, 0, 2**31 - 1)
        texts = self.stop_text
        if (
            isinstance(texts, str)
            or not isinstance(texts, Iterable)
            or not all(isinstance(t, str) and t for t in texts)
        ):
            raise UserError(f"sampling: stop_text={texts!r:.60}, expected texts that are not empty")
        if self.allowed_tokens is not None:
            if not token_ids("sampling: allowed_tokens", self.allowed_tokens):
                raise UserError("sampling: allowed_tokens is empty, expected a token at least, or None for all")
            for token in self.allowed_tokens:
                whole("sampling: allowed token", token, 0, 2**31 - 1)
            if self.min_tokens and set(self.allowed_tokens) <= set(self.stop):
                raise UserError("sampling: min_tokens, and all allowed_tokens are stop tokens: nothing could be made")
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"sampling: logit_bias={self.logit_bias!r:.60}, expected {{token: bias}}")
        if len(self.logit_bias) > BIASES:
            raise UserError(f"sampling: logit_bias of {len(self.logit_bias)} tokens, expected at most {BIASES}")
        for token, bias in self.logit_bias.items():
            whole("sampling: token of logit_bias", token, 0, 2**31 - 1)
            _real("logit_bias", bias, -LARGEST, LARGEST)

    def largest_token(self) -> tuple[str, int]:
        """The largest token id that is named, and by which setting; -1 if none is."""
        named = {"stop": self.stop, "allowed_tokens": self.allowed_tokens or (), "logit_bias": self.logit_bias}
        return max(((name, max(tokens, default=-1)) for name, tokens in named.items()), key=lambda each: each[1])


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


def _real(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        least = " of more than 0" if low == math.ulp(0.0) else f" of at least {low:g}"
        raise UserError(f"sampling: {name}={value!r}, expected a number{least} and at most {high:g}")
