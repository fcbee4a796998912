"""Puts one fault that pydantic found into words: what was written, what is allowed, the nearest name, the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from framework.errors import Fault
from framework.schema.findings import Where
from framework.schema.names import known_paths, nearest_paths, sorted_by_nearness
from framework.schema.paths import Pieces, join_path
from framework.schema.renamed import (
    Renamed,
    explain_key,
    removed_key,
    value_called_elsewhere,
)
from framework.schema.wording import (
    Slot,
    allowed_words,
    assignment,
    example_value,
    limit_words,
    section_class,
    shown,
    slot_at,
    yaml_text,
)

_MAX_LISTED = 14
_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
_LENGTH = ("too_short", "too_long", "string_too_short", "string_too_long", "missing")
_NUMBER = re.compile(r"^(int|float|finite)_")
_SUFFIXED = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<suffix>[kKmM%])")
_FACTORS = {"k": 1000, "m": 1000**2}


@dataclass(frozen=True)
class Describer:
    """Writes faults of one section class.

    root: the class whose values are judged.   where: path -> what set it.
    prefix: path of the section in the configuration, e.g. "hydra.launcher"; "" for a whole run.
    """

    root: type[BaseModel]
    where: Where
    prefix: str = ""

    def path_of(self, pieces: Pieces) -> str:
        """Dotted path as written by a person."""
        return self._prefixed(join_path(pieces))

    def _prefixed(self, path: str) -> str:
        return f"{self.prefix}.{path}" if self.prefix and path else path or self.prefix

    def value_fault(self, pieces: Pieces, details: Sequence[ErrorDetails]) -> Fault:
        """A value that isn't allowed. details: all that pydantic says of this key, one per alternative."""
        kinds = {detail["type"] for detail in details}
        found = details[0]["input"]
        slot = slot_at(self.root, pieces)
        path = self.path_of(pieces)
        if slot is None:
            message = f"{shown(found)} is not allowed; {details[0]['msg'].lower()}"
            return Fault(path, message, self.where(path), hint=self._look_up(path), value="")
        allowed = allowed_words(slot)
        nearest = _nearest_values(path, found, slot)
        if join_path(pieces) == "model.family":
            message = f"there is no model family {shown(found)}; allowed: {', '.join(slot.choices)}"
            hint = "A new family is one file and one YAML; see docs/adding_a_family.md."
        else:
            message = _message(slot, kinds, found, allowed)
            hint = _hint_for_value(slot, kinds, found, path, nearest)
            hint = hint or _hint_for_choice(slot, nearest, path)
            if not hint or (slot.choices and not nearest and not self.prefix):
                hint = f"{hint} {self._look_up(path)}".strip()
        return Fault(
            path,
            message,
            self.where(path),
            nearest,
            hint,
            code=_code(slot, kinds, found),
            value=yaml_text(found),
            allowed=allowed,
        )

    def not_a_number(self, pieces: Pieces, found: object) -> Fault:
        """True or false where a number belongs, which Python would take for 1 or 0."""
        path, slot = self.path_of(pieces), slot_at(self.root, pieces)
        allowed = allowed_words(slot) if slot is not None else "a number"
        return Fault(
            path,
            f"must be a number, not {yaml_text(found)}; allowed: {allowed}",
            self.where(path),
            hint=f"Write a number, e.g. {path}={example_value(slot)}.",
            code="wrong-type",
            value=yaml_text(found),
            allowed=allowed,
        )

    def missing(self, pieces: Pieces) -> Fault:
        """A key without default that wasn't given."""
        path, slot = self.path_of(pieces), slot_at(self.root, pieces)
        description = slot.field.description if slot is not None and slot.field is not None else ""
        about = f": {description.rstrip('.')}" if description else ""
        place = self.where(path)
        example = example_value(slot)
        hint = f"Set it in the recipe or on the command line: {path}=..."
        if example != "...":
            hint += f" (for instance {path}={example})."
        return Fault(
            path,
            f"must be set{about}",
            "" if place == "default" else place,
            hint=hint,
            code="missing-key",
            allowed=allowed_words(slot) if slot is not None else "",
        )

    def unknown_key(self, pieces: Pieces, found: object) -> Fault:
        """An unknown key. A section of which one key was set is named with that key, as it was typed."""
        pieces = tuple(pieces)
        renamed = self._renamed(pieces)
        while renamed is None and isinstance(found, Mapping) and len(found) == 1:
            key, found = next(iter(found.items()))
            pieces = (*pieces, str(key))
            renamed = self._renamed(pieces)
        path = self.path_of(pieces)
        if pieces[-1] == "_target_":
            message = "unknown key; nothing in a configuration is imported or called"
            hint = "A configuration holds data only. Remove the key."
            return Fault(path, message, self.where(path), hint=hint, code="unknown-key")
        value = "" if isinstance(found, Mapping) or found is None else yaml_text(found)
        if renamed is not None:
            return renamed.fault(path, self.where(path), found)
        below = [str(key) for key in found] if isinstance(found, Mapping) else []
        nearest = self._nearest(pieces, below)
        allowed = self._siblings(pieces)
        hint = self._hint_for_key(nearest, found, value)
        fits = nearest and {f"{nearest[0]}.{key}" for key in below} <= set(known_paths(self.root))
        elsewhere = [] if self.prefix or fits else _counterparts(self.root, path, below)
        if elsewhere:
            hint = f"Its keys belong elsewhere: {', '.join(elsewhere)}."
        return Fault(
            path,
            f"unknown key; {allowed}",
            self.where(path),
            nearest,
            hint,
            code="unknown-key",
            value=value,
            allowed=allowed,
        )

    def _renamed(self, pieces: Pieces) -> Renamed | None:
        if self.prefix:
            return None
        path = join_path(pieces)
        return removed_key(path) or explain_key(path)

    def _nearest(self, pieces: Pieces, below: Sequence[str]) -> tuple[str, ...]:
        if any(isinstance(piece, int) for piece in pieces):
            return ()
        found = nearest_paths(self.root, join_path(pieces), below=below)
        return tuple(self._prefixed(path) for path in found)

    def _siblings(self, pieces: Pieces) -> str:
        """Name what the innermost known section around an unknown key holds, nearest first."""
        depth = len(pieces) - 1
        while depth and slot_at(self.root, pieces[:depth]) is None:
            depth -= 1
        slot = slot_at(self.root, pieces[:depth])
        section = section_class(slot.annotation) if slot is not None else None
        names = sorted_by_nearness(str(pieces[depth]), list((section or self.root).model_fields))
        listed = ", ".join(names[:_MAX_LISTED]) + (", …" if len(names) > _MAX_LISTED else "")
        around = self.path_of(pieces[:depth])
        return f"{around or 'a configuration'} has {listed}"

    def _hint_for_key(self, nearest: Sequence[str], found: object, value: str) -> str:
        if not nearest:
            return f"Remove it. {self._look_up('')}"
        if isinstance(found, Mapping) or value in ("", "???"):
            return f"Write {nearest[0]} instead."
        is_section = not self.prefix and f"{nearest[0]}." in " ".join(known_paths(self.root))
        if is_section:
            return f"Set a key of the section {nearest[0]}."
        return f"Write {assignment(nearest[0], found)}."

    def _look_up(self, path: str) -> str:
        """Where the keys can be looked up. Only those of a run are known to `octavo explain`."""
        if self.prefix:
            return f"Its keys are listed under `{self.prefix}` in docs/sweeps.md."
        if not path:
            return "All keys are listed by `octavo schema` and in docs/config.md."
        return f"`octavo explain {path.partition('[')[0]}` says what it takes."


