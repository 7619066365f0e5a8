"""Checks a JSON value against a JSON schema, of which it knows what the server's own schemas use.

The same schemas are published in the OpenAPI document, so that what it says is what is checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxsys.serve.errors import Refused

Schema = Mapping[str, Any]

_WORDS = {
    "string": "a text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}


def check(value: Any, schema: Schema, at: str = "") -> None:
    """Raises Refused, which names the field, for a value that the schema does not allow. at: the field's name."""
    if "anyOf" in schema:
        _check_any(value, schema, at)
        return
    if "enum" in schema:
        if not any(type(value) is type(each) and value == each for each in schema["enum"]):
            _refuse(value, " or ".join(map(json.dumps, schema["enum"])) + ": nothing else is supported", at)
        return
    kind = schema["type"]
    if not _is(value, kind):
        _refuse(value, expected(schema), at)
    if kind in ("integer", "number"):
        low, above, high = (schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
        if (low is not None and value < low) or (above is not None and value <= above):
            _refuse(value, expected(schema), at)
        if high is not None and value > high:
            _refuse(value, expected(schema), at)
    elif kind == "string" and len(value) < schema.get("minLength", 0):
        _refuse(value, "a text that is not empty", at)
    elif kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            raise Refused(f"{at}: found {len(value)} entries, expected {expected(schema)}", param=at)
        if _all_within(value, schema["items"]):
            return
        for i, each in enumerate(value):
            check(each, schema["items"], f"{at}[{i}]")
    elif kind == "object":
        _check_object(value, schema, at)


def expected(schema: Schema) -> str:
    """What a schema allows, in words."""
    if "description" in schema and "anyOf" in schema:
        return str(schema["description"])
    kind, words = schema["type"], _WORDS[schema["type"]]
    if kind in ("integer", "number"):
        low, above, high = (schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
        words += "" if low is None else f" of at least {low}"
        words += "" if above is None else f" of more than {above}"
        if high is not None:
            words += f" and at most {high}" if low is not None or above is not None else f" of at most {high}"
    elif kind == "array":
        if "minItems" in schema:
            words += f" of at least {schema['minItems']}"
        if "maxItems" in schema:
            words += f" of at most {schema['maxItems']}"
    return words


def _all_within(values: list[Any], schema: Schema) -> bool:
    """Whether all are whole numbers that the schema allows, found without a look at each: prompts may be long."""
    if schema.get("type") != "integer" or not values or set(map(type, values)) != {int}:
        return False
    return bool(min(values) >= schema["minimum"] and max(values) <= schema["maximum"])


def _is(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (kind == "number" and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, {"string": str, "boolean": bool, "array": list, "object": dict}[kind])


def _check_any(value: Any, schema: Schema, at: str) -> None:
    inside: list[tuple[list[int], Refused]] = []
    for each in schema["anyOf"]:
        try:
            check(value, each, at)
            return
        except Refused as refused:
            if refused.param != at:
                inside.append(([int(i) for i in re.findall(r"\[(\d+)\]", refused.param or "")], refused))
    # What was right the farthest was meant; if there are several nobody knows which.
    farthest = max((where for where, _ in inside), default=None)
    meant = [refused for where, refused in inside if where == farthest]
    if len(meant) == 1:
        raise meant[0]
    _refuse(value, expected(schema), at)


def _check_object(value: dict[str, Any], schema: Schema, at: str) -> None:
    inside = f"{at}." if at else ""
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", False)
    for name, each in properties.items():  # before what is missing: another type of part has other fields
        if name in value and "enum" in each:
            check(value[name], each, f"{inside}{name}")
    for name in schema.get("required", ()):
        if name not in value:
            raise Refused(f"{inside}{name} is missing, expected {_what(properties[name])}", param=f"{inside}{name}")
    for name, each in value.items():
        if name in properties:
            check(each, properties[name], f"{inside}{name}")
        elif others:
            check(each, others, f"{inside}{name}")
        else:
            known, found = ", ".join(sorted(properties)), inside + json.dumps(name[:60])[1:-1]
            raise Refused(
                f"{found}: no such field, or not supported; the fields are {known}",
                param=found,
                code="unknown_parameter",
            )


def _what(schema: Schema) -> str:
    return " or ".join(map(json.dumps, schema["enum"])) if "enum" in schema else expected(schema)


def _refuse(value: Any, wanted: str, at: str) -> None:
    found = json.dumps(value)
    found = found if len(found) <= 60 else found[:57] + "..."
    raise Refused(f"{at or 'the body'}: found {found}, expected {wanted}", param=at or None)
