"""OpenAI's requests: which fields there are, what each asks of the engine, what is refused.

A field that cannot be honoured is refused and never ignored; so is one that nobody knows. ``null`` is the same as not
given. docs/serving.md has the meaning of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxsys.llm import LLM
from jaxsys.serve.errors import Refused
from jaxsys.serve.request import Request
from jaxsys.serve.sampling import ALTERNATIVES, BIASES, LARGEST, Sampling
from jaxsys.serve.schema import Schema, check
from parallelism.errors import UserError

Kind = Literal["completion", "chat"]

MOST_DIGITS = 400  # of a whole number; Python refuses some more itself, and float has no more than 309

TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_TEXT: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_PENALTY: Schema = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TOP: Schema = {"type": "integer", "minimum": 0, "maximum": ALTERNATIVES}
_STOP: Schema = {"type": "string", "minLength": 1}


def _only(*values: Any) -> Schema:
    """A field of OpenAI's that is not supported: allowed where it changes nothing."""
    return {"enum": list(values)}


COMMON: dict[str, Schema] = {
    "model": _TEXT,
    "max_tokens": _COUNT,
    "n": {"type": "integer", "minimum": 1, "maximum": 128},
    "stream": _BOOLEAN,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": _BOOLEAN, "include_obfuscation": _only(False)},
        "additionalProperties": False,
    },
    "temperature": {"type": "number", "minimum": 0, "maximum": LARGEST},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "logit_bias": {
        "type": "object",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "stop": {
        "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": 16}],
        "description": "a text that is not empty, or a list of at most 16",
    },
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    "user": _TEXT,
    # Not OpenAI's.
    "top_k": _COUNT,
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "repetition_penalty": {"type": "number", "minimum": 1 / LARGEST, "maximum": LARGEST},
    "min_tokens": _COUNT,
    "stop_token_ids": TOKENS,
    "allowed_token_ids": {**TOKENS, "minItems": 1},
    "ignore_eos": _BOOLEAN,
    "priority": {"type": "integer", "minimum": -100, "maximum": 100},
    "prompt_logprobs": _TOP,
    "processed_logprobs": _BOOLEAN,
    "return_token_ids": _BOOLEAN,
}

PROMPT: Schema = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {**TOKENS, "minItems": 1},
        {"type": "array", "items": {**TOKENS, "minItems": 1}, "minItems": 1},
    ],
    "description": "a text, a list of texts, token ids, or a list of lists of token ids",
}

_PART: Schema = {
    "type": "object",
    "properties": {"type": _only("text"), "text": _TEXT},
    "required": ["type", "text"],
    "additionalProperties": False,
}

MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": _only("system", "developer", "user", "assistant"),
            "content": {
                "anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1}],
                "description": "a text or a list of parts of type text",
            },
            # What an answer of OpenAI's client has, so that it can be sent back as it came.
            "refusal": _only(None),
            "annotations": _only(None, []),
            "audio": _only(None),
            "function_call": _only(None),
            "tool_calls": _only(None, []),
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}

COMPLETION: Schema = {
    "type": "object",
    "properties": {
        **COMMON, "prompt": PROMPT, "echo": _BOOLEAN, "logprobs": _TOP, "best_of": _only(1), "suffix": _only(""),
    },
    "required": ["model", "prompt"],
    "additionalProperties": False,
}  # fmt: skip

CHAT: Schema = {
    "type": "object",
    "properties": {
        **COMMON,
        "messages": MESSAGES,
        "max_completion_tokens": _COUNT,
        "logprobs": _BOOLEAN,
        "top_logprobs": _TOP,
        "tools": _only([]),
        "tool_choice": _only("none"),
        "response_format": _only({"type": "text"}),
        "modalities": _only(["text"]),
        "store": _only(False),
        "service_tier": _only("auto", "default"),
    },
    "required": ["model", "messages"],
    "additionalProperties": False,
}

TOKENIZE: Schema = {
    "type": "object",
    "properties": {"model": _TEXT, "prompt": _TEXT, "messages": MESSAGES, "add_special_tokens": _BOOLEAN},
    "additionalProperties": False,
}

DETOKENIZE: Schema = {
    "type": "object",
    "properties": {"model": _TEXT, "tokens": TOKENS},
    "required": ["tokens"],
    "additionalProperties": False,
}

# Fields that are Sampling's own.
_SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "seed", "min_tokens", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "processed_logprobs",
)  # fmt: skip


