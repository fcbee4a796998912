"""`octavo explain`: what a key does, what it may be, and what set its present value."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from framework.cli.report import error_console, output_console
from framework.compose import compose_run, read_sweep, recipe_files
from framework.compose.sources import shown_path
from framework.errors import ConfigError, Fault
from framework.judge import judge_run
from framework.schema.in_words import (
    Json,
    as_yaml,
    default_in_words,
    example_in_words,
    is_section,
    values_in_words,
)
from framework.schema.json_schema import SWEEP_GROUPS, find, run_schema, sweep_options
from framework.schema.names import nearest_paths
from framework.schema.paths import UNSET
from framework.schema.related import related_keys
from framework.schema.renamed import Renamed, explain_key, removed_key
from framework.schema.run import RunConfig

_ABSENT = object()
_LONGEST_VALUE = 40


@dataclass(frozen=True)
class Present:
    """What a configuration says, faulty or not.

    values: as composed.   settings: of its sweep, below "launcher" and "sweeper".   faults: all that is wrong with it.
    given: whether there is a configuration at all, or only a question about a key.
    """

    given: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)
    where: Any = None
    faults: tuple[Fault, ...] = ()

    def value(self, path: str) -> Any:
        """The value at a dotted path; `_ABSENT` where nothing sets it."""
        node: Any = self.values
        for piece in path.split("."):
            if not isinstance(node, Mapping) or piece not in node:
                return _ABSENT
            node = node[piece]
        return node


def run_explain(key: str, overrides: Sequence[str], *, config_dir: Path | None) -> None:
    """Print all that is known of a key or section.

    key: dotted path, or another trainer's name for it; `KEY=VALUE` explains KEY with that value.
    overrides: recipe and overrides whose present value is told; it may be faulty.
    Raises ConfigError where there is no such key.
    """
    path, _, value = key.partition("=")
    if value:
        overrides = [key, *overrides]
    path = re.sub(r"\[\d+\]|\.\d+(?=\.|$)", "", path.lstrip("+~"))
    if path == "recipe":
        _print_recipes(config_dir)
        return
    path = path.replace("/", ".") if path.startswith("hydra/") else path
    known = _lookup(path)
    renamed = None if known else _renamed(path)
    if renamed is not None:
        _print_renamed(key, renamed)
        if not renamed.key:
            return
        path = renamed.key
        known = _lookup(path)
    if not known:
        raise ConfigError([_unknown(key, path)])
    present = _present(path, overrides, config_dir)
    for about, schema, required in known:
        if is_section(schema):
            _print_section(path, schema, present, about)
        else:
            _print_key(path, schema, present, about, required=required)
    _print_faults_elsewhere(path, present)


def _lookup(path: str) -> list[tuple[str, Json, bool]]:
    """Every (choice that it needs, schema, whether it must be set) of a key; several where launchers share it."""
    if not path.startswith("hydra"):
        schema = find(run_schema(), path) if path else None
        parent = find(run_schema(), path.rpartition(".")[0]) or {}
        name = path.rpartition(".")[2]
        return [("", schema, name in parent.get("required", ()))] if schema else []
    found = []
    for group in SWEEP_GROUPS:
        section = group.replace("/", ".")
        for option in sweep_options(group):
            choice = f"{group}={option['properties']['name']['enum'][0]}"
            if path == section:
                found.append((choice, option, False))
            elif path.startswith(f"{section}."):
                key = find(option, path.removeprefix(f"{section}."))
                found += [(choice, key, False)] if key else []
    return found


def _sweep_paths() -> list[str]:
    """Every section and key that a sweep reads."""
    sections = [group.replace("/", ".") for group in SWEEP_GROUPS]
    keys = [
        f"{group.replace('/', '.')}.{name}"
        for group in SWEEP_GROUPS
        for option in sweep_options(group)
        for name in option["properties"]
    ]
    return [*sections, *dict.fromkeys(keys)]


def _renamed(path: str) -> Renamed | None:
    name = path.lstrip("-").replace("-", "_")
    row = removed_key(name) or explain_key(name)
    return row.for_value(None) if row is not None else None


def _unknown(key: str, path: str) -> Fault:
    nearest = nearest_paths(RunConfig, path.lstrip("-"))
    if path.startswith("hydra"):
        nearest = tuple(difflib.get_close_matches(path, _sweep_paths(), n=3, cutoff=0.5))
    hint = "All keys are listed by `octavo schema --format markdown` and in docs/config.md."
    if nearest:
        hint = f"Try `octavo explain {nearest[0]}`."
    return Fault(
        path, "there is no such key", f"command line: {key}", nearest, hint, code="unknown-key"
    )


def _present(path: str, overrides: Sequence[str], config_dir: Path | None) -> Present:
    """Compose what was given; its faults are told, but don't keep the key from being explained."""
    if not overrides and config_dir is None:
        return Present()
    if path.startswith("hydra"):
        request = read_sweep(overrides, config_dir=config_dir)
        values = {"hydra": request.settings}
        return Present(True, values, request.where, request.faults)
    composition = compose_run(overrides, config_dir=config_dir)
    verdict = judge_run(overrides, use="train", config_dir=config_dir, files="local")
    values = composition.values
    if verdict.config is not None:
        values = verdict.config.model_dump(mode="json")
    return Present(True, values, composition.where, verdict.faults)


