"""The OpenAPI document of the server, from the schemas by which it checks."""

from __future__ import annotations

from typing import Any

from jaxsys.serve.protocol import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from jaxsys.serve.schema import Schema

_POSTS = {
    "/v1/completions": ("Continues a prompt", COMPLETION, "text/event-stream"),
    "/v1/chat/completions": ("Answers a conversation", CHAT, "text/event-stream"),
    "/tokenize": ("The tokens of a text or a conversation", TOKENIZE, None),
    "/detokenize": ("The text of tokens", DETOKENIZE, None),
}
_GETS = {
    "/v1/models": ("The model that is served", "application/json", (401,)),
    "/health": ("Whether the process lives and its engine works", "application/json", (503,)),
    "/ready": ("Whether requests are taken", "application/json", (503,)),
    "/metrics": ("For Prometheus", "text/plain", ()),
}
_ERRORS = {400: "refused", 401: "no valid key", 404: "no such model", 408: "the body came too slowly",
           413: "a body too large", 415: "a coded body", 429: "too many wait", 500: "a defect",
           503: "shutting down, or failed"}  # fmt: skip


def document(model: str, keys: bool) -> dict[str, Any]:
    """The document of a server of ``model``. keys: whether an API key is needed."""
    security: list[Any] = [{"key": []}] if keys else []
    paths: dict[str, Any] = {}
    for path, (summary, schema, stream) in _POSTS.items():
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if stream is not None:
            content[stream] = {}
        paths[path] = {
            "post": {
                "summary": summary,
                "security": security,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _published(schema, model)}},
                },
                "responses": {"200": {"description": "done", "content": content}, **_errors(_ERRORS)},
            }
        }
    for path, (summary, kind, errors) in _GETS.items():
        result = {"type": "object" if kind == "application/json" else "string"}
        done = {"description": "done", "content": {kind: {"schema": result}}}
        described: dict[str, Any] = {"summary": summary, "responses": {"200": done, **_errors(errors)}}
        if 401 in errors:
            described["security"] = security
        paths[path] = {"get": described}
    error = {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
                "required": ["message", "type", "param", "code"],
            }
        },
        "required": ["error"],
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxsys", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _errors(statuses: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}


def _published(schema: Schema, model: str) -> dict[str, Any]:
    """With the model's name, and fields that need not be given allowed to be null, which is the same."""
    required = schema.get("required", ())
    properties = {
        name: each if name in required else {"anyOf": [each, {"type": "null"}]}
        for name, each in {**schema["properties"], "model": {"enum": [model]}}.items()
    }
    return {**schema, "properties": properties}
