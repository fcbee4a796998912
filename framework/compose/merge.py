"""Puts files and overrides over each other with OmegaConf, one at a time, so that each fault has its own sentence."""

from __future__ import annotations

import copy
from typing import Any

from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.compose.messages import close_names, command_line
from framework.compose.provenance import Provenance, canonical_path
from framework.compose.repository import Repository
from framework.compose.sources import RECIPE_GROUP
from framework.compose.yaml_file import interpolation_syntax
from framework.errors import Fault

_REFUSED = (OmegaConfBaseException, ValueError, TypeError, AssertionError, RecursionError)


def merge_files(
    defaults: list[ResultDefault], repository: Repository
) -> tuple[DictConfig, Provenance, list[Fault], list[str]]:
    """Merge files in Hydra's order.

    Returns the values, what set each, faults, and paths whose value was left out.
    """
    config, where = OmegaConf.create({}), Provenance()
    faults: list[Fault] = []
    left_out: list[str] = []
    for default in defaults:
        file = repository.file(str(default.config_path))
        package = default.package or ""
        try:
            config.merge_with(_embedded(file.config, package))
        except _REFUSED:
            record = Provenance()
            record.add_file(file, package)
            for path in _merge_by_key(config, _embedded(file.config, package), ""):
                faults.append(_kinds_differ(path, record(path)))
                left_out.append(path)
        where.add_file(file, package)
        prefix = canonical_path(package)
        left_out += [f"{prefix}.{path}".strip(".") for path in file.left_out]
    return config, where, faults, left_out


def taken_back(
    defaults: list[ResultDefault], repository: Repository, where: Provenance
) -> list[Fault]:
    """Warnings for keys of a recipe that the recipe it stands on sets again, because `_self_` comes first."""
    found = []
    parents = {str(default.config_path): str(default.parent) for default in defaults}
    for index, default in enumerate(defaults):
        path = str(default.config_path)
        if not default.is_self or not path.startswith(f"{RECIPE_GROUP}/"):
            continue
        later = [
            repository.file(str(d.config_path)).shown
            for d in defaults[index + 1 :]
            if path in _recipes_above(d, parents)
        ]
        own = Provenance()
        own.add_file(repository.file(path), default.package or "")
        for key in own.leaves():
            winner = where(key)
            if winner.rsplit(":", 2)[0] in later:
                message = f"is set here, and again by {winner}, which wins"
                hint = "Put `_self_` at the end of this file's defaults list."
                found.append(Fault(key, message, own(key), hint=hint, code="unused"))
    return found


def _recipes_above(default: ResultDefault, parents: dict[str, str]) -> list[str]:
    """The files whose defaults lists lead to a file, nearest first."""
    above: list[str] = []
    parent = str(default.parent)
    while parent in parents and parent not in above:
        above.append(parent)
        parent = parents[parent]
    return above


def _embedded(config: DictConfig, package: str) -> DictConfig:
    if not package:
        return config
    outer = OmegaConf.create({})
    OmegaConf.update(outer, package, config, merge=False)
    return outer


def _merge_by_key(config: DictConfig, source: DictConfig, path: str) -> list[str]:
    """Merge what can be merged; returns the paths that can't."""
    refused = []
    for key in list(source):
        below = f"{path}.{key}" if path else str(key)
        node = source._get_node(key)
        part: Any = {key: copy.deepcopy(node)}
        for piece in reversed(path.split(".") if path else []):
            part = {piece: part}
        try:
            config.merge_with(OmegaConf.create(part))
        except _REFUSED:
            there = OmegaConf.select(config, below, throw_on_resolution_failure=False)
            if isinstance(node, DictConfig) and isinstance(there, DictConfig) and len(node):
                refused += _merge_by_key(config, node, below)
            else:
                refused.append(below)
    return refused


def _kinds_differ(path: str, where: str) -> Fault:
    message = "is a section in one file and a list in another"
    hint = "Write it as the other file does; `octavo explain KEY` says which of the two is right."
    return Fault(path, message, where, hint=hint, code="wrong-type")


def apply_override(config: DictConfig, override: Override) -> Fault | None:
    """Set or remove one key. Changes `config`, unless it returns a fault."""
    key, line = override.key_or_group, str(override.input_line)
    pieces = key.split(".")
    where = command_line(line)
    try:
        if override.is_delete():
            return _remove(config, pieces, override, where)
        fault = (
            _text_fault(key, override.value(), where)
            or _parent_fault(config, pieces, where)
            or _kind_fault(config, key, override, where)
        )
        if fault is None:
            OmegaConf.update(
                config, key, _with_text_keys(override.value()), merge=True, force_add=True
            )
        return fault
    except _REFUSED as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"can't be set: {reason}"
        hint = "Give the whole value of the section or list around it."
        return Fault(canonical_path(key), message, where, hint=hint, code="override-syntax")


