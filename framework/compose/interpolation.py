"""Fills in interpolations, and says of each that can't be filled in what it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from framework.compose.merge import paths_of
from framework.compose.messages import close_names, cut, listed
from framework.compose.provenance import Provenance, canonical_path
from framework.errors import Fault

_FAILED = (
    OmegaConfBaseException,
    RecursionError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
_RESOLVERS = (
    "oc.env",
    "oc.select",
    "oc.decode",
    "oc.create",
    "oc.deprecated",
    "oc.dict.keys",
    "oc.dict.values",
)
_TARGET = re.compile(r"\$\{\s*([^${}:]+?)\s*\}")
_RESOLVER = re.compile(r"\$\{\s*([^${}:]+?)\s*:")
_HINT = "An interpolation names a full path, e.g. ${optim.lr}, or ${oc.env:NAME,default}."


def resolve(config: DictConfig, where: Provenance) -> tuple[dict[str, Any], list[Fault], list[str]]:
    """Fill in interpolations.

    Returns plain values, a fault for each interpolation that can't be filled in, and the paths of those; they are left
    out of the values. Changes `config` where there are any.
    """
    with _own_resolvers_only():
        return _resolve(config, where)


@contextmanager
def _own_resolvers_only() -> Iterator[None]:
    """Hide resolvers that others in this process registered, as Hydra does: a file means the same everywhere."""
    known = BaseContainer._resolvers
    foreign = {name: known.pop(name) for name in list(known) if name not in _RESOLVERS}
    try:
        yield
    finally:
        known.update(foreign)


def _resolve(
    config: DictConfig, where: Provenance
) -> tuple[dict[str, Any], list[Fault], list[str]]:
    try:
        return _plain(config), [], []
    except _FAILED:
        pass
    broken = dict(_broken(config, ""))
    faults = []
    for path, (text, error) in broken.items():
        if not _leads_to_another(path, text, broken):
            faults.append(_fault(config, path, text, error, where(path)))
    for path in broken:
        _take_out(config, path)
    try:
        return _plain(config), faults, list(broken)
    except _FAILED as error:  # a circle through whole sections, which no single value shows
        message = f"an interpolation can't be filled in: {_first_line(error)}"
        fault = Fault("", message, "default", hint=_HINT, code="interpolation")
        return {}, [*faults, fault], [""]


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _broken(node: Any, path: str) -> Iterator[tuple[str, tuple[str, Exception]]]:
    """Path, text and error of every interpolation that can't be filled in."""
    if isinstance(node, ListConfig | DictConfig) and (node._is_none() or node._is_missing()):
        return
    keys: list[Any] = list(range(len(node))) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        below = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}".lstrip(".")
        child = node._get_node(key)
        if child._is_interpolation():
            try:
                found = node[key]
                if OmegaConf.is_config(found):
                    OmegaConf.to_container(found, resolve=True)
            except _FAILED as error:
                yield below, (str(child._value()), error)
        elif OmegaConf.is_config(child):
            yield from _broken(child, below)


def _leads_to_another(path: str, text: str, broken: dict[str, tuple[str, Exception]]) -> bool:
    """Whether a value fails only because another one does, which has a fault of its own."""
    reached: set[str] = set()
    ways = [text]
    while ways:
        for target in _TARGET.findall(ways.pop()):
            for other in broken:
                if other not in reached and _touches(canonical_path(target), other):
                    reached.add(other)
                    ways.append(broken[other][0])
    return bool(reached) and path not in reached


def _touches(target: str, path: str) -> bool:
    return path == target or path.startswith((f"{target}.", f"{target}["))


def _fault(config: DictConfig, path: str, text: str, error: Exception, where: str) -> Fault:
    reason, hint, nearest = _reason(config, path, text, error)
    message = f"'{cut(text)}' can't be filled in: {reason}"
    return Fault(canonical_path(path), message, where, nearest, hint, "interpolation", value=text)


def _reason(
    config: DictConfig, path: str, text: str, error: Exception
) -> tuple[str, str, tuple[str, ...]]:
    first = _first_line(error)
    targets = _TARGET.findall(text)
    if isinstance(error, UnsupportedInterpolationType):
        name = first.rpartition(" ")[2]
        nearest = tuple(r for r in _RESOLVERS if r.rpartition(".")[2] == name)
        nearest = nearest or close_names(name, _RESOLVERS)
        hint = f"Write ${{{nearest[0]}:...}}." if nearest else f"There are: {listed(_RESOLVERS)}."
        return f"there is no resolver '{name}'", hint, nearest
    variable = re.search(r"Environment variable '(.*?)' not found", first)
    if variable is not None:
        hint = f"Set it, or give a default: ${{oc.env:{variable[1]},default}}."
        return f"the environment variable {variable[1]} isn't set", hint, ()
    if "Recursive" in first or "RecursionError" in first or isinstance(error, RecursionError):
        return "it leads back to itself", "Give one of the values in the circle.", ()
    if "parent node" in first:
        return "it stands inside what it names", "Name a key beside it.", ()
    if isinstance(error, InterpolationToMissingValueError):
        target = targets[0] if targets else first.rpartition(" ")[2]
        return f"{target} isn't set", f"Set it, e.g. {target}=...", ()
    missing = [t for t in targets if not _exists(config, path, t)]
    if isinstance(error, InterpolationKeyError) or missing:
        return _no_target(config, missing[0] if missing else first.rpartition(" ")[2].strip("'"))
    return first, _HINT, ()


def _no_target(config: DictConfig, target: str) -> tuple[str, str, tuple[str, ...]]:
    from framework.schema.names import known_paths
    from framework.schema.run import RunConfig

    bare = target.lstrip(".")
    if bare in known_paths(RunConfig):
        hint = f"Set {bare} in the recipe; an interpolation doesn't see what a key is by default."
        return f"no file or override sets {target}", hint, ()
    paths = paths_of(config)
    paths = [p for p in paths if not any(other.startswith(f"{p}.") for other in paths)]
    last = bare.rpartition(".")[2]
    nearest = close_names(bare, paths, cutoff=0.7)
    nearest += tuple(p for p in paths if p.endswith(f".{last}") and p not in nearest)[:3]
    nearest = nearest or close_names(bare, known_paths(RunConfig), cutoff=0.7)
    hint = f"Write ${{{nearest[0]}}}." if nearest else _HINT
    return f"there is no {target}", hint, nearest[:3]


def _exists(config: DictConfig, path: str, target: str) -> bool:
    if target.startswith("."):
        return True
    try:
        node = OmegaConf.select(
            config, target, throw_on_missing=False, throw_on_resolution_failure=False
        )
    except _FAILED:
        return False
    return node is not None or canonical_path(target) in paths_of(config)


def _take_out(config: DictConfig, path: str) -> None:
    """Remove a value; an element takes its whole list with it, whose other elements would move."""
    node: Any = config
    *parents, last = path.partition("[")[0].split(".")
    for piece in parents:
        node = node._get_node(piece) if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and last in list(node):
        del node[last]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
