"""Configuration: frozen dataclasses, changed by dotted names, written as JSON.

A field may hold one of several dataclasses (an optimizer, a schedule): it is chosen by name and its fields are
then set below it. Every name that does not exist is an error with the nearest ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from parallelism.errors import UserError, unknown_name

Config = TypeVar("Config")


class BadValue(UserError):
    """A value that a configuration's own class refuses. ``from_dict`` completes the key with those it lies below."""

    def __init__(self, key: str, found: Any, expected: str):
        super().__init__(f"configuration key {key}: found {found!r}, expected {expected}")
        self.key, self.found, self.expected = key, found, expected


def expect(config: Any, expected: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises BadValue for a field that is neither None nor as expected; no number may be infinite or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not ((not isinstance(value, float) or math.isfinite(value)) and holds(value)):
            raise BadValue(name, value, expected)


def expect_at_least(config: Any, least: float, *names: str) -> None:
    expect(config, f"at least {least}", lambda value: value >= least, *names)


def expect_positive(config: Any, *names: str) -> None:
    expect(config, "a number above 0", lambda value: value > 0, *names)


def expect_text(config: Any, *names: str) -> None:
    expect(config, "a text that is not empty", bool, *names)


def kind(cls: Any) -> str:
    """The name by which a dataclass is chosen among alternatives: ``AdamW`` is ``adamw``."""
    return cls.__name__.lower()


def to_dict(config: Any) -> Any:
    """A configuration as plain JSON values; a dataclass that was chosen among several says its ``kind``."""
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    if not dataclasses.is_dataclass(config):
        return config
    out: dict[str, Any] = {}
    for field, hint in _fields(type(config)).items():
        value = getattr(config, field)
        out[field] = to_dict(value)
        if dataclasses.is_dataclass(value) and len(_dataclasses(hint)) > 1:
            out[field] = {"kind": kind(type(value)), **out[field]}
    return out


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "") -> Config:
    """The inverse of ``to_dict``. Raises UserError for unknown keys and values of the wrong type."""
    hints = _fields(cls)
    for name in values:
        if name not in hints:
            raise unknown_name("configuration key", where + name, [where + known for known in hints])
    fields = {name: _value(hints[name], value, where + name) for name, value in values.items()}
    try:
        return cls(**fields)
    except BadValue as error:
        raise BadValue(where + error.key, error.found, error.expected) from None
    except UserError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:  # keys that are missing, or do not fit together
        raise UserError(f"configuration {where.rstrip('.') or cls.__name__}: {error}") from error


def override(config: Config, assignments: Iterable[str]) -> Config:
    """The configuration with ``"optim.learning_rate=1e-3"`` and the like applied, in order."""
    values = to_dict(config)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r}: expected KEY=VALUE, for example seed=1")
        _set(type(config), values, name.strip().split("."), text.strip(), "")
    # Checked as a whole: keys that depend on each other may be set in any order.
    return from_dict(type(config), values)


def dumps(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2)


def _set(cls: type, values: dict[str, Any], path: list[str], text: str, where: str) -> None:
    hints = _fields(cls)
    name = path[0]
    if name not in hints:
        raise unknown_name("configuration key", where + name, [where + known for known in hints])
    if len(path) > 1:
        inner, classes = values.get(name), _dataclasses(hints[name])
        if not isinstance(inner, dict):
            raise UserError(
                f"configuration key {where + '.'.join(path)!r}: {where + name} is {inner!r}, it has no keys"
            )
        if len(classes) > 1 and path[1:] == ["kind"]:
            _choose(classes, text, where + name)
            raise UserError(f"configuration key {where}{name}.kind: found {text!r}, give {where}{name}={text}")
        inner_cls = _choose(classes, inner["kind"], where + name) if len(classes) > 1 else classes[0]
        _set(inner_cls, inner, path[1:], text, f"{where}{name}.")
        return
    value, classes = _parse(hints[name], text), _dataclasses(hints[name])
    if classes and value is not None and len(_members(hints[name])) > 1:  # by name, with the defaults of its own keys
        _choose(classes, value, where + name)
        values[name] = {"kind": value} if len(classes) > 1 else {}
    elif classes and value is not None:
        own = ", ".join(f"{where}{name}.{key}" for key in _fields(classes[0]))
        raise UserError(f"configuration key {where + name!r}: found {text!r}, expected one of its own keys: {own}")
    else:
        values[name] = to_dict(_value(hints[name], value, where + name))


def _parse(hint: Any, text: str) -> Any:
    """Command-line text to a plain value; text stays text where the field takes text."""
    if text.lower() == "none" and type(None) in _members(hint):
        return None
    if str in _members(hint) or _dataclasses(hint):
        return text
    tuples = [member for member in _members(hint) if typing.get_origin(member) is tuple]
    if tuples and not text.startswith("["):
        item = typing.get_args(tuples[0])[0]
        return [_parse(item, part.strip()) for part in text.split(",") if part.strip()]
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        # Numbers as Python writes them, which JSON does not have.
        short = float in _members(hint) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
        return float(text) if short else text


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the field's type, or UserError."""
    members = _members(hint)
    if value is None and type(None) in members:
        return None
    classes = _dataclasses(hint)
    if classes and isinstance(value, str):
        return from_dict(_choose(classes, value, where), {}, where + ".")
    if classes and isinstance(value, dict):
        values = dict(value)
        cls = classes[0]
        if len(classes) > 1:
            cls = _choose(classes, values.pop("kind", "(no kind)"), where)
        return from_dict(cls, values, where + ".")
    for member in members:
        if member is bool and isinstance(value, bool):
            return value
        if member is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if member is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if member is str and isinstance(value, str):
            return value
        if typing.get_origin(member) is tuple and isinstance(value, (list, tuple)):
            return tuple(_value(typing.get_args(member)[0], item, where) for item in value)
        if typing.get_origin(member) is typing.Literal and value in typing.get_args(member):
            return value
    expected = " or ".join(_describe(member) for member in members)
    raise UserError(f"configuration key {where}: found {value!r}, expected {expected}")


def _choose(classes: list[type], name: str, where: str) -> type:
    by_name = {kind(cls): cls for cls in classes}
    if name not in by_name:
        raise unknown_name(where.rpartition(".")[2], name, by_name)
    return by_name[name]


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _dataclasses(hint: Any) -> list[Any]:
    return [member for member in _members(hint) if dataclasses.is_dataclass(member)]


def _describe(member: Any) -> str:
    if member is type(None):
        return "none"
    if typing.get_origin(member) is typing.Literal:
        return ", ".join(map(str, typing.get_args(member)))
    if isinstance(member, type) and dataclasses.is_dataclass(member):
        return kind(member)
    return getattr(member, "__name__", str(member))
