"""Says in words what a JSON Schema says of a key: for the page of keys, `octavo explain` and an editor's hints."""

from __future__ import annotations

import json
from typing import Any

from framework.schema.base import UNIT
from framework.schema.wording import PATTERN_WORDS

Json = dict[str, Any]

_NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "null": "null",
    "object": "names with values",
}
_MEASURED = ("integer", "number", "array")
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def is_section(schema: Json) -> bool:
    """Whether a key holds keys of its own."""
    return "properties" in schema


def members(schema: Json) -> list[Json]:
    """The kinds of value that a key takes, each as a schema of its own; null is one of them."""
    if "anyOf" in schema:
        return [member for member in schema["anyOf"] if isinstance(member, dict)]
    if isinstance(schema.get("type"), list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    return [schema]


def values_in_words(schema: Json, mark: str = "") -> str:
    """Say which values a key takes, e.g. "whole number, ≥ 1" or "fp8, bf16".

    mark: put around each value that is to be written as it stands, "`" in Markdown.
    """
    unit = f" ({schema[UNIT]})" if UNIT in schema else ""
    words = [
        _member_in_words(member, mark) + (unit if member.get("type") in _MEASURED else "")
        for member in members(schema)
    ]
    return " or ".join(words)


def default_in_words(schema: Json, *, required: bool, mark: str = "") -> str:
    """Write a key's default as YAML would; "none, must be set" where it has none."""
    if required:
        return "none, must be set"
    if "default" not in schema:
        return "empty"
    return "null" if schema["default"] is None else f"{mark}{as_yaml(schema['default'])}{mark}"


def as_yaml(value: Any) -> str:
    """Write a value as it stands in YAML and on the command line."""
    if isinstance(value, str):
        return value if value.strip() and value == value.strip() else json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(_in_list(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_in_list(item)}' for key, item in value.items())}}}"
    if isinstance(value, float):
        return _short_float(value)
    return json.dumps(value)


def example_in_words(schema: Json) -> str:
    """One value that shows how the key is written, rather not the default; "" where the schema has none."""
    choices = schema.get("examples") or [
        value for member in members(schema) for value in _choices(member)
    ]
    if not choices:
        return ""
    return as_yaml(next((v for v in choices if v != schema.get("default")), choices[0]))


def _member_in_words(member: Json, mark: str) -> str:
    if "enum" in member:
        return ", ".join(f"{mark}{as_yaml(value)}{mark}" for value in member["enum"])
    kind = member.get("type", "")
    if kind == "array":
        return _list_in_words(member, mark)
    words = PATTERN_WORDS.get(member.get("pattern", ""), str(_NAMES.get(kind, kind)))
    limits = [f"{sign} {as_yaml(member[word])}" for word, sign in _BOUNDS.items() if word in member]
    return ", ".join([words, *limits])


def _list_in_words(member: Json, mark: str) -> str:
    items = member["items"]
    inner = values_in_words(items[0] if isinstance(items, list) else items, mark)
    low, high = member.get("minItems"), member.get("maxItems")
    if low is not None and low == high:
        return f"list of {low}: {inner}"
    return f"list of {inner}" + (", not empty" if low else "")


def _choices(member: Json) -> list[Any]:
    if member.get("type") == "boolean":
        return [True, False]
    return list(member.get("enum", []))


def _short_float(value: float) -> str:
    """Write 0.0001 as 1e-4, as people write learning rates, and 16.0 with its point."""
    if value == int(value):
        return f"{value:.1f}"
    text = f"{value:g}"
    if 0 < abs(value) < 1e-2:
        digits, _, exponent = f"{value:e}".partition("e")
        short = f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
        return min(short, text, key=len)
    return text


def _in_list(item: Any) -> str:
    if isinstance(item, dict):
        return as_yaml(item)
    plain = isinstance(item, str) and not any(sign in item for sign in ",[]{}: ")
    return item if plain and item else json.dumps(item, ensure_ascii=False)
