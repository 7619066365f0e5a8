"""OpenAI's responses: the choices of a call as they grow, whole or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsys.serve.protocol import Call
from jaxsys.serve.request import Request, Top
from jaxsys.tokenizer import Tokenizer


class State(NamedTuple):
    """How far a request is: tokens made, characters of its text that are sure, and why it ended."""

    made: int = 0
    sure: int = 0
    finish_reason: str | None = None


class _Entry(NamedTuple):
    """A token with its log-probabilities; none for the first of a prompt, which has nothing before it."""

    token: int
    logprob: float | None
    top: Top
    processed: float | None = None


class Answer:
    """What one call is answered: ``whole`` at its end, or ``pieces`` as its requests go on, then ``last``."""

    def __init__(self, call: Call, requests: Sequence[Request], tokenizer: Tokenizer, model: str):
        self.call, self.requests = call, requests
        self._choices = [_Choice(call, request, i, tokenizer) for i, request in enumerate(requests)]
        chat = call.kind == "chat"
        name = ("chat.completion.chunk" if call.stream else "chat.completion") if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": name,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self) -> dict[str, Any]:
        """The response of a call all of whose requests are finished."""
        choices = []
        for choice, request in zip(self._choices, self.requests, strict=True):
            given = choice.grow(State(request.made, 0, request.finish_reason))
            assert given is not None
            choices.append(given)
        return {**self._head, "choices": choices, "usage": self._usage()}

    def pieces(self, states: Sequence[State]) -> list[dict[str, Any]]:
        """What is new since the last time, a chunk for each choice that has something."""
        usage = {"usage": None} if self.call.include_usage else {}
        grown = [choice.grow(state) for choice, state in zip(self._choices, states, strict=True)]
        return [{**self._head, "choices": [piece], **usage} for piece in grown if piece is not None]

    def last(self) -> dict[str, Any] | None:
        """The chunk after those of the choices, with what they cost, if it is wanted."""
        return {**self._head, "choices": [], "usage": self._usage()} if self.call.include_usage else None

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.call.prompts))
        made = sum(request.made for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class _Choice:
    """One choice: what of its request was given already, and the rest of it in the shape of its kind."""

    def __init__(self, call: Call, request: Request, index: int, tokenizer: Tokenizer):
        self._call, self._request, self._index, self._tokenizer = call, request, index, tokenizer
        self._begun = self._ended = False
        self._given = State()
        self._offset = 0  # of the next token in the text, as completions report it
        self._offsets = tokenizer.stream(skip_special=True)

    def grow(self, state: State) -> dict[str, Any] | None:
        """What is new up to ``state``, None if nothing is."""
        request, given, begin = self._request, self._given, not self._begun
        if self._ended or (state.finish_reason is None and state[:2] == given[:2]):
            return None
        assert request.text is not None
        if state.finish_reason is not None:
            self._ended = True
            state = state._replace(sure=len(request.text.finish()))
        text = request.text.sure[given.sure : state.sure]
        self._begun, self._given = True, state
        start, end = given.made, state.made
        shape = self._chat if self._call.kind == "chat" else self._completion
        out = {"index": self._index, **shape(text, start, end, begin), "finish_reason": state.finish_reason}
        if begin and self._call.prompt_logprobs is not None:
            scored = self._prompt(self._call.prompt_logprobs)
            out["prompt_logprobs"] = [None if each.logprob is None else self._spelled(each) for each in scored]
        if self._call.token_ids:
            first = request.prompt_tokens
            if begin:
                out["prompt_token_ids"] = request.tokens[:first]
            out["token_ids"], out["versions"] = request.tokens[first + start : first + end], request.versions[start:end]
        return out

    def _chat(self, text: str, start: int, end: int, begin: bool) -> dict[str, Any]:
        logprobs = None
        if self._call.logprobs is not None:
            logprobs = {"content": [self._spelled(each) for each in self._made(start, end)], "refusal": None}
        if not self._call.stream:
            return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}
        delta = {"role": "assistant", "content": text} if begin else {"content": text} if text else {}
        return {"delta": delta, "logprobs": logprobs}

    def _completion(self, text: str, start: int, end: int, begin: bool) -> dict[str, Any]:
        echo = begin and self._call.echo
        if echo:
            prompt = self._request.tokens[: self._request.prompt_tokens]
            before = self._tokenizer.decode(prompt, skip_special=True)
            text = before + text
        if self._call.logprobs is None:
            return {"text": text, "logprobs": None}
        entries, offsets = self._made(start, end), []
        if echo:
            entries, stream = self._prompt(self._call.logprobs) + entries, self._tokenizer.stream(skip_special=True)
            for token in prompt:
                offsets.append(self._offset)
                self._offset += len(stream.push(token))
            self._offset = len(before)
        for entry in self._made(start, end):
            offsets.append(self._offset)
            self._offset += len(self._offsets.push(entry.token))
        logprobs: dict[str, Any] = {
            "tokens": [spell(self._tokenizer, each.token) for each in entries],
            "token_logprobs": [each.logprob for each in entries],
            "top_logprobs": [self._best(each) for each in entries] if self._call.logprobs else None,
            "text_offset": offsets,
        }
        if self._call.sampling.processed_logprobs:
            logprobs["processed_token_logprobs"] = [each.processed for each in entries]
        return {"text": text, "logprobs": logprobs}

    def _best(self, entry: _Entry) -> dict[str, float] | None:
        """The most likely tokens and the one that there is."""
        if entry.logprob is None:
            return None
        best = {spell(self._tokenizer, token): logprob for token, logprob in entry.top}
        return {**best, spell(self._tokenizer, entry.token): entry.logprob}

    def _spelled(self, entry: _Entry) -> dict[str, Any]:
        """An entry of a chat's log-probabilities."""

        def one(token: int, logprob: float | None) -> dict[str, Any]:
            raw = self._tokenizer.token_bytes(token)
            return {"token": spell(self._tokenizer, token), "logprob": logprob, "bytes": list(raw)}

        out = one(entry.token, entry.logprob) | {"top_logprobs": [one(*each) for each in entry.top]}
        return out if entry.processed is None else out | {"processed_logprob": entry.processed}

    def _made(self, start: int, end: int) -> list[_Entry]:
        request, wanted = self._request, self._call.logprobs or 0
        first = request.prompt_tokens
        return [
            _Entry(
                request.tokens[first + i],
                request.logprobs[i],
                request.top[i][:wanted] if wanted else [],
                request.processed[i] if request.processed else None,
            )
            for i in range(start, end)
        ]

    def _prompt(self, wanted: int) -> list[_Entry]:
        request = self._request
        rest = [
            _Entry(request.tokens[i + 1], logprob, request.prompt_top[i][:wanted] if wanted else [])
            for i, logprob in enumerate(request.prompt_logprobs)
        ]
        return [_Entry(request.tokens[0], None, []), *rest]


def spell(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text; one that is no whole character by its bytes, as ``bytes:\\xe2\\x82``."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
