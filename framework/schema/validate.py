"""Judges a whole configuration at once, so that a person sees every fault in one report and before anything is read.

Field errors are found by pydantic and put into our words. What is faulty is then replaced by a default, so that the
rules across keys (`rules.py`) can judge the rest in the same report.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from framework.errors import ConfigError, Fault
from framework.schema.names import field_annotation, nearest_paths, section_class
from framework.schema.rules import Finding, check_rules
from framework.schema.run import RunConfig

UNSET = "???"
Use = Literal["train", "plan", "generate"]
Pieces = tuple[str | int, ...]
Where = Callable[[str], str]

_MAX_ROUNDS = 8  # each round removes every fault that pydantic reports; two are enough in practice
_STAND_IN = "unset"
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_": "a text",
    "tuple_": "a list",
    "list_": "a list",
    "model_": "a section with keys of its own",
    "finite_": "a finite number",
}


def validate(
    values: Mapping[str, Any], where: Where, *, use: Use = "train"
) -> tuple[RunConfig, list[Fault]]:
    """Turn composed values into a RunConfig and warnings.

    values: nested plain data; "???" stands for a value that must still be given.   where: path -> what set it.
    use: `plan` and `generate` don't read data, so a missing `data.path` is no fault there; `generate` trains nothing.
    Raises ConfigError with every fault: unknown keys, missing and wrong values, and rules across keys.
    """
    working = copy.deepcopy(dict(values))
    faults: dict[str, Fault] = {}
    replaced: set[str] = set()
    for pieces in list(_unset_paths(working)):
        path = join_path(pieces)
        _remove(working, pieces)
        if field_annotation(RunConfig, pieces) is None:
            _record(faults, _unknown_key(path, None, where))
    for pieces in list(_booleans_as_numbers(working, RunConfig, ())):
        path = join_path(pieces)
        _record(
            faults,
            Fault(path, f"must be a number, not {_shown(_get(working, pieces))}", where(path)),
        )
        replaced.add(path)
        _remove(working, pieces)
    config = _repair(working, where, use, faults, replaced)
    errors, warnings = check_rules(config, values, where, trains=use != "generate")
    for finding in errors:
        if not _touches(finding, replaced):
            _record(faults, finding.fault)
    if faults:
        raise ConfigError(list(faults.values()))
    return config, [finding.fault for finding in warnings]


def _repair(
    working: dict[str, Any], where: Where, use: Use, faults: dict[str, Fault], replaced: set[str]
) -> RunConfig:
    """Validate; note faults, take the faulty values out, and repeat until what is left is valid. Changes `working`."""
    for _ in range(_MAX_ROUNDS):
        try:
            return RunConfig.model_validate(working)
        except ValidationError as error:
            for pieces, details in _by_key(error.errors()).items():
                path = join_path(pieces)
                required = details[0]["type"] == "missing" and isinstance(
                    details[0]["loc"][-1], str
                )
                if required:
                    # It was never given, or it (or the section around it) was faulty and taken out just before.
                    _put(working, pieces, _stand_in(pieces))
                    if any(
                        join_path(pieces[:end]) in replaced for end in range(1, len(pieces) + 1)
                    ):
                        continue
                    if section_class(field_annotation(RunConfig, pieces)) is not None:
                        continue  # the next round names the keys that the section must have
                    if use == "train" or pieces[0] == "model":
                        _record(faults, _missing(path, pieces, where))
                else:
                    _record(faults, _describe(pieces, details, where))
                    _remove(working, pieces)
                replaced.add(path)
    raise AssertionError(f"could not judge the configuration any further: {sorted(replaced)}")


def join_path(pieces: Iterable[str | int]) -> str:
    """Join names and list indices to one dotted path: ("a", 0, "b") becomes "a[0].b"."""
    path = ""
    for piece in pieces:
        path += f"[{piece}]" if isinstance(piece, int) else f".{piece}" if path else piece
    return path


def _record(faults: dict[str, Fault], fault: Fault) -> None:
    """Keep the first fault of a path; rules on the same path say something else and are kept too."""
    key = fault.path if fault.path not in faults else f"{fault.path}: {fault.message}"
    faults.setdefault(key, fault)


def _touches(finding: Finding, replaced: set[str]) -> bool:
    """Whether a rule looked at a value that is only a stand-in, or lies in or around a faulty section."""
    return any(
        read == path
        or read.startswith((f"{path}.", f"{path}["))
        or path.startswith((f"{read}.", f"{read}["))
        for read in finding.reads
        for path in replaced
    )


def _by_key(errors: Sequence[ErrorDetails]) -> dict[Pieces, list[ErrorDetails]]:
    """Gather errors by the key that they are about; a union reports one for each of its members."""
    found: dict[Pieces, list[ErrorDetails]] = {}
    for error in errors:
        pieces = _key_of(error["loc"])
        if error["type"] == "missing" and isinstance(pieces[-1], int):
            pieces = pieces[:-1]  # too few elements are a fault of the list
        found.setdefault(pieces, []).append(error)
    # Faulty elements are left out before pydantic counts, so that a list may be called too short besides.
    lists = {pieces[:-1] for pieces in found if isinstance(pieces[-1], int)}
    return {pieces: details for pieces, details in found.items() if pieces not in lists}


def _key_of(loc: Sequence[str | int]) -> Pieces:
    """Cut pydantic's names of union members off a location, e.g. ("shift", "literal['scheduler']")."""
    annotation: Any = RunConfig
    for index, piece in enumerate(loc):
        section = section_class(annotation)
        if section is None:
            return tuple(loc[: index + 1]) if isinstance(piece, int) else tuple(loc[:index])
        if piece not in section.model_fields:
            return tuple(loc[: index + 1])
        annotation = section.model_fields[str(piece)].annotation
    return tuple(loc)


