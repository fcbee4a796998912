"""Says in words what a key takes and what was written, for reports and for `allowed` and `value` of a fault."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from framework.schema.paths import Pieces
from framework.schema.sizes import SIZE_PATTERN

_MAX_SHOWN = 60
_PLAIN = re.compile(r"[\w./:+~@%-]+")
# What the schema's patterns mean, for people; a test looks for patterns without words.
PATTERN_WORDS = {
    r"^(auto|cpu|mps|cuda(:\d+)?)$": "auto, cpu, mps, cuda or cuda:N",
    SIZE_PATTERN: "an amount of memory such as 24GiB or 512MiB",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits, dots, _ and -, beginning with a letter or a digit",
}
_PLAIN_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Slot:
    """What may stand at one place of the configuration.

    annotation: a type without `Annotated`.   limits: bounds, lengths and patterns that hold besides.
    field: the key that the place belongs to; None for elements of a list.
    """

    annotation: Any
    limits: tuple[object, ...] = ()
    field: FieldInfo | None = None

    @property
    def members(self) -> tuple[Slot, ...]:
        """The alternatives; limits of the whole hold for each. A plain type is its own only member."""
        if get_origin(self.annotation) not in (Union, types.UnionType):
            return (self,)
        return tuple(slot_of(member, self.limits) for member in get_args(self.annotation))

    @property
    def plain_members(self) -> tuple[Slot, ...]:
        """The alternatives without null."""
        return tuple(member for member in self.members if member.annotation is not type(None))

    @property
    def choices(self) -> tuple[str, ...]:
        """The fixed texts among what may stand here."""
        return tuple(
            str(choice)
            for member in self.members
            if get_origin(member.annotation) is Literal
            for choice in get_args(member.annotation)
        )

    @property
    def pattern(self) -> str | None:
        """The regular expression that a text here must match, if there is one."""
        return next(
            (p for p in (getattr(limit, "pattern", None) for limit in self.limits) if p), None
        )

    @property
    def list_length(self) -> int | None:
        """How many elements the list must have; None where it isn't fixed, or there is no list."""
        for member in self.members:
            inner = get_args(member.annotation)
            if get_origin(member.annotation) is tuple and Ellipsis not in inner:
                return len(inner)
        return None

    def takes(self, kind: type) -> bool:
        """Whether a value of this plain type may stand here."""
        return any(member.annotation is kind for member in self.members)

    def element(self, index: int) -> Slot | None:
        """What may stand at `index` of a list that stands here; None where no list does."""
        for member in self.members:
            inner = get_args(member.annotation)
            if get_origin(member.annotation) is tuple and inner:
                if inner[-1] is Ellipsis:
                    return slot_of(inner[0])
                return slot_of(inner[min(index, len(inner) - 1)])
            if get_origin(member.annotation) is list and inner:
                return slot_of(inner[0])
        return None


def slot_of(annotation: Any, limits: Sequence[object] = ()) -> Slot:
    """Take the limits out of an annotation such as `Annotated[float, Field(gt=0)]`."""
    if get_origin(annotation) is not Annotated:
        return Slot(annotation, tuple(limits))
    inner, *marks = get_args(annotation)
    found: list[object] = [*limits]
    for mark in marks:
        found += mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return slot_of(inner, found)


def slot_at(root: type[BaseModel], pieces: Pieces) -> Slot | None:
    """What may stand at the path `pieces` below `root`; None where the schema has no such key."""
    slot: Slot | None = Slot(root)
    for piece in pieces:
        if slot is None:
            return None
        if isinstance(piece, int):
            slot = slot.element(piece)
            continue
        section = section_class(slot.annotation)
        field = section.model_fields.get(piece) if section is not None else None
        if field is None:
            return None
        inner = slot_of(field.annotation, field.metadata)
        slot = Slot(inner.annotation, inner.limits, field)
    return slot


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation such as `LoraConfig | None`; None where it is a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        found = (section_class(argument) for argument in get_args(annotation))
        return next((section for section in found if section is not None), None)
    return None


def allowed_words(slot: Slot) -> str:
    """Name everything that may stand at a place, e.g. "one of fp8, bf16" or "a number greater than 0, or null"."""
    parts = list(dict.fromkeys(_member_words(member) for member in slot.plain_members))
    if len(parts) < len(slot.members):
        return f"{' or '.join(parts)}, or null"
    return " or ".join(parts)


