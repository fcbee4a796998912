"""Command lines of other trainers, alone or in a shell script, as names and values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from framework.migrate.flags import Table

_ENDS_COMMAND = "\n;&|"
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One training command.

    line: where it starts in the text, from 1.   script: path of the Python file; "" where only flags were given.
    launch: flags of the launcher, without dashes.   flags: flags of the trainer, without dashes: text, a list, or True.
    stray: words that belong to no flag.
    """

    line: int
    script: str
    launch: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    stray: tuple[str, ...] = ()


def read_commands(text: str, table: Table, *, script: str = r"train[^/]*\.py$") -> list[Command]:
    """Find the training commands in a command line or a shell script, in order.

    script: regular expression that the Python file of a training command matches; other commands are left out.
    Continued lines, quotes, comments, and variables that the script sets itself are understood; a variable that comes
    from elsewhere stays as it is written.   A text that begins with a flag is a command without its script.
    """
    found = []
    variables: dict[str, str] = {}
    for line, words in split_commands(text):
        words = [_expand(word, variables) for word in words]
        while words and words[0] in ("export", "set"):
            words = words[1:]
        while words and (assigned := _ASSIGNMENT.fullmatch(words[0])):
            variables[assigned[1]] = assigned[2]
            words = words[1:]
        at = next((i for i, word in enumerate(words) if re.search(script, word)), None)
        if at is None:
            if not words or not words[0].startswith("--"):
                continue
            at = -1
        launch, _ = read_flags(words[: max(at, 0)], None)
        name, rest = words[at] if at >= 0 else "", words[at + 1 :]
        flags, stray = read_flags(rest, table)
        found.append(Command(line, name, launch, flags, tuple(stray)))
    return found


def read_flags(words: list[str], table: Table | None) -> tuple[dict[str, Any], list[str]]:
    """Turn `--a 1 --b --c=2` into names and values.

    A name may be shortened as long as only one setting of the table begins so, as argparse allows.
    Returns the flags, and the words that belong to none.   table: says what takes no value and what takes several.
    """
    flags: dict[str, Any] = {}
    stray: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("--") or word == "--":
            stray.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = _full_name(name.replace("-", "_"), table)
        values = [value] if equals else []
        while index < len(words) and not words[index].startswith("--"):
            values.append(words[index])
            index += 1
        row = table.row(name) if table is not None else None
        takes = row.takes if row is not None else ""
        limit = {"switch": 1 if equals else 0, "list": len(values)}.get(takes, 1)
        stray += values[limit:]
        values = values[:limit]
        flags[name] = values if takes == "list" else values[0] if values else True
    return flags, stray


def split_commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Give each command of a shell text as its words, with the line that it starts in."""
    text = text.replace("\r\n", "\n")
    words: list[str] = []
    word: str | None = None
    line = start = 1
    index = 0
    while index <= len(text):
        char = text[index] if index < len(text) else "\n"
        if char == "\\" and index < len(text):
            following = text[index + 1 : index + 2]
            if following != "\n":
                word = (word or "") + following
            line += following == "\n"
            index += 2
            continue
        if char in "'\"":
            quoted, index = _quoted(text, index)
            word = (word or "") + quoted
            line += quoted.count("\n")
            continue
        if char == "#" and word is None:
            end = text.find("\n", index)
            index = len(text) if end < 0 else end
            continue
        if char in f" \t{_ENDS_COMMAND}":
            if word is not None:
                words.append(word)
                word = None
            if char in _ENDS_COMMAND and words:
                yield start, words
                words = []
            line += char == "\n"
            if not words:
                start = line
        else:
            word = (word or "") + char
        index += 1


def _quoted(text: str, index: int) -> tuple[str, int]:
    """The text between quotes that begin at `index`, and where it goes on; an open quote ends with the text."""
    quote, parts = text[index], []
    index += 1
    while index < len(text) and text[index] != quote:
        if (
            quote == '"'
            and text[index] == "\\"
            and text[index + 1 : index + 2] in ('"', "\\", "\n")
        ):
            parts.append(text[index + 1].replace("\n", ""))
            index += 2
            continue
        parts.append(text[index])
        index += 1
    return "".join(parts), min(index + 1, len(text))


def _expand(word: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], found[0]), word)


def _full_name(name: str, table: Table | None) -> str:
    if table is None or table.row(name) is not None:
        return name
    longer = [known for known in table.rows if known.startswith(name)]
    return longer[0] if len(longer) == 1 else name


def num_processes(launch: Mapping[str, Any]) -> tuple[int | None, str]:
    """How many processes a launcher starts and what says so; None where only a file elsewhere knows.

    launch: the launcher's flags; the file of `--config_file` (accelerate's) is read where it exists.
    """
    for name in ("num_processes", "nproc_per_node"):
        if str(launch.get(name, "")).isdigit():
            return int(launch[name]), f"--{name} {launch[name]}"
    file = Path(str(launch.get("config_file", "")))
    if file.is_file():
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None, ""
        if isinstance(content, dict) and isinstance(content.get("num_processes"), int):
            return content["num_processes"], f"num_processes in {file}"
    return None, ""
