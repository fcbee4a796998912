"""Says in our words what Hydra refused, with the file or override that asked for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from framework.compose.sources import (
    RECIPE_GROUP,
    RecipeSource,
    read_yaml_text,
    recipe_names,
    shown_path,
)
from framework.errors import Fault


def file_of(loader: ConfigLoader, config_path: str | None) -> Path | None:
    """The file behind an entry of Hydra's defaults list; None for Hydra's own entries."""
    if config_path is None or config_path.startswith("hydra"):
        return None
    for source in loader.get_sources():
        if not source.is_config(config_path):
            continue
        if isinstance(source, RecipeSource):
            return source.file_of(config_path)
        if source.scheme() == "file":
            return Path(source.path, f"{config_path.removesuffix('.yaml')}.yaml")
    return None


def translate(error: Exception, parsed: Sequence[Override], loader: ConfigLoader) -> list[Fault]:
    """Say in our words what Hydra refused."""
    text = str(error) or str(error.__cause__ or type(error).__name__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return [_missing_config(error, parsed, loader)]
    required = re.match(r"You must specify '([^']+)'", text)
    if required is not None:
        return _unspecified_group(required[1], parsed, loader)
    where, message = _split_location(text, loader)
    if isinstance(error.__cause__, OmegaConfBaseException):
        message = f"{message}: {str(error.__cause__).splitlines()[0]}"
    return [Fault("", message, where)]


def _split_location(text: str, loader: ConfigLoader) -> tuple[str, str]:
    """Split "In 'recipe/a': message" into the file and the first sentence."""
    found = re.match(r"In '([^']+)': ", text)
    if found is None:
        return "", text.strip().splitlines()[0]
    file = file_of(loader, found[1])
    return (shown_path(file) if file else found[1]), text[found.end() :].strip().splitlines()[0]


def _missing_config(
    error: MissingConfigException, parsed: Sequence[Override], loader: ConfigLoader
) -> Fault:
    group, _, name = str(error.missing_cfg_file).partition("/")
    options = tuple(options_of(loader, group))
    by_override = [
        str(o.input_line) for o in parsed if o.key_or_group == group and o.value() == name
    ]
    where, _ = _split_location(str(error), loader)
    where = _line_that_asks(group, name, parsed, loader) or where
    if by_override:
        where = f"command line: {by_override[-1]}"
    hint = f"Use one of: {', '.join(options)}." if options else ""
    if group == RECIPE_GROUP:
        hint += " Your own recipes are found in ./recipes."
    nearest = tuple(difflib.get_close_matches(Path(name).stem, options))
    return Fault(
        group,
        f"there is no {group or 'configuration'} called '{name}'",
        where,
        nearest,
        hint.strip(),
    )


def _line_that_asks(group: str, name: str, parsed: Sequence[Override], loader: ConfigLoader) -> str:
    """The line of the chosen recipe that asks for an option, e.g. `override /model: fluxx`; "" if it isn't there."""
    asks = re.compile(rf"\b{re.escape(group)}\s*:\s*['\"]?{re.escape(name)}\b")
    for override in parsed:
        file = file_of(loader, f"{RECIPE_GROUP}/{override.value()}")
        if override.key_or_group != RECIPE_GROUP or file is None:
            continue
        for number, line in enumerate(read_yaml_text(file).splitlines(), start=1):
            if asks.search(line):
                return f"{shown_path(file)}:{number}"
    return ""


def _unspecified_group(group: str, parsed: Sequence[Override], loader: ConfigLoader) -> list[Fault]:
    options = options_of(loader, group)
    example = options[0] if options else "NAME"
    faults = [
        Fault(
            group,
            f"must be given, e.g. {group}={example}",
            nearest=(),
            hint=f"Use one of: {', '.join(options)}.",
        )
    ]
    for override in parsed:
        key = override.key_or_group
        if key != group and difflib.get_close_matches(key, [group], cutoff=0.7):
            faults.append(
                Fault(key, "unknown key", f"command line: {override.input_line}", (group,))
            )
    return faults


def options_of(loader: ConfigLoader, group: str) -> Sequence[str]:
    """Every name that a group takes."""
    return recipe_names() if group == RECIPE_GROUP else loader.get_group_options(group)
