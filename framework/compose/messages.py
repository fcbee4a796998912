"""Sentences and names that several parts of composing share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from framework.compose.sources import RECIPE_GROUP
from framework.errors import Fault

_MAX_LISTED = 12
_NUM_NEAREST = 3
_LONGEST_SHOWN = 80


def command_line(line: str) -> str:
    """Where a fault of an override stands."""
    return f"command line: {line}"


def cut(text: str) -> str:
    """A text short enough for a sentence."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def close_names(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> tuple[str, ...]:
    """Names that look like `name`, best first; letter case doesn't count."""
    by_lower: dict[str, str] = {}
    for known in names:
        by_lower.setdefault(known.lower(), known)
    found = difflib.get_close_matches(name.lower(), by_lower, n=_NUM_NEAREST, cutoff=cutoff)
    return tuple(by_lower[key] for key in found)


def listed(names: Sequence[str]) -> str:
    """Names in one line, a long list cut."""
    more = len(names) - _MAX_LISTED
    text = ", ".join(names[:_MAX_LISTED])
    return f"{text} and {more} more" if more > 0 else text


def options_hint(group: str, options: Sequence[str]) -> str:
    """What a group takes, and where a person's own recipes are found."""
    hint = f"Use one of: {listed(options)}." if options else f"The group {group} has no files."
    if group == RECIPE_GROUP:
        hint += " Your own recipes are found in ./recipes or with --config-dir FOLDER."
    return hint


def unknown_option(group: str, name: str, options: Sequence[str], where: str) -> Fault:
    """A group was asked for a file that it doesn't have."""
    stem = PurePosixPath(name).name
    nearest = close_names(name, options) or close_names(stem, options)
    return Fault(
        group,
        f"there is no {group} called '{name}'",
        where,
        nearest,
        options_hint(group, options),
        code="unknown-option",
        value=name,
        allowed=listed(options),
    )


def hydra_setting(path: str, where: str, *, hint: str = "") -> Fault:
    """A setting of Hydra itself, which plans runs in another way than Octavo does."""
    about_sweeps = re.match(r"hydra[./](launcher|sweeper)\b", path)
    if not hint and about_sweeps is not None:
        hint = "It is about sweeps: use it with `octavo train -m`."
    hint = hint or "Use run.name and run.output_dir for where a run is written."
    message = "Hydra's own settings aren't read by Octavo"
    return Fault(path, message, where, hint=hint, code="hydra-setting")
