"""The way from a recipe and overrides to plain values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.compose.messages import file_of, options_of, translate
from framework.compose.provenance import Provenance, canonical_path
from framework.compose.sources import (
    conf_dir,
    recipe_names,
    recipes_on_search_path,
)
from framework.errors import ConfigError, Fault

_ROOT_CONFIG = "config"
_PIECE = re.compile(r"[^.\[\]]+")
_KEY = re.compile(r"[+~]{0,2}\w+([./@:]\w+)*")
# What quotes, lists, mappings, sweeps, escapes and interpolations are written with stands in no plain value.
_PLAIN_VALUE = re.compile(r"""(?P<key>[+]{0,2}[A-Za-z0-9_./]+)=(?P<value>[^'"\[\]{},$\\]*)""")
_FOREIGN_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
    ValueError,
    AssertionError,
)


@dataclass(frozen=True)
class Composition:
    """What the files and overrides say, before it is judged.

    values: plain nested dicts and lists; a value that must still be given is the string "???".
    where: looks up what set a dotted path.
    """

    values: dict[str, Any]
    where: Provenance


def compose_run(overrides: Sequence[str]) -> Composition:
    """Merge conf/, the recipe and the overrides; resolve interpolations; note what set each value.

    overrides: as typed, e.g. ["recipe=pocket_lora", "model.dit.precision=fp8"].
    Keys that don't exist are let through, so that the schema can name them with the nearest valid one.
    Raises ConfigError: syntax, unknown or missing recipe, interpolations without a target. Reads only YAML.
    """
    parsed = _parse_overrides(overrides)
    with recipes_on_search_path(), _initialized() as loader:
        groups = set(loader.list_groups(""))
        _check_group_values(parsed, groups, loader)
        lines = [_line_for_hydra(override, groups) for override in parsed]
        try:
            chosen = loader.compute_defaults_list(_ROOT_CONFIG, lines, RunMode.RUN).defaults
            config = compose(_ROOT_CONFIG, overrides=lines)
        except _FOREIGN_ERRORS as error:
            faults = _culprits(parsed, groups) or translate(error, parsed, loader)
            raise ConfigError(faults) from error
        where = Provenance()
        for default in chosen:
            file = file_of(loader, default.config_path)
            if file is not None:
                where.add_file(file, default.package or "")
        for override in parsed:
            if not _names_group(override, groups):
                where.add_override(override.get_key_element(), str(override.input_line))
    _refuse_hydra_settings(where)
    values = _resolve(config, where)
    return Composition(values, where)


@contextmanager
def _initialized() -> Iterator[ConfigLoader]:
    """Start Hydra on our configuration folder; a Hydra program that runs around us gets its own back."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(
            config_dir=str(conf_dir()), job_name="octavo", version_base="1.3"
        ):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def _parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse what was typed. Raises ConfigError that names every override with wrong syntax."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    faults: list[Fault] = []
    for line in overrides:
        where = f"command line: {line}"
        try:
            if line.startswith("="):
                raise ValueError("no key before =")
            override = _parse_one(parser, line)
        except (HydraException, ValueError) as error:
            faults.append(_syntax_fault(line, error))
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            hint = (
                f"For a list write {key}=[1,2]; for a text with a comma quote it: '{key}=\"a,b\"'."
            )
            faults.append(
                Fault(
                    key,
                    "holds several values for a sweep; one run takes one value",
                    where,
                    hint=hint,
                )
            )
        elif override.is_hydra_override():
            hint = "Use `run.name` and `run.output_dir` for where a run is written."
            faults.append(
                Fault(key, "Hydra's own settings aren't read by Octavo", where, hint=hint)
            )
        else:
            parsed.append(override)
    if faults:
        raise ConfigError(faults)
    return parsed


def _parse_one(parser: OverridesParser, line: str) -> Override:
    """Parse one override. Hydra wants quotes around `~/é (1)`; a value without any syntax in it is a text anyway."""
    try:
        return parser.parse_override(line)
    except HydraException:
        plain = _PLAIN_VALUE.fullmatch(line)
        if plain is None:
            raise
        return parser.parse_override(f"{plain['key']}='{plain['value'].strip()}'")


def _syntax_fault(line: str, error: Exception) -> Fault:
    where = f"command line: {line}"
    if "=" not in line or line.startswith("="):
        names = recipe_names()
        name = Path(line).stem if line.endswith(".yaml") else line
        close = difflib.get_close_matches(name, names, n=1)
        example = f"recipe={close[0]}" if close else "model.dit.precision=fp8"
        return Fault(
            "", f"'{line}' isn't of the form key=value", where, hint=f"Write it as e.g. {example}"
        )
    key, _, value = line.partition("=")
    reason = str(error).splitlines()[0]
    if line.startswith("-"):
        hint = f"Overrides have no dashes: {line.lstrip('-')}"
    elif "[" in key:
        hint = f"Write a list element with a dot, {'.'.join(_PIECE.findall(key))}={value}, or give the whole list."
    elif not _KEY.fullmatch(key):
        hint = "Write the key as a dotted path, e.g. model.dit.precision=fp8"
    elif value.startswith("["):
        hint = f'Put each text of the list in quotes: \'{key}=["one","two"]\''
    else:
        hint = f"Put values with spaces, commas or brackets in quotes: '{key}=\"{value}\"'"
    return Fault(key.lstrip("+~"), f"can't be parsed: {reason}", where, hint=hint)


def _names_group(override: Override, groups: set[str]) -> bool:
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def _check_group_values(parsed: Sequence[Override], groups: set[str], loader: ConfigLoader) -> None:
    """Raise ConfigError where a group is given something that can't name one of its files."""
    faults = []
    for override in parsed:
        group = override.key_or_group
        if not _names_group(override, groups) or override.is_delete():
            continue
        if not isinstance(override.value(), (str, list)):
            message = f"must name one of the files of this group, not {override.value()!r}"
            hint = f"Use one of: {', '.join(options_of(loader, group))}."
            faults.append(Fault(group, message, f"command line: {override.input_line}", hint=hint))
    if faults:
        raise ConfigError(faults)


def _line_for_hydra(override: Override, groups: set[str]) -> str:
    """Turn `key=value` into a forced one, so that an unknown key reaches our own report instead of Hydra's."""
    line = str(override.input_line)
    if _names_group(override, groups):
        return line.lstrip("+") if override.package is None else line
    if override.is_delete() or override.package is not None:
        return line
    return "++" + line.lstrip("+")


def _culprits(parsed: Sequence[Override], groups: set[str]) -> list[Fault]:
    """The overrides of plain keys that can't be merged, found by trying each alone; Hydra often doesn't name it."""
    chosen = [_line_for_hydra(o, groups) for o in parsed if _names_group(o, groups)]
    try:
        compose(_ROOT_CONFIG, overrides=chosen)
    except _FOREIGN_ERRORS:
        return []
    faults = []
    for override in parsed:
        if _names_group(override, groups):
            continue
        try:
            compose(_ROOT_CONFIG, overrides=[*chosen, _line_for_hydra(override, groups)])
        except _FOREIGN_ERRORS as error:
            cause = (
                error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
            )
            reason = str(cause).strip().splitlines()[0].replace("++", "")
            path = canonical_path(override.key_or_group)
            where = f"command line: {override.input_line}"
            hint = "Give the whole value, e.g. a list as key=[a,b]." if "[" in path else ""
            faults.append(Fault(path, f"can't be set: {reason}", where, hint=hint))
    return faults


def _refuse_hydra_settings(where: Provenance) -> None:
    places = where.files_with_key("hydra")
    if places:
        message = "Hydra's own settings aren't read by Octavo"
        raise ConfigError([Fault("hydra", message, places[0], hint="Remove the section `hydra`.")])


def _resolve(config: DictConfig, where: Provenance) -> dict[str, Any]:
    """Fill in interpolations. Raises ConfigError that names every one without a target."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        faults = list(_broken_interpolations(config, "", where))
        if not faults:
            faults = [Fault("", str(error).splitlines()[0])]
        raise ConfigError(faults) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _broken_interpolations(node: Any, path: str, where: Provenance) -> Iterator[Fault]:
    keys = range(len(node)) if OmegaConf.is_list(node) else list(node)
    for key in keys:
        below = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        if OmegaConf.is_interpolation(node, key):
            try:
                OmegaConf.to_container(OmegaConf.create({"value": node[key]}), resolve=True)
            except OmegaConfBaseException as error:
                written = node._get_node(key)._value()
                reason = str(error).splitlines()[0]
                hint = "An interpolation names a full path, e.g. ${optim.lr}."
                yield Fault(
                    canonical_path(below),
                    f"{written!r} can't be filled in: {reason}",
                    where(below),
                    hint=hint,
                )
        elif not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node[key]):
            yield from _broken_interpolations(node[key], below, where)
