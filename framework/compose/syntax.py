"""Says what is wrong with the form of an override, which Hydra's parser tells in the words of its grammar."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

from framework.compose.messages import close_names, command_line, cut
from framework.compose.provenance import canonical_path
from framework.compose.sources import RECIPE_GROUP
from framework.errors import Fault
from framework.schema.run import RunConfig

_PIECE = re.compile(r"[^.\[\]]+")
_KEY = re.compile(r"[+~]{0,2}\w+([./@:]\w+)*")
_UNKNOWN_FUNCTION = re.compile(r"Unknown function '(\w+)'")
_FUNCTIONS = ("choice", "range", "interval", "glob", "tag", "sort", "shuffle", "int", "float")
TOP_KEYS = frozenset({RECIPE_GROUP, *RunConfig.model_fields})
_CLOSING = {"[": "]", "{": "}", "(": ")"}


class Names(Protocol):
    """What recipes there are."""

    def options(self, group: str) -> list[str]:
        """Every option of a group."""


def syntax_fault(line: str, error: Exception, known: Names) -> Fault:
    """Describe an override that can't be parsed."""
    where = command_line(line)
    if "=" not in line or line.startswith("="):
        return _no_pair(line, where, known)
    key, _, value = line.partition("=")
    path = canonical_path(key.strip().lstrip("+~")) or key
    message, hint, nearest = _reason(key, value, error)
    code = "interpolation" if "after ${ isn't closed" in message else "override-syntax"
    return Fault(path, message, where, nearest, hint, code, value=value)


def _no_pair(line: str, where: str, known: Names) -> Fault:
    names = known.options(RECIPE_GROUP)
    stem = PurePosixPath(line.removesuffix(".yaml").removesuffix(".yml")).name
    close = close_names(stem, names) or close_names(line, names)
    example = f"recipe={close[0]}" if close else "model.dit.precision=fp8"
    message = f"'{line}' isn't of the form key=value"
    if line.startswith("="):
        example = "model.dit.precision=fp8"
        message = f"'{line}' has no key before ="
    elif line.startswith(("~", "+")):
        message = f"'{line}' can't be parsed"
        example = "~optim.betas to remove a key, or optim.lr=1e-4 to set one"
    nearest = (example,) if close and not line.startswith(("=", "~", "+")) else ()
    return Fault("", message, where, nearest, f"Write it as e.g. {example}.", "override-syntax")


Reason = tuple[str, str, tuple[str, ...]]


def _reason(key: str, value: str, error: Exception) -> Reason:
    """What is wrong, the way out, and names close to what was meant."""
    found = _key_reason(key, value) or _unclosed_reason(key, value)
    if found is not None:
        return found
    shown = cut(value)
    function = _UNKNOWN_FUNCTION.search(str(error))
    if function is not None:
        nearest = close_names(function[1], _FUNCTIONS)
        hint = f"For a text put it in quotes: '{key}=\"{shown}\"'."
        if nearest:
            hint = f"Write {key}={value.replace(function[1], nearest[0], 1)}."
        return f"there is no function '{function[1]}' for the values of a sweep", hint, nearest
    evaluated = re.search(r"while evaluating '(.*)': (.*)", str(error))
    if evaluated is not None:
        hint = "See `choice(a,b)`, `range(1,10,2)`, `interval(1e-5,1e-3)`, `glob(*)`."
        return f"{cut(evaluated[1])} can't be worked out: {evaluated[2]}", hint, ()
    if re.search(r"(^|,)\s*(,|$)", value) and not value.startswith(("[", "{")):
        hint = f"Write {key}={','.join(p for p in value.split(',') if p.strip())}."
        return f"a value is missing beside a comma: {shown}", hint, ()
    if value.startswith("["):
        return f"the list can't be read: {shown}", _list_hint(key, value), ()
    hint = f"Put values with spaces, commas or brackets in quotes: '{key}=\"{shown}\"'."
    return f"the value can't be read: {shown}", hint, ()


def _key_reason(key: str, value: str) -> Reason | None:
    if key != key.strip():
        fixed = f"{key.strip()}={value.strip()}"
        return "there is a space before =", f"Write {fixed}.", ()
    if "[" in key:
        dotted = ".".join(_PIECE.findall(key))
        hint = f"Write a list element with a dot, {dotted}={value}, or give the whole list."
        return "a key has no brackets", hint, ()
    if not _KEY.fullmatch(key):
        hint = "Write the key as a dotted path, e.g. model.dit.precision=fp8."
        return f"'{key}' isn't a key", hint, ()
    return None


def _unclosed_reason(key: str, value: str) -> Reason | None:
    unclosed, shown = _unclosed(value), cut(value)
    if not unclosed:
        return None
    if unclosed == "${":
        hint = "An interpolation is written ${optim.lr}; quote the override for your shell."
        return f"'{shown}' can't be filled in: its brace after ${{ isn't closed", hint, ()
    if unclosed in ("'", '"'):
        other = '"' if unclosed == "'" else "'"
        hint = (
            f"Close the quote, or put a text that holds one in the other kind: {other}...{other}."
        )
        return f"a quote isn't closed: {shown}", hint, ()
    state = "closed" if unclosed in _CLOSING else "opened"
    hint = f"Add what is missing, or put a text in quotes: '{key}=\"{shown}\"'."
    if value.startswith(("[", "{")):
        hint = _list_hint(key, value)
    return f"'{unclosed}' isn't {state}: {shown}", hint, ()


def _list_hint(key: str, value: str) -> str:
    if value.startswith("{"):
        return f"Write a section as '{key}={{one: 1, two: 2}}', or set each key by its dotted path."
    return f'Put each text of the list in quotes: \'{key}=["one","two"]\'.'


def _unclosed(value: str) -> str:
    """The first quote or bracket without its other half; "${" for an interpolation."""
    opened: list[str] = []
    quote = ""
    previous = ""
    for character in value:
        if quote:
            if character == quote and previous != "\\":
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            opened.append("${" if character == "{" and previous == "$" else character)
        elif character in _CLOSING.values():
            if not opened or _CLOSING[opened[-1][-1]] != character:
                return character
            opened.pop()
        previous = character
    return quote or (opened[0] if opened else "")


def syntax_of_broken_pairs(line: str, rest: Sequence[str]) -> tuple[Fault, int] | None:
    """A pair that the shell took apart at spaces around =, and how many of the words behind it belong to it."""
    used = _num_torn(line, rest)
    parts = [line, *rest[:used]]
    key = line.rstrip("=").lstrip("+~")
    is_key = "." in key or key in TOP_KEYS or line.endswith("=")
    if not used or not is_key or parts[-1].startswith("-") or not _KEY.fullmatch(key):
        return None
    fixed = "".join(parts)
    where = command_line(" ".join(parts))
    message = "there are spaces around ="
    fault = Fault(key, message, where, (fixed,), f"Write {fixed}.", "override-syntax")
    return fault, used


def _num_torn(line: str, rest: Sequence[str]) -> int:
    if not rest:
        return 0
    following = rest[0]
    if "=" not in line:
        if following == "=" and len(rest) > 1:
            return 2
        return int(following.startswith("=") and following != "=")
    return int(line.endswith("=") and line.count("=") == 1 and "=" not in following)
