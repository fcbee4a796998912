"""Finds keys that a command line gives two different values, which would else be decided in silence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from framework.compose.messages import command_line
from framework.errors import Fault

_REMOVED = "~"


@dataclass(frozen=True)
class Setting:
    """One override: its dotted path, what was typed, whether it removes the key, and the value."""

    path: str
    line: str
    removes: bool
    value: Any


def given_twice(settings: Sequence[Setting]) -> tuple[list[Fault], set[str]]:
    """Faults, each naming both overrides, and the lines that a later one contradicts."""
    faults: list[Fault] = []
    lost: set[str] = set()
    seen: list[tuple[str, Any, Setting]] = []
    for setting in settings:
        for path, value in _leaves(setting):
            for other_path, other_value, other in seen:
                if other.line in lost or other is setting:
                    continue
                if _contradicts(path, value, other_path, other_value):
                    lost.add(other.line)
                    faults.append(_fault(path, other, setting))
        seen += [(path, value, setting) for path, value in _leaves(setting)]
    return faults, lost


def _contradicts(path: str, value: Any, other_path: str, other: Any) -> bool:
    if path == other_path:
        return repr(value) != repr(other)
    # A plain value for a section takes away what was set below it, and what is set below takes the plain value away.
    return _is_below(other_path, path) or (
        _is_below(path, other_path)
        and other not in (None, _REMOVED)
        and not isinstance(other, list)
    )


def _is_below(path: str, parent: str) -> bool:
    return path.startswith((f"{parent}.", f"{parent}["))


def _leaves(setting: Setting) -> Iterator[tuple[str, Any]]:
    if setting.removes:
        yield setting.path, _REMOVED
    else:
        yield from _leaf_values(setting.path, setting.value)


def _leaf_values(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaf_values(f"{path}.{key}", below)
    elif value != {}:
        yield path, value


def _fault(path: str, first: Setting, second: Setting) -> Fault:
    return Fault(
        path,
        f"is given twice: {first.line} and {second.line}",
        command_line(second.line),
        hint="Keep one of the two.",
        code="given-twice",
    )