def _member_words(member: Slot) -> str:
    annotation = member.annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        choices = [str(choice) for choice in inner]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (tuple, list):
        return _list_words(member, slot_of(inner[0]))
    section = section_class(annotation)
    if section is not None:
        return f"a section with the keys {', '.join(section.model_fields)}"
    words = _PLAIN_TYPES.get(annotation, "a value")
    limits = limit_words(member)
    if annotation is str and limits and not limits.startswith("that"):
        return limits
    return f"{words} {'of ' if limits.startswith('at ') else ''}{limits}" if limits else words


def _list_words(member: Slot, element: Slot) -> str:
    least = next((limit.min_length for limit in member.limits if isinstance(limit, MinLen)), 0)
    count = f"{member.list_length} " if member.list_length else f"{least} or more " if least else ""
    if element.choices:
        return f"a list of {count}values out of {', '.join(element.choices)}"
    kind = {int: "whole numbers", float: "numbers", str: "texts"}.get(element.annotation, "values")
    limits = limit_words(element) if element.annotation is not str else ""
    return f"a list of {count}{kind}" + (f", each {limits}" if limits else "")


def limit_words(member: Slot) -> str:
    """Name bounds, length and pattern, e.g. "greater than 0 and at most 1"; "" without any."""
    bounds: list[str] = []
    for limit in member.limits:
        match limit:
            case Ge(ge=low):
                bounds.append(f"at least {number_text(low)}")
            case Gt(gt=low):
                bounds.append(f"greater than {number_text(low)}")
            case Le(le=high):
                bounds.append(f"at most {number_text(high)}")
            case Lt(lt=high):
                bounds.append(f"less than {number_text(high)}")
            case MinLen(min_length=1) if member.annotation is str:
                return "that isn't empty"
            case MinLen() | MaxLen():
                continue
        if isinstance(limit, StringConstraints) and limit.min_length:
            return "that isn't empty"
        pattern = getattr(limit, "pattern", None)
        if pattern:
            return PATTERN_WORDS.get(str(pattern), f"of the form {pattern}")
    return " and ".join(bounds)


def example_value(slot: Slot | None) -> str:
    """Something that may stand at a place, preferably its default, as typed on the command line; "..." if unknown."""
    if slot is None:
        return "..."
    default = slot.field.default if slot.field is not None else PydanticUndefined
    if default not in (PydanticUndefined, None, ()):
        return _typed(default)
    examples = (slot.field.examples if slot.field is not None else None) or []
    if not examples and slot.field is not None and isinstance(slot.field.json_schema_extra, dict):
        extra: Any = slot.field.json_schema_extra.get("examples")
        examples = extra if isinstance(extra, list) else []
    if examples:
        return _typed(examples[0])
    return slot.choices[0] if slot.choices else "..."


def _typed(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(yaml_text(item) for item in value)}]"
    return yaml_text(value)


def shown(value: object) -> str:
    """Write a value for a sentence: texts in quotes, a section by its keys, long values cut."""
    if isinstance(value, Mapping):
        keys = ", ".join(str(key) for key in value)
        return _cut(f"a section with {keys}" if keys else "an empty section")
    if isinstance(value, str):
        return _cut(repr(value))
    return _cut(yaml_text(value))


def yaml_text(value: object) -> str:
    """Write a value on one line as YAML would."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), number_text(value))
    return '""' if value == "" else str(value)


def assignment(key: str, value: object) -> str:
    """Write a setting as typed on the command line, quoted where Hydra or the shell would take it apart."""
    if isinstance(value, list | tuple):
        plain = all(not isinstance(item, str) or _PLAIN.fullmatch(item) for item in value)
        items = ",".join(str(item) if plain else f'"{item}"' for item in value)
        return f"{key}=[{items}]" if plain else f"'{key}=[{items}]'"
    text = yaml_text(value)
    if not isinstance(value, str) or _PLAIN.fullmatch(text):
        return f"{key}={text}"
    return f"'{key}=\"{text}\"'"


def number_text(value: Any) -> str:
    """Write a number as people do: 1e-05 as 1e-5, 2.0 as 2."""
    if isinstance(value, int):
        return str(value)
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    mantissa = mantissa.removesuffix(".0")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"