_TOKEN_LISTS = ("stop_token_ids", "allowed_token_ids")


@dataclasses.dataclass(frozen=True)
class Call:
    """What a body asks for.

    n: choices a prompt. logprobs, prompt_logprobs: so many most likely tokens beside each token's own log-probability,
    None for none of either. user: for whom.
    """

    kind: Kind
    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool
    user: str
    priority: int

    def requests(self, llm: LLM) -> list[Request]:
        """Those of all choices, in order: the n of the first prompt, then of the second."""
        requests = [each for prompt in self.prompts for each in llm.siblings(prompt, self.sampling, self.n)]
        for request in requests:
            request.priority = self.priority
        return requests


def parse(raw: bytes, schema: Schema, model: str) -> dict[str, Any]:
    """The fields of a body, null ones left out. Raises Refused for what the schema does not allow, or another model."""
    try:
        body = _load(raw)
        if isinstance(body, dict):
            known = schema["properties"]
            body = {name: value for name, value in body.items() if value is not None or name not in known}
        check(body, schema)
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    asked = body.get("model", model)
    if asked != model:
        raise Refused(
            f"model {asked!r:.80} is not served here, {model!r} is", status=404, param="model", code="model_not_found"
        )
    return dict(body)


def read(kind: Kind, raw: bytes, llm: LLM, model: str, most: int) -> Call:
    """The call that a body makes of the server of ``model``, of ``most`` choices at most.

    Raises UserError for what cannot be honoured.
    """
    body = parse(raw, CHAT if kind == "chat" else COMPLETION, model)
    _check_choices(body, most)
    if "stream_options" in body and not body.get("stream"):
        raise Refused("stream_options without stream: ask for a stream, or leave it out", param="stream_options")
    prompts = [_chat_prompt(body["messages"], llm)] if kind == "chat" else _prompts(body["prompt"], llm)
    logprobs, echo = _logprobs(kind, body), body.get("echo", False)
    prompt_logprobs = body.get("prompt_logprobs")
    scored = prompt_logprobs is not None or (echo and logprobs is not None)
    ignored = body.get("ignore_eos", False)
    stop, logit_bias = body.get("stop", ()), _logit_bias(body.get("logit_bias", {}))
    for name, tokens in (("logit_bias", logit_bias), *((name, body.get(name, ())) for name in _TOKEN_LISTS)):
        _check_known(name, tokens, llm)
    settings = {name: body[name] for name in _SETTINGS if name in body}
    sampling = Sampling(
        max_tokens=_max_tokens(kind, body, prompts, llm),
        stop=tuple(dict.fromkeys([*(() if ignored else llm.tokenizer.eos_ids), *body.get("stop_token_ids", ())])),
        stop_text=(stop,) if isinstance(stop, str) else tuple(stop),
        logit_bias=logit_bias,
        allowed_tokens=tuple(body["allowed_token_ids"]) if "allowed_token_ids" in body else None,
        logprobs=max(logprobs or 0, prompt_logprobs or 0),
        prompt_logprobs=scored,
        **settings,
    )
    if sampling.processed_logprobs and logprobs is None:
        raise Refused("processed_logprobs without logprobs: ask for both", param="processed_logprobs")
    return Call(
        kind, prompts, sampling, body.get("n", 1), body.get("stream", False),
        body.get("stream_options", {}).get("include_usage", False), echo, logprobs, prompt_logprobs,
        body.get("return_token_ids", False), body.get("user", ""), body.get("priority", 0),
    )  # fmt: skip


@contextlib.contextmanager
def named_fields(kind: Kind) -> Iterator[None]:
    """Turns a UserError about a field, with which its message begins, into a Refused that names it."""
    try:
        yield
    except Refused:
        raise
    except UserError as error:
        message = str(error).removeprefix("sampling: ")
        name = re.match(r"\w*", message)[0]  # type: ignore[index]
        field = {"chat": "messages", "completion": "prompt"}[kind] if name in ("prompt", "tokenizer") else name
        known = (CHAT if kind == "chat" else COMPLETION)["properties"]
        raise Refused(message, param=field if field in known else None) from error


def tokenize(raw: bytes, llm: LLM, model: str) -> list[int]:
    """The tokens that /tokenize is asked for."""
    body = parse(raw, TOKENIZE, model)
    if ("prompt" in body) == ("messages" in body):
        raise Refused("expected either prompt or messages", param="prompt")
    if "messages" in body:
        if "add_special_tokens" in body:
            raise Refused("add_special_tokens with messages: their template has its own", param="add_special_tokens")
        with named_fields("chat"):
            return _chat_prompt(body["messages"], llm)
    with named_fields("completion"):
        return llm.tokenizer.encode(body["prompt"], None if body.get("add_special_tokens", True) else False)


