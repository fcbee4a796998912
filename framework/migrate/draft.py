"""A recipe that is being written, with the reason for each line and what couldn't be written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from framework.errors import Fault

NoteKind = Literal["lost", "changed", "check", "unneeded"]
MUST_BE_GIVEN = "???"
_SECTIONS = (
    "model", "data", "objective", "optim", "trainer", "checkpoint", "validation", "sample", "export", "logger", "run",
)  # fmt: skip
_COMPONENTS = ("dit", "dit_2", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class Note:
    """What a person must know about one setting of theirs.

    name: the setting as they write it.   text: why it has no counterpart, what changed, or what to look at.
    """

    kind: NoteKind
    name: str
    text: str


@dataclass(frozen=True)
class Setting:
    """One value of the recipe and what it was made from."""

    value: Any
    source: str


@dataclass
class Draft:
    """A recipe in the making: dotted path -> value, notes, and faults that make it impossible."""

    settings: dict[str, Setting] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def set_(self, path: str, value: object, source: str) -> None:
        """Write a key; a later value takes the place of an earlier one."""
        self.settings[path] = Setting(value, source)

    def value(self, path: str) -> Any:
        """What a key was set to; None where it wasn't."""
        found = self.settings.get(path)
        return None if found is None else found.value

    def note(self, kind: NoteKind, name: str, text: str) -> None:
        """Tell something about a setting, once."""
        note = Note(kind, name, text)
        if note not in self.notes:
            self.notes.append(note)

    def refuse(self, name: str, message: str, *, hint: str = "", where: str = "") -> None:
        """Note a fault without which no recipe can be made."""
        self.faults.append(Fault(name, message, where, hint=hint, code="invalid"))


def render_recipe(draft: Draft, head: Sequence[str]) -> str:
    """Write the recipe as YAML: comment lines first, then each key with what it came from behind it.

    head: lines of text for the comment at the top.
    """
    tree: dict[str, Any] = {}
    for path in sorted(draft.settings, key=_place):
        node = tree
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = draft.settings[path]
    lines = [f"# {line}".rstrip() for line in head]
    for section, node in tree.items():
        if section != next(iter(tree)):
            lines.append("")
        lines += [f"{section}:", *_render(node, 1)]
    return "\n".join(lines) + "\n"


def _render(node: dict[str, Any], depth: int) -> list[str]:
    indent = "  " * depth
    lines = []
    for key, value in sorted(node.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_render(value, depth + 1)]
        elif isinstance(value.value, list) and value.value and _is_long(value.value):
            lines.append(f"{indent}{key}:{_comment(value.source)}")
            lines += [f"{indent}  - {_scalar(item)}" for item in value.value]
        else:
            lines.append(f"{indent}{key}: {_scalar(value.value)}{_comment(value.source)}")
    return lines


def _is_long(items: list[Any]) -> bool:
    return len(_scalar(items)) > 60 or any(isinstance(item, dict) for item in items)


def _comment(source: str) -> str:
    text = re.sub(r"\s+", " ", source).strip()
    return f"  # {text}" if text else ""


def _scalar(value: object) -> str:
    """A value on one line of YAML, with floats as a person writes them."""
    if isinstance(value, float):
        return float_text(value)
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n...\n").strip()


def float_text(value: float) -> str:
    """A float as YAML 1.1 and people read it: 1e-4 as 1.0e-4, 0.05 as 0.05."""
    text = repr(value)
    if "e" in text:
        mantissa, exponent = text.split("e")
        mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
        return f"{mantissa}e{int(exponent):+d}"
    return text


def _place(path: str) -> tuple[int, int, str]:
    """Sections in the order of a run, components after the model's own keys."""
    section, _, rest = path.partition(".")
    head = rest.partition(".")[0]
    component = _COMPONENTS.index(head) + 1 if section == "model" and head in _COMPONENTS else 0
    return (_SECTIONS.index(section), component, "")