def _message(slot: Slot, kinds: set[str], found: object, allowed: str) -> str:
    """Say what is wrong with a value and what is allowed."""
    members = slot.plain_members
    alone = members[0] if len(members) == 1 else None
    if slot.list_length is not None and kinds & {"missing", "too_short", "too_long", "tuple_type"}:
        return f"{shown(found)} is not allowed; it must be a list of {slot.list_length} values"
    if alone is not None and kinds <= set(_RANGE):
        return f"{shown(found)} is not allowed; it must be {limit_words(alone)}"
    if alone is not None and any(_NUMBER.match(kind) for kind in kinds):
        noun = "a whole number" if alone.annotation is int else "a number"
        if "finite_number" in kinds:
            noun = "a finite number"
        limits = limit_words(alone)
        null = ", or null" if len(slot.members) > 1 else ""
        return f"{shown(found)} is not {noun}" + (f"; it must be {limits}{null}" if limits else "")
    return f"{shown(found)} is not allowed; it must be {allowed}"


def _code(slot: Slot, kinds: set[str], found: object) -> str:
    if slot.choices and isinstance(found, str):
        return "wrong-value"
    if kinds & set(_RANGE):
        return "out-of-range"
    if kinds & set(_LENGTH):
        return "wrong-length"
    if "string_pattern_mismatch" in kinds:
        return "wrong-value"
    return "wrong-type"


def _hint_for_value(
    slot: Slot, kinds: set[str], found: object, path: str, nearest: Sequence[str]
) -> str:
    """The next step for a value of the wrong kind; "" where the choices say it."""
    example = example_value(slot)
    section = section_class(slot.annotation)
    if section is not None:
        first = next(iter(section.model_fields), "KEY")
        return f"Set a key below it, e.g. {path}.{first}=..., or leave the section out."
    if path.endswith("]"):
        return f"Correct this element, or give the whole list: {path.partition('[')[0]}=[...]."
    if isinstance(found, Mapping):
        return f"Remove the keys below it and give one value: {path}={example}."
    if slot.choices and isinstance(found, bool):
        return (
            "YAML takes on, off, yes and no without quotes for true and false; "
            f"write one of the texts, e.g. {path}={nearest[0] if nearest else example}."
        )
    if isinstance(found, list) or kinds & {"tuple_type", "list_type"}:
        return _hint_for_list(slot, kinds, found, path)
    if isinstance(found, str) and any(_NUMBER.match(kind) for kind in kinds) and not slot.choices:
        return _hint_for_number(found, path, example)
    if "int_from_float" in kinds:
        return f"Write a whole number, e.g. {path}={example}."
    if kinds & set(_RANGE):
        return f"Use a value in that range, e.g. {path}={example}."
    if slot.takes(bool):
        return f"Write {path}=true or {path}=false."
    return _hint_for_text(slot, kinds, found, path)


