"""The values of one key of a sweep: a list of choices, or an interval to search in."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException

from framework.compose.messages import close_names, command_line, options_hint, unknown_option
from framework.compose.overrides import option_meant, parse_line
from framework.compose.provenance import canonical_path
from framework.compose.repository import Repository
from framework.errors import Fault

MAX_POINTS = 10_000
_RESERVED = ("run.output_dir", "run.name", "checkpoint.resume")


@dataclass(frozen=True)
class Dimension:
    """One key of a sweep.

    key: dotted path or group.   line: as typed.
    choices: whole overrides, e.g. ("optim.lr=0.1", "optim.lr=0.2"); None where `interval` is given.
    interval: lowest and highest value.   log: search evenly in the logarithm.   whole: only whole numbers.
    """

    key: str
    line: str
    choices: tuple[str, ...] | None = None
    interval: tuple[float, float] | None = None
    log: bool = False
    whole: bool = False


def read_dimension(override: Override, known: Repository) -> tuple[Dimension | None, list[Fault]]:
    """Read the values that an override lists. What can't be used is told; what is left makes the dimension."""
    key, line = override.key_or_group, str(override.input_line)
    path = canonical_path(key)
    reserved = next((name for name in _RESERVED if path in (name, name.split(".")[0])), None)
    if reserved is not None and not known.has_group(key):
        message = "can't be swept: each point has a folder and a name of its own"
        hint = f"Give {key} one value, which the whole sweep uses, or leave it out."
        if reserved == "checkpoint.resume":
            message = "can't be swept: each point goes on with its own checkpoint"
            hint = "Leave it out; the same command goes on with a stopped sweep."
        return None, [_fault(path, message, line, hint)]
    value = override.value()
    if isinstance(value, IntervalSweep):
        if known.has_group(key):
            hint = f"List the options: {key}=a,b."
            return None, [_fault(path, "a group is no number", line, hint)]
        return _read_interval(key, line, value)
    if isinstance(value, Sweep) and value.tags:
        message = f"a tag ({', '.join(sorted(value.tags))}) means something only for an interval"
        return None, [_fault(path, message, line, f"Write it without tag(): {key}=choice(a,b).")]
    elements, fault = _elements(override, known)
    if fault is not None:
        return None, [fault]
    return _from_elements(override, elements, known)


def _from_elements(
    override: Override, elements: Sequence[Any], known: Repository
) -> tuple[Dimension | None, list[Fault]]:
    key, line = override.key_or_group, str(override.input_line)
    path = canonical_path(key)
    is_group = known.has_group(key) and not any(isinstance(e, dict) for e in elements)
    faults: list[Fault] = []
    texts: list[str] = []
    unknown: list[str] = []
    seen: dict[str, str] = {}
    typed = _typed_elements(override, elements)
    for index, element in enumerate(elements):
        if isinstance(element, Sweep | Glob):
            hint = f"List all values on one level: {key}=a,b,c."
            return None, [_fault(path, "a list of values holds another list", line, hint)]
        text = typed[index] if typed else Override._get_value_element_as_str(element)
        if is_group:
            fault = _option_fault(override, element, known)
            if fault is not None:
                faults.append(fault)
                unknown.append(text)
                continue
        same = repr(Override._convert_value(element))
        if same in seen:
            hint = "Remove one of them: both points would be the same run."
            faults.append(_fault(path, f"{text} is listed twice", line, hint, value=text))
            continue
        seen[same] = text
        texts.append(text)
    if unknown and not texts:
        texts, faults = unknown, []  # each point tells of its own
    if not texts:
        return None, faults or [
            _fault(path, "its list of values is empty", line, f"Write {key}=a,b.")
        ]
    prefix = override.get_key_element()
    choices = tuple(f"{prefix}={text}" for text in texts)
    return Dimension(key, line, choices), faults


def _typed_elements(override: Override, elements: Sequence[Any]) -> list[str]:
    """The values as they were typed, `1e-4` rather than 0.0001; empty where they aren't listed one by one."""
    value = override.value()
    text = str(override.input_line).partition("=")[2].strip()
    if not isinstance(value, ChoiceSweep) or value.shuffle:
        return []
    if not value.simple_form:
        inner = re.fullmatch(r"choice\((.*)\)", text, re.S)
        text = inner[1] if inner else ""
    pieces = [piece.strip() for piece in _split(text)]
    try:
        parsed = [parse_line(f"{override.key_or_group}={piece}").value() for piece in pieces]
    except Exception:  # noqa: BLE001  whatever the parser says, the worked-out values do as well
        return []
    same = [repr(Override._convert_value(element)) for element in elements]
    return pieces if [repr(found) for found in parsed] == same else []


def _split(text: str) -> list[str]:
    """Split at commas outside quotes and brackets."""
    pieces, depth, quote, start = [], 0, "", 0
    for index, character in enumerate(text):
        if quote:
            if character == quote and text[index - 1] != "\\":
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0 and text[index - 1] != "\\":
            pieces.append(text[start:index])
            start = index + 1
    return [*pieces, text[start:]]


