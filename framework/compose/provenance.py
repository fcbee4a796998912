"""Which file and line, or which override, set each value.

Hydra keeps no such record, so it is rebuilt: the files in merge order, their positions from PyYAML's node tree, and
the overrides last. The last writer of a path is the one that is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from framework.compose.yaml_file import MERGE_TAG, YamlFile

_PIECE = re.compile(r"[^.\[\]]+")


def canonical_path(key: str) -> str:
    """Write a key as used in reports: `sample.prompts.0` and `sample.prompts[0]` both become the latter."""
    return join_path(int(piece) if piece.isdigit() else piece for piece in _PIECE.findall(key))


def join_path(pieces: Iterable[str | int]) -> str:
    """Join names and list indices to one dotted path, e.g. ("a", 0, "b") to "a[0].b"."""
    path = ""
    for piece in pieces:
        if isinstance(piece, int):
            path += f"[{piece}]"
        else:
            path += f".{piece}" if path else str(piece)
    return path


class Provenance:
    """Looks up where a dotted path was set: "recipes/a.yaml:3:5", "command line: ..." or "default"."""

    def __init__(self) -> None:
        # path -> (where, whether everything below was set there too: true for scalars, lists and override values)
        self._entries: dict[str, tuple[str, bool]] = {}

    def __call__(self, path: str) -> str:
        """Return what set `path`: itself, else what stands around it, else the first thing set below it."""
        if path in self._entries:
            return self._entries[path][0]
        for parent in _parents(path):
            if parent in self._entries and self._entries[parent][1]:
                return self._entries[parent][0]
        below = (where for key, (where, _) in self._entries.items() if _is_below(key, path))
        return next(below, "default")

    def files_with_key(self, name: str) -> tuple[str, ...]:
        """Places that set the top-level key `name` or anything below it."""
        return tuple(
            w for key, (w, _) in self._entries.items() if key == name or _is_below(key, name)
        )

    def leaves(self) -> tuple[str, ...]:
        """Every path that was set to a plain value or a list."""
        return tuple(
            path
            for path, (_, whole) in self._entries.items()
            if whole and not any(self._entries.get(p, ("", False))[1] for p in _parents(path))
        )

    def add_override(self, key: str, line: str) -> None:
        """Note an override from the command line; `line` is what was typed."""
        path = canonical_path(key.lstrip("~+"))
        self._erase(path)
        if key.startswith("~"):
            return
        entry = (f"command line: {line}", True)
        self._entries[path] = entry
        for parent in _parents(path):
            if path[len(parent)] == "." and parent in self._entries and self._entries[parent][1]:
                self._entries[parent] = (
                    entry  # a plain value that this override turned into a section
                )

    def add_file(self, file: YamlFile, package: str) -> None:
        """Note everything that a YAML file sets. package: dotted path that its keys are put under, "" for none."""
        if file.root is not None:
            self._add_mapping(canonical_path(package), file.root.value, file.shown)

    def forget(self, path: str) -> None:
        """Forget what set `path` and all below it; its value was left out."""
        self._erase(path)

    def copy(self) -> Provenance:
        """A record of its own that starts with what this one knows."""
        other = Provenance()
        other._entries = dict(self._entries)
        return other

    def _add_mapping(self, prefix: str, pairs: list[tuple[Any, Any]], file: str) -> None:
        # Keys written beside a merge (`<<`) win over the merged ones, wherever it stands.
        for key_node, value_node in sorted(pairs, key=lambda pair: pair[0].tag != MERGE_TAG):
            if key_node.tag == MERGE_TAG:
                merged = (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                for node in merged:
                    self._add_mapping(prefix, node.value, file)
                continue
            path = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            self._add_node(path, value_node, f"{file}:{_position(key_node)}", file)

    def _add_node(self, path: str, node: yaml.Node, where: str, file: str) -> None:
        if isinstance(node, yaml.MappingNode):
            if path in self._entries and self._entries[path][1]:
                self._erase(path)
            self._entries[path] = (where, False)
            self._add_mapping(path, node.value, file)
            return
        self._erase(path)
        self._entries[path] = (where, True)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._add_node(f"{path}[{index}]", item, f"{file}:{_position(item)}", file)

    def _erase(self, path: str) -> None:
        for key in [key for key in self._entries if key == path or _is_below(key, path)]:
            del self._entries[key]


def _position(node: yaml.Node) -> str:
    return f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _is_below(key: str, path: str) -> bool:
    return key.startswith((f"{path}.", f"{path}["))


def _parents(path: str) -> list[str]:
    """Paths around `path`, nearest first."""
    return [path[: match.start()] for match in re.finditer(r"[.\[]", path)][::-1]