def _hint_for_text(slot: Slot, kinds: set[str], found: object, path: str) -> str:
    if "string_type" in kinds and isinstance(found, int | float):
        text, pattern = yaml_text(found), slot.pattern
        if pattern is not None and not re.search(pattern, text):
            return f"Write e.g. {path}={example_value(slot)}."
        return f'To give it as a text, quote it: in YAML "{text}", on the command line \'{path}="{text}"\'.'
    if kinds & set(_LENGTH):
        return f"Give a text, e.g. {path}={example_value(slot)}."
    return ""


def _hint_for_list(slot: Slot, kinds: set[str], found: object, path: str) -> str:
    """A list where one value belongs, one value where a list does, or a list of the wrong length."""
    example = example_value(slot)
    if kinds & {"tuple_type", "list_type"}:
        return f"Write a list, e.g. {path}=[{_as_list(slot, found)}]."
    if slot.list_length is not None:
        return f"Give {slot.list_length} values, e.g. {path}={example}."
    if "too_short" in kinds:
        return f"Give at least one value, e.g. {path}={example}, or leave the key out."
    return f"Give one value, e.g. {path}={example}; to try several, see docs/sweeps.md."


def _hint_for_number(text: str, path: str, example: str) -> str:
    match = _SUFFIXED.fullmatch(text.strip())
    if match is not None:
        number = float(match["number"])
        factor = _FACTORS.get(match["suffix"].lower())
        value = number * factor if factor is not None else number / 100
        return f"Write the number out: {path}={yaml_text(value)}."
    if re.fullmatch(r"\d+,\d+", text.strip()):
        return f"Write the decimal sign as a dot: {path}={text.strip().replace(',', '.')}."
    try:
        number = float(text)
    except ValueError:
        return f"Write a number, e.g. {path}={example}."
    if number.is_integer() and abs(number) < 1e15:
        return f"Write the number out: {path}={int(number)}."
    return f"Write a number, e.g. {path}={example}."


def _hint_for_choice(slot: Slot, nearest: Sequence[str], path: str) -> str:
    if nearest:
        return f"Write {path}={nearest[0]}."
    return f"Choose one of them, e.g. {path}={example_value(slot)}." if slot.choices else ""


def _as_list(slot: Slot, found: object) -> str:
    length = slot.list_length or 1
    if isinstance(found, str):
        parts = [part.strip() for part in re.split(r"[,x]" if length > 1 else ",", found)]
        if len(parts) > 1 and (length == 1 or len(parts) == length):
            return ",".join(parts)
    item = str(found) if isinstance(found, str | int | float) else "..."
    return ",".join([item] * length)


def _nearest_values(path: str, found: object, slot: Slot) -> tuple[str, ...]:
    """Values close to what was written, or what other trainers' values are called here."""
    choices = slot.choices
    known = value_called_elsewhere(path, str(found))
    if not choices:
        return (known,) if known is not None else _cleaned_text(found, slot)
    if found is None and "none" in choices:
        known = "none"
    text = str(found).lower()
    flat = {re.sub(r"[^a-z0-9]", "", choice): choice for choice in reversed(choices)}
    same = flat.get(re.sub(r"[^a-z0-9]", "", text))
    close = difflib.get_close_matches(text, choices, n=3, cutoff=0.5)
    found_names = [name for name in (known, same, *close) if name is not None and name in choices]
    return tuple(dict.fromkeys(found_names))[:3]


def _cleaned_text(found: object, slot: Slot) -> tuple[str, ...]:
    """A text that breaks a pattern, with what isn't allowed in a name taken out, if it is right then."""
    pattern = slot.pattern
    if pattern is None or not isinstance(found, str):
        return ()
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", found).strip("-._")
    options = (found.lower(), cleaned)
    return tuple(dict.fromkeys(text for text in options if re.match(pattern, text)))[:1]


def _counterparts(root: type[BaseModel], path: str, keys: Sequence[str]) -> list[str]:
    """What the keys of another trainer's section are called here, e.g. "steps is trainer.max_steps"."""
    found = []
    for key in keys:
        renamed = explain_key(f"{path}.{key}")
        same = [known for known in known_paths(root) if known.rpartition(".")[2] == key]
        target = renamed.key if renamed is not None else same[0] if same else ""
        if target:
            found.append(f"{key} is {target}")
    return found