def _print_key(path: str, schema: Json, present: Present, about: str, *, required: bool) -> None:
    """Print one plain key."""
    example = example_in_words(schema)
    lines = [
        ("Values", values_in_words(schema)),
        ("Default", default_in_words(schema, required=required)),
        ("Example", shlex.quote(f"{path}={example}") if example else ""),
        ("Now", _now(path, present) if present.given else ""),
    ]
    for fault in present.faults:
        if re.sub(r"\[\d+\]", "", fault.path) == path:
            lines += [("Fault", fault.message), ("Next", fault.hint)]
    lines += _related(path)
    _print_entry(path, about, schema["description"], lines)


def _print_section(path: str, schema: Json, present: Present, about: str) -> None:
    """Print a section: a line for each key with its value and meaning."""
    kind = "Now" if present.given else "Default"
    lines = _related(path)
    if "null" in schema["type"]:
        lines.insert(0, ("Default", "null: unset"))
    _print_entry(path, about, schema["description"], lines)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Key", no_wrap=True)
    for title in (kind, "Set by", "Meaning") if present.given else (kind, "Meaning"):
        table.add_column(title, overflow="fold")
    for name, key in schema["properties"].items():
        below = f"{path}.{name}"
        cells = [Text(f"  {below}", "bold"), Text(_in_table(below, key, schema, present))]
        if present.given:
            cells.append(Text(present.where(below)))
        table.add_row(*cells, Text(key["description"]))
    output_console().print(table, soft_wrap=False)


def _in_table(path: str, key: Json, section: Json, present: Present) -> str:
    """A key's present value, or its default, short enough for a table."""
    if is_section(key):
        return "..." if "null" not in key["type"] or _is_set(path, present) else "null"
    value = present.value(path) if present.given else _ABSENT
    if value is _ABSENT:
        required = path.rpartition(".")[2] in section.get("required", ())
        text = default_in_words(key, required=required)
    else:
        text = _shown(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _is_set(path: str, present: Present) -> bool:
    return present.given and isinstance(present.value(path), Mapping)


def _now(path: str, present: Present) -> str:
    """The present value and what set it."""
    value, where = present.value(path), present.where(path)
    if value is _ABSENT or value == UNSET:
        told = "not set" if value is _ABSENT else "must still be set"
        return told if where == "default" else f"{told}, see {where}"
    return f"{_shown(value)}, {'the default' if where == 'default' else f'set by {where}'}"


def _shown(value: Any) -> str:
    return "null" if value is None else as_yaml(value)


def _related(path: str) -> list[tuple[str, str]]:
    return [("See also", f"{', '.join(keys)}: {how}") for keys, how in related_keys(path)]


def _print_entry(path: str, about: str, text: str, lines: Sequence[tuple[str, str]]) -> None:
    console = output_console()
    console.print(Text.assemble((path, "bold"), f"  with {about}" if about else ""))
    console.print(Text(f"  {text}"))
    for name, line in lines:
        if line:
            console.print(Text.assemble("  ", (f"{name}: ", "dim"), line))


def _print_renamed(name: str, renamed: Renamed) -> None:
    """Say what a name that isn't ours is called here."""
    console = output_console()
    console.print(Text.assemble((name, "bold"), f": {renamed.meaning()}"))
    if renamed.note:
        console.print(Text(f"  {renamed.note}"))
    if renamed.closest and not renamed.key:
        console.print(Text(f"  Closest: {', '.join(renamed.closest)}"))


def _print_recipes(config_dir: Path | None) -> None:
    """`recipe` is no key of the schema, but the first word of every command: list what it takes."""
    text = "The file that a run is described by; it is merged over conf/, and overrides over it."
    found = recipe_files(config_dir)
    lines = [("Example", f"recipe={next(iter(found), 'NAME')}")]
    lines += [("Value", f"{name}  ({shown_path(files[0])})") for name, files in found.items()]
    _print_entry("recipe", "", text, lines)


def _print_faults_elsewhere(path: str, present: Present) -> None:
    """Say on stderr that the configuration has faults which this key's explanation doesn't show."""
    others = [fault for fault in present.faults if not fault.path.startswith(path)]
    if others:
        count = len(others)
        text = f"The configuration has {count} other fault{'s' * (count != 1)}; `octavo validate` tells them."
        error_console().print(Text(text, "yellow"))