def _describe(pieces: Pieces, details: Sequence[ErrorDetails], where: Where) -> Fault:
    path, first = join_path(pieces), details[0]
    kind, found = first["type"], first.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(path, found, where)
    if kind == "missing":
        found = first["input"]
    allowed = [name for detail in details for name in _allowed(detail)]
    wanted = " or ".join(dict.fromkeys(_wanted(detail) for detail in details))
    place = where(path)
    if pieces == ("model", "family"):
        hint = "A new family is one file and one YAML; see docs/adding_a_family.md."
        message = f"there is no model family {_shown(found)}; allowed: {', '.join(allowed)}"
        return Fault(path, message, place, _close(found, allowed), hint)
    length = _list_length(pieces)
    if length is not None and kind in ("missing", "too_short", "too_long", "tuple_type"):
        wanted = f"a list of {length} values"
    message = f"{_shown(found)} is not allowed; it must be {wanted}"
    hint = ""
    if kind == "string_type" and isinstance(found, int | float):
        hint = f'To give it as a text, quote it: in YAML "{found}", on the command line \'{path}="{found}"\'.'
    elif kind == "string_pattern_mismatch":
        section = section_class(field_annotation(RunConfig, pieces[:-1]))
        hint = str(section.model_fields[str(pieces[-1])].description) if section else ""
    elif kind in ("tuple_type", "list_type"):
        item = str(found) if isinstance(found, str | int | float) else "..."
        hint = f"Write a list, e.g. {path}=[{','.join([item] * (length or 1))}]."
    elif kind == "model_type" and found is not None:
        hint = f"Set a key below it, e.g. {path}.{_first_key(pieces)}=..."
    return Fault(path, message, place, _close(found, allowed), hint)


def _wanted(detail: ErrorDetails) -> str:
    """What pydantic wanted instead, as the end of the sentence "it must be ..."."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {context[key]:g}"
    if kind == "literal_error":
        return (
            f"one of {', '.join(_allowed(detail))}"
            if len(_allowed(detail)) > 1
            else _allowed(detail)[0]
        )
    if kind in ("too_short", "too_long"):
        limit = context.get("min_length", context.get("max_length"))
        return f"a list of at {'least' if kind == 'too_short' else 'most'} {limit} values"
    if kind == "string_too_short":
        return "a text that isn't empty"
    if kind == "string_pattern_mismatch":
        return f"of the form {context['pattern']}"
    if kind == "int_from_float":
        return "a whole number"
    return next((words for start, words in _KINDS.items() if kind.startswith(start)), detail["msg"])


def _list_length(pieces: Pieces) -> int | None:
    """How many values the list at `pieces` must have; None where it isn't fixed, or no list."""
    annotation = field_annotation(RunConfig, pieces)
    for member in (annotation, *get_args(annotation)):
        if get_origin(member) is tuple and Ellipsis not in get_args(member):
            return len(get_args(member))
    return None


