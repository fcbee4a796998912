"""Dotted paths into nested values: writing them, and reading, setting and removing what they name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

UNSET = "???"
"""Stands for a value that must still be given."""

Pieces = tuple[str | int, ...]


def join_path(pieces: Iterable[str | int]) -> str:
    """Join names and list indices to one dotted path: ("a", 0, "b") becomes "a[0].b"."""
    path = ""
    for piece in pieces:
        path += f"[{piece}]" if isinstance(piece, int) else f".{piece}" if path else piece
    return path


def split_path(path: str) -> Pieces:
    """Take a dotted path apart: "a[0].b" becomes ("a", 0, "b")."""
    found = re.findall(r"[^.\[\]]+", path)
    return tuple(int(piece) if piece.isdigit() else piece for piece in found)


def overlaps(path: str, other: str) -> bool:
    """Whether one of two paths names the other, or something around or below it."""
    return (
        path == other
        or path.startswith((f"{other}.", f"{other}["))
        or other.startswith((f"{path}.", f"{path}["))
    )


def copy_with_text_keys(node: Any) -> Any:
    """Copy nested values; a key such as 5 or true, which YAML reads as no text, becomes one."""
    if isinstance(node, Mapping):
        return {
            key if isinstance(key, str) else str(key).lower(): copy_with_text_keys(value)
            for key, value in node.items()
        }
    if isinstance(node, list | tuple):
        return [copy_with_text_keys(item) for item in node]
    return node


def unset_paths(node: object, pieces: Pieces = ()) -> Iterator[Pieces]:
    """Every path whose value must still be given."""
    if node == UNSET:
        yield pieces
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from unset_paths(value, (*pieces, str(key)))


def value_at(node: Any, pieces: Pieces) -> Any:
    """Return the value at `pieces`; None where there is none."""
    for piece in pieces:
        if isinstance(node, Mapping):
            node = node.get(piece)
        elif isinstance(node, list | tuple) and isinstance(piece, int) and piece < len(node):
            node = node[piece]
        else:
            return None
    return node


def remove_(node: dict[str, Any], pieces: Pieces) -> None:
    """Take the value at `pieces` out, if it is still there; an element of a list takes the whole list with it."""
    parent: Any = node
    for piece, following in zip(pieces, (*pieces[1:], None), strict=True):
        if not isinstance(parent, dict) or piece not in parent:
            return
        if following is None or isinstance(following, int):
            del parent[piece]
            return
        parent = parent[piece]


def put_(node: dict[str, Any], pieces: Pieces, value: Any) -> None:
    """Set the value at `pieces`, making the sections around it."""
    for piece in pieces[:-1]:
        node = node.setdefault(str(piece), {})
    node[str(pieces[-1])] = value
