"""The page of all configuration keys, made from the schema so that it can't be wrong."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from framework.schema.run import RunConfig

INTRODUCTION = """# Configuration keys

Made by `octavo schema --format markdown`; a test fails when this page is stale. `octavo schema` prints the same as JSON Schema.

A key is set in a recipe's YAML or on the command line: `python train.py recipe=pocket_lora optim.lr=5e-4`.
"""


def render_reference() -> str:
    """Write the page: one table per section, one row per key with values, default and meaning."""
    parts = [INTRODUCTION]
    for title, section in iter_sections("", RunConfig):
        rows = [
            f"| `{title + '.' if title else ''}{name}` | {describe_type(field)} "
            f"| {describe_default(field)} | {(field.description or '').replace('|', chr(92) + '|')} |"
            for name, field in section.model_fields.items()
            if not nested_section(field)
        ]
        if not rows:
            continue
        heading = f"## `{title}`" if title else "## The whole run"
        summary = (section.__doc__ or "").strip().splitlines()[0]
        table = ["| key | values | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([heading, "", summary, "", *table, ""]))
    return "\n".join(parts)


def iter_sections(path: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every (dotted path, section), the outer before the inner."""
    yield path, section
    for name, field in section.model_fields.items():
        inner = nested_section(field)
        if inner is not None:
            yield from iter_sections(f"{path}.{name}" if path else name, inner)


def nested_section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a key holds, or None for a plain value."""
    for option in union_members(field.annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Split `A | B` into its members; a plain type is its own only member."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def describe_type(field: FieldInfo) -> str:
    """Name the values that a key takes, in Markdown."""
    described = " or ".join(
        describe_annotation(member) for member in union_members(field.annotation)
    )
    bounds = [describe_bound(constraint) for constraint in field.metadata]
    limits = ", ".join(bound for bound in bounds if bound)
    return f"{described}, {limits}" if limits else described


def describe_bound(constraint: object) -> str:
    """Write a range constraint as people do; "" for anything else."""
    match constraint:
        case Ge(ge=low):
            return f"≥ {low}"
        case Gt(gt=low):
            return f"> {low}"
        case Le(le=high):
            return f"≤ {high}"
        case Lt(lt=high):
            return f"< {high}"
    return ""


def describe_annotation(annotation: Any) -> str:
    """Name one type in words of YAML."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is typing.Annotated:
        return describe_annotation(args[0])
    if origin is tuple:
        inner = describe_annotation(args[0])
        return f"list of {inner}" if args[-1] is Ellipsis else f"{len(args)} × {inner}"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true, false",
        type(None): "null",
    }
    return names.get(annotation, str(annotation))


def describe_default(field: FieldInfo) -> str:
    """Write a default as YAML would; "required" where there is none."""
    if field.default is PydanticUndefined:
        return "required"
    default = field.default
    if default is None:
        return "null"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(str(item) for item in default)}]`"
    return f"`{default}`" if default != " " else '`" "`'