def _allowed(detail: ErrorDetails) -> list[str]:
    if detail["type"] != "literal_error":
        return []
    return re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))


def _close(found: object, allowed: Sequence[str]) -> tuple[str, ...]:
    return tuple(difflib.get_close_matches(str(found).lower(), allowed, n=2, cutoff=0.5))


def _unknown_key(path: str, found: object, where: Where) -> Fault:
    """An unknown key. A section of which one key was set is named with that key, as it was typed."""
    while isinstance(found, Mapping) and len(found) == 1:
        key, found = next(iter(found.items()))
        path = f"{path}.{key}"
    nearest = nearest_paths(RunConfig, path)
    hint = "" if nearest else "All keys are listed by `octavo schema` and in the README."
    if path.rpartition(".")[2] == "_target_":
        hint = "A configuration is data: nothing in it is imported or called. Remove the key."
        nearest = ()
    return Fault(path, "unknown key", where(path), nearest, hint)


def _missing(path: str, pieces: Pieces, where: Where) -> Fault:
    place = where(path)
    section = section_class(field_annotation(RunConfig, pieces[:-1]))
    field = section.model_fields[str(pieces[-1])] if section else None
    about = f": {field.description.rstrip('.')}" if field is not None and field.description else ""
    hint = f"Set it in the recipe or on the command line: {path}=..."
    return Fault(path, f"must be set{about}", "" if place == "default" else place, hint=hint)


def _first_key(pieces: Pieces) -> str:
    section = section_class(field_annotation(RunConfig, pieces))
    return next(iter(section.model_fields)) if section else "KEY"


def _stand_in(pieces: Pieces) -> Any:
    """Something valid for a required key, so that the rest can be judged."""
    annotation = field_annotation(RunConfig, pieces)
    if section_class(annotation) is not None:
        return {}
    literal = re.findall(r"'([^']*)'", str(annotation))
    return literal[0] if literal else _STAND_IN


def _shown(value: object) -> str:
    """Write a value as YAML would."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _unset_paths(node: object, pieces: Pieces = ()) -> Iterable[Pieces]:
    """Every path whose value must still be given."""
    if node == UNSET:
        yield pieces
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _unset_paths(value, (*pieces, str(key)))


def _booleans_as_numbers(
    node: object, section: type[BaseModel], pieces: Pieces
) -> Iterable[Pieces]:
    """Every number that was given as true or false, which Python would take for 1 or 0."""
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        field = section.model_fields.get(str(key))
        if field is None:
            continue
        below = section_class(field.annotation)
        if below is not None:
            yield from _booleans_as_numbers(value, below, (*pieces, str(key)))
        elif isinstance(value, bool) and re.search(r"\b(int|float)\b", str(field.annotation)):
            yield (*pieces, str(key))


def _get(node: Any, pieces: Pieces) -> Any:
    for piece in pieces:
        node = node[piece]
    return node


def _remove(node: dict[str, Any], pieces: Pieces) -> None:
    """Take the value at `pieces` out, if it is still there; an element of a list takes the whole list with it."""
    parent: Any = node
    for piece, following in zip(pieces, (*pieces[1:], None), strict=True):
        if not isinstance(parent, dict) or piece not in parent:
            return
        if following is None or isinstance(following, int):
            del parent[piece]
            return
        parent = parent[piece]


def _put(node: dict[str, Any], pieces: Pieces, value: Any) -> None:
    for piece in pieces[:-1]:
        node = node.setdefault(str(piece), {})
    node[str(pieces[-1])] = value