def _text_fault(key: str, value: Any, where: str) -> Fault | None:
    """A fault if a text in the value holds an interpolation that can't be read."""
    if isinstance(value, list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return next(filter(None, (_text_fault(key, part, where) for part in parts)), None)
    problem = interpolation_syntax(value) if isinstance(value, str) and "${" in value else None
    if problem is None:
        return None
    message, hint = problem
    path = canonical_path(key)
    return Fault(path, message, where, hint=hint, code="interpolation", value=str(value))


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {"null" if key is None else str(key): _with_text_keys(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_with_text_keys(item) for item in value]
    return value


def _parent_fault(config: DictConfig, pieces: list[str], where: str) -> Fault | None:
    """A fault if the way to a key leads through a single value, or through an element that a list doesn't have."""
    node: Any = config
    for index, piece in enumerate(pieces):
        path = canonical_path(".".join(pieces[:index]))
        if isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():
            if node._is_interpolation():
                return None
            if not piece.isdigit() or int(piece) >= len(node):
                count = f"it has {len(node)}, counted from 0"
                message = f"there is no element {piece} in this list; {count}"
                hint = f"Give the whole list: {path}=[...]."
                shown = canonical_path(".".join(pieces[: index + 1]))
                return Fault(shown, message, where, hint=hint, code="out-of-range", value=piece)
            node = node._get_node(int(piece))
        elif isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            if node._is_interpolation():
                return None
            node = node._get_node(piece) if piece in list(node) else None
            if node is None:
                return None
        elif node is None or node._is_none() or node._is_missing() or node._is_interpolation():
            return None  # it becomes a section
        else:
            shown = _shown(node._value())
            message = f"is a single value ({shown}), so nothing can be set below it"
            hint = f"Set the value itself: {path}=..."
            return Fault(path, message, where, hint=hint, code="wrong-type")
    return None


def _kind_fault(config: DictConfig, key: str, override: Override, where: str) -> Fault | None:
    """A fault if a list is given for a section, or a section for a list; OmegaConf would merge them."""
    value = override.value()
    if not isinstance(value, list | dict):
        return None
    node = OmegaConf.select(config, key, throw_on_missing=False, throw_on_resolution_failure=False)
    path = canonical_path(key)
    if isinstance(node, DictConfig) and isinstance(value, list):
        hint = f"Set a key below it, e.g. {path}.{next(map(str, node), 'KEY')}=..."
        message = "can't be set to a list: it is a section with keys of its own"
        return Fault(path, message, where, hint=hint, code="wrong-type")
    if isinstance(node, ListConfig) and isinstance(value, dict):
        message = "can't be set to a section: it is a list"
        hint = f"Write a list: {path}=[...]."
        return Fault(path, message, where, hint=hint, code="wrong-type")
    return None


def _remove(config: DictConfig, pieces: list[str], override: Override, where: str) -> Fault | None:
    node: Any = config
    for piece in pieces[:-1]:
        node = _child(node, piece)
    path, last = canonical_path(".".join(pieces)), pieces[-1]
    if _child(node, last) is None:
        return _nothing_to_remove(config, path, where)
    if isinstance(node, ListConfig):
        message = "one element of a list can't be removed"
        hint = "Give the whole list without it."
        return Fault(path, message, where, hint=hint, code="override-syntax")
    wanted = override.value()
    found = node._get_node(last)._value()
    if wanted is not None and wanted != found:
        message = f"can't be removed as {_shown(wanted)}: its value is {_shown(found)}"
        hint = f"Write ~{'.'.join(pieces)} to remove it whatever it is."
        return Fault(path, message, where, hint=hint, code="wrong-value", value=_shown(wanted))
    del node[last]
    return None


def _child(node: Any, piece: str) -> Any:
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        return node._get_node(piece) if piece in list(node) else None
    if isinstance(node, ListConfig) and not node._is_none() and piece.isdigit():
        return node._get_node(int(piece)) if int(piece) < len(node) else None
    return None


def _nothing_to_remove(config: DictConfig, path: str, where: str) -> Fault:
    from framework.schema.names import known_paths
    from framework.schema.run import RunConfig

    nearest = close_names(path, paths_of(config), cutoff=0.75)
    if path in known_paths(RunConfig):
        message = "can't be removed: no file sets it, so it has its default already"
        return Fault(path, message, where, hint="Leave this override out.", code="unknown-key")
    hint = f"Write ~{nearest[0]}." if nearest else "Leave this override out."
    message = "can't be removed: there is no such key"
    return Fault(path, message, where, nearest, hint, code="unknown-key")


def paths_of(config: Any, path: str = "") -> list[str]:
    """Dotted path of every section and value."""
    found: list[str] = []
    if isinstance(config, DictConfig) and not _is_special(config):
        for key in list(config):
            below = f"{path}.{key}" if path else str(key)
            found += [below, *paths_of(config._get_node(key), below)]
    return found


def _is_special(node: Any) -> bool:
    return bool(node._is_none() or node._is_missing() or node._is_interpolation())


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