def _option_fault(override: Override, element: Any, known: Repository) -> Fault | None:
    group, line = override.key_or_group, str(override.input_line)
    name = Override._convert_value(element)
    options = known.options(group)
    if isinstance(name, list):
        return None  # several options at once; composing judges them
    if not isinstance(name, str) or not name:
        text = Override._get_value_element_as_str(element)
        message = f"must name files of this group, not '{text}'"
        hint = options_hint(group, options)
        return Fault(
            group, message, command_line(line), hint=hint, code="unknown-option", value=text
        )
    meant = option_meant(group, name, known)
    if meant is None:
        return unknown_option(group, name, options, command_line(line))
    if meant != name:
        message = f"'{name}' is a file, but a name is needed"
        return Fault(
            group, message, command_line(line), (meant,), f"Write {meant}.", "unknown-option", name
        )
    return None


def _elements(override: Override, known: Repository) -> tuple[list[Any], Fault | None]:
    """What an override lists, in order; shuffled lists are shuffled the same way each time."""
    key, line, value = override.key_or_group, str(override.input_line), override.value()
    path = canonical_path(key)
    try:
        if isinstance(value, Glob):
            return _globbed(key, line, value, known)
        if isinstance(value, RangeSweep):
            if value.step == 0:
                hint = "Write range(first,end,step) with a step that isn't 0."
                return [], _fault(path, "its range has step 0 and never ends", line, hint)
            elements = list(islice(iter(value.range()), MAX_POINTS + 1))
            if len(elements) > MAX_POINTS:
                message = f"its range holds more than {MAX_POINTS:,} values"
                return [], _fault(path, message, line, "Choose a larger step or a nearer end.")
            if not elements:
                message = f"its range from {value.start} to {value.stop} is empty"
                return [], _fault(path, message, line, "The end itself isn't part of a range.")
        elif isinstance(value, ChoiceSweep):
            elements = list(value.list)
        else:
            hint = f"Write {key}=a,b."
            return [], _fault(path, "its values can't be listed", line, hint)
    except (HydraException, ValueError, ArithmeticError, TypeError) as error:
        hint = "Write range(first,end,step) with numbers."
        return [], _fault(path, f"its range can't be worked out: {error}", line, hint)
    if value.shuffle:
        random.Random(line).shuffle(elements)  # a sweep that goes on must meet the same order
    return elements, None


def _globbed(key: str, line: str, value: Glob, known: Repository) -> tuple[list[Any], Fault | None]:
    shown = ", ".join(value.include)
    if not known.has_group(key):
        groups = sorted(known.root_groups)
        nearest = close_names(key, groups)
        message = "glob() lists the files of a group, and this is a key"
        hint = f"List the values: {key}=a,b. Groups are: {', '.join(groups)}."
        return [], replace(_fault(canonical_path(key), message, line, hint), nearest=nearest)
    options = known.options(key)
    found = value.filter(options)
    if not found:
        message = f"no {key} matches {shown}"
        close = close_names(re.sub(r"[*?\[\]]", "", shown), options)
        fault = _fault(key, message, line, options_hint(key, options), value=shown)
        return [], replace(fault, nearest=close)
    return list(found), None


def _read_interval(
    key: str, line: str, value: IntervalSweep
) -> tuple[Dimension | None, list[Fault]]:
    path = canonical_path(key)
    assert value.start is not None
    assert value.end is not None
    start, end = float(value.start), float(value.end)
    faults = []
    unknown = sorted(tag for tag in value.tags if tag != "log")
    if unknown:
        message = f"the tag {', '.join(unknown)} isn't known; allowed: log"
        fault = _fault(path, message, line, f"Write {key}=tag(log, interval(1e-5,1e-3)).")
        faults.append(replace(fault, nearest=close_names(unknown[0], ["log"])))
    if not (math.isfinite(start) and math.isfinite(end)):
        faults.append(
            _fault(path, "its interval has no finite ends", line, "Write two finite numbers.")
        )
    elif start >= end:
        hint = f"Write the lower end first: {key}=interval({end:g},{start:g})."
        if start == end:
            hint = f"For a single value write {key}={start:g}."
        faults.append(_fault(path, "its interval ends before or where it begins", line, hint))
    elif "log" in value.tags and start <= 0:
        message = f"its interval begins at {start:g}, and the logarithm needs numbers above 0"
        faults.append(_fault(path, message, line, "Begin above 0, or leave the tag log out."))
    if faults:
        return None, faults
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    dimension = Dimension(key, line, interval=(start, end), log="log" in value.tags, whole=whole)
    return dimension, []


def _fault(path: str, message: str, line: str, hint: str, value: str = "") -> Fault:
    return Fault(path, message, command_line(line), hint=hint, code="sweep", value=value)
