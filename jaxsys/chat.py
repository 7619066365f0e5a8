"""Chat templates: Jinja sources that models bring, rendered in a sandbox as transformers renders them."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from parallelism.errors import UserError


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training masks; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - the library's interface

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, **{"ensure_ascii": False, **options})


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def render(
    source: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special_tokens: Mapping[str, str]
) -> str:
    """The text of a conversation under the template ``source``.

    messages: mappings with ``role`` and ``content``. special_tokens: ``bos_token`` and the like, by name.
    Raises UserError if the template is broken or refuses the messages.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UserError(f"chat: message {i} has no role; expected a mapping with 'role' and 'content'")
    try:
        return _compile(source).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special_tokens,
        )
    except Exception as error:  # a template is a program, and can fail in any way that one can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"chat: the model's template cannot render these messages: {reason}") from error