def detokenize(raw: bytes, llm: LLM, model: str) -> str:
    """The text that /detokenize is asked for, special tokens included."""
    tokens: list[int] = parse(raw, DETOKENIZE, model)["tokens"]
    _check_known("tokens", tokens, llm)
    return llm.tokenizer.decode(tokens)


def _check_choices(body: Mapping[str, Any], most: int) -> None:
    """Before anything is made of it: a small body can ask for very many."""
    prompt, n = body.get("prompt"), body.get("n", 1)
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    if prompts * n > most:
        raise Refused(
            f"{prompts * n} choices in one call, expected at most {most}, as many as may wait",
            param="n" if prompts == 1 else "prompt",
        )


def _check_known(name: str, tokens: Iterable[int], llm: LLM) -> None:
    vocabulary = llm.config.vocab_size
    if (largest := max(tokens, default=0)) >= vocabulary:
        raise Refused(f"{name}: token {largest} is not in the vocabulary, expected 0 to {vocabulary - 1}", param=name)


def _load(raw: bytes) -> Any:
    def real(text: str) -> float:
        value = float(text)
        whole = value.is_integer() and abs(value) < 2**53
        return int(value) if whole else value  # to JSON 3.0 and 3 are the same number

    def whole_number(text: str) -> int:
        if len(text) > MOST_DIGITS:
            raise Refused(f"found a number of {len(text)} digits, expected at most {MOST_DIGITS}")
        return int(text)

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise Refused(f"{json.dumps(twice[:60])[1:-1]}: found more than once, expected once", param=twice)
        return found

    try:
        return json.loads(
            raw, parse_int=whole_number, parse_float=real, parse_constant=constant, object_pairs_hook=fields
        )
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"the body is not JSON: {' '.join(str(error).split()):.120}") from None


def _prompts(prompt: Any, llm: LLM) -> list[list[int]]:
    if isinstance(prompt, str):
        return llm.tokenizer.encode_batch([prompt])
    if isinstance(prompt[0], str):
        return llm.tokenizer.encode_batch(prompt)
    return [prompt] if isinstance(prompt[0], int) else prompt


def _chat_prompt(messages: Sequence[Mapping[str, Any]], llm: LLM) -> list[int]:
    """The tokens of a conversation under the model's template, up to where the answer goes on."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    # What OpenAI's newer models call the developer's, the templates of others know as the system's.
    roles = {"developer": "system"}
    plain = [{"role": roles.get(m["role"], m["role"]), "content": text(m["content"])} for m in messages]
    return llm.tokenizer.encode(llm.tokenizer.apply_chat_template(plain), add_bos=False)


def _logprobs(kind: Kind, body: Mapping[str, Any]) -> int | None:
    if kind == "completion":
        return body.get("logprobs")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise Refused("top_logprobs without logprobs: true: ask for both", param="top_logprobs")
    return body.get("top_logprobs", 0) if body.get("logprobs") else None


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    if len(given) > BIASES:
        raise Refused(f"logit_bias: found {len(given)} tokens, expected at most {BIASES}", param="logit_bias")
    # 01 would be a second name of 1.
    if wrong := [token for token in given if not re.fullmatch("0|[1-9][0-9]{0,9}", token)]:
        raise Refused(f"logit_bias: found {wrong[0]!r:.60}, expected token ids as its names", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _max_tokens(kind: Kind, body: Mapping[str, Any], prompts: Sequence[Sequence[int]], llm: LLM) -> int:
    """As asked, if there is room for so many; in a chat as many as there is room for if nothing is said."""
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise Refused("max_tokens and max_completion_tokens are the same: give one", param="max_tokens")
    field = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    wanted, longest = body.get(field), max(map(len, prompts))
    room = llm.engine.max_context - longest
    least = wanted if wanted is not None else 1
    if room < least:
        raise Refused(
            f"a prompt of {longest} tokens and {field} of {least} are more than the context of "
            f"{llm.engine.max_context}: shorten one",
            param=field if room > 0 else "messages" if kind == "chat" else "prompt",
            code="context_length_exceeded",
        )
    return wanted if wanted is not None else 16 if kind == "completion" else room
