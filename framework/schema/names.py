"""The keys that a configuration may hold, and which of them a wrong key was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel

from framework.schema.wording import section_class, slot_at

__all__ = [
    "field_annotation",
    "known_paths",
    "nearest_paths",
    "section_class",
    "sorted_by_nearness",
]

_NUM_NEAREST = 3


def field_annotation(root: type[BaseModel], pieces: Sequence[str | int]) -> Any:
    """Annotation of the key at `pieces`, e.g. ("model", "dit"); None where the schema has no such key."""
    slot = slot_at(root, tuple(pieces))
    return None if slot is None else slot.annotation


@cache
def known_paths(root: type[BaseModel]) -> tuple[str, ...]:
    """Dotted path of every section and key below `root`, sections before what they hold."""
    paths: list[str] = []
    for name, field in root.model_fields.items():
        paths.append(name)
        section = section_class(field.annotation)
        if section is not None:
            paths += [f"{name}.{below}" for below in known_paths(section)]
    return tuple(paths)


def nearest_paths(
    root: type[BaseModel], path: str, *, below: Sequence[str] = ()
) -> tuple[str, ...]:
    """Valid dotted paths that `path` was probably meant to be, best first, at most three.

    below: keys that were written below `path`; a section that has them all was probably meant.
    Considered in turn: a slip of the pen in the same section, slips in the sections around it, a path cut short at the
    front, the same key in another section, a bad slip in the same section, a section with the keys that stand below, a
    slip anywhere.
    """
    paths = known_paths(root)
    parent, _, name = path.rpartition(".")
    lowered = name.lower().replace("-", "_")
    siblings = {p.rpartition(".")[2]: p for p in paths if p.rpartition(".")[0] == parent}
    found = [siblings[close] for close in difflib.get_close_matches(lowered, siblings, cutoff=0.85)]
    found += _slips_on_the_way(root, path)
    found += [p for p in paths if p.endswith(f".{path}")]
    same = [p for p in paths if p.rpartition(".")[2] == lowered]
    found += sorted(same, key=lambda p: not p.startswith(f"{parent}."))
    found += [siblings[close] for close in difflib.get_close_matches(lowered, siblings, cutoff=0.6)]
    if not found and len(below) > 1:
        found = [p for p in paths if {f"{p}.{key}" for key in below} <= set(paths)]
    if not found:
        # Names in the same section have been compared, and the sections around the path aren't what was meant.
        others = [p for p in paths if p.rpartition(".")[0] != parent and not path.startswith(p)]
        found = difflib.get_close_matches(path, others, n=_NUM_NEAREST, cutoff=0.75)
    if not found:
        by_name = {p.rpartition(".")[2]: p for p in reversed(paths)}
        close = difflib.get_close_matches(lowered, by_name, cutoff=0.75)
        found = [by_name[name] for name in close]
    return tuple(dict.fromkeys(found))[:_NUM_NEAREST]


def _slips_on_the_way(root: type[BaseModel], path: str) -> list[str]:
    """The path with misspelt sections corrected, e.g. model.text_encoder.precision for model.txt_encoder.precison."""
    section: type[BaseModel] | None = root
    corrected: list[str] = []
    for piece in path.split("."):
        if section is None:
            return []
        close = difflib.get_close_matches(piece.lower(), section.model_fields, n=1, cutoff=0.7)
        if not close:
            return []
        corrected.append(close[0])
        section = section_class(section.model_fields[close[0]].annotation)
    return [".".join(corrected)] if corrected[:-1] != path.split(".")[:-1] else []


def sorted_by_nearness(name: str, names: Sequence[str]) -> list[str]:
    """The names with those that resemble `name` first; the rest stays in its order."""
    close = difflib.get_close_matches(name.lower(), names, n=len(names) or 1, cutoff=0.6)
    return [*close, *(other for other in names if other not in close)]
