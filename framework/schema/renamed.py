"""What other trainers call a setting, and what Octavo itself once called it: from `renamed.yaml`, read only for a fault.

The table answers a flag on the command line (`--fp8_models "transformer/*.safetensors"`) and a key in a configuration
(`optim.learning_rate: 1e-3`) with the key to use here and how to write the value, or says why there is none.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from framework.errors import Fault
from framework.schema.names import known_paths
from framework.schema.run import RunConfig
from framework.schema.wording import assignment, slot_at, yaml_text

_TABLE_FILE = Path(__file__).with_name("renamed.yaml")
_COMPONENT = "{component}"
# Words by which a component is recognised in a value such as "Qwen/Qwen-Image:text_encoder/model*.safetensors".
_COMPONENT_WORDS = {
    "dit": ("dit", "transformer", "unet", "diffusion_model"),
    "text_encoder": ("text_encoder", "llm", "qwen2_5_vl", "te", "clip", "t5"),
    "vae": ("vae", "autoencoder"),
}
_OFF = ("false", "off", "no", "0", "none", "null")


@dataclass(frozen=True)
class Renamed:
    """One row of the table.

    name: what is called so elsewhere.   trainer: who calls it so; "" where several do.
    keys: the key to use here, several where the value names several components; empty where there is none.
    form: how the value is written (see `renamed.yaml`).
    fixed: the value to write whatever was given.   note: what else to know, in sentences.
    reason: why there is no such key, in words that end a sentence.   closest: keys that come closest.
    version: since when Octavo's own key has its new name, or is gone.
    """

    name: str
    trainer: str = ""
    keys: tuple[str, ...] = ()
    form: str = "same"
    fixed: str = ""
    note: str = ""
    reason: str = ""
    closest: tuple[str, ...] = ()
    version: str = ""

    @property
    def key(self) -> str:
        """The first key to use here; "" where there is none."""
        return self.keys[0] if self.keys else ""

    def meaning(self) -> str:
        """Say in a clause what the name stands for here."""
        if self.version:
            fate = f"is called {self.key}" if self.key else f"is gone: {self.reason}"
            return f"since version {self.version} {self.name} {fate}"
        if self.key:
            calls = f"{self.trainer} calls" if self.trainer else "other trainers call"
            return f"what {calls} {self.name} is {' and '.join(self.keys)} here"
        return self.reason

    def hint(self, value: object) -> str:
        """Say what to write instead."""
        if self.key:
            written = [self._written(key, value) for key in self.keys]
            if None in written:
                return f"Set {self.key}. {self.note}".rstrip()
            return f"Write {' '.join(text for text in written if text)}. {self.note}".rstrip()
        parts = [self.note] if self.note else ["Remove it."]
        if self.closest:
            parts.append(f"Closest: {', '.join(self.closest)}.")
        return " ".join(parts)

    def _written(self, key: str, value: object) -> str | None:
        """The setting as it is typed here, with the value converted; None where that isn't possible."""
        if self.fixed:
            return f"{key}={self.fixed}"
        converted = _converted(value, self.form, key)
        return None if converted is None else assignment(key, converted)

    def for_value(self, value: object) -> Renamed:
        """The row with the components filled in that the value names; the transformer where it names none."""
        if _COMPONENT not in self.key:
            return self
        names = components_named(str(value)) or ("dit",)
        return replace(self, keys=tuple(self.key.replace(_COMPONENT, name) for name in names))

    def fault(self, path: str, where: str, value: object) -> Fault:
        """The fault of a key called so."""
        row = self.for_value(value)
        return Fault(
            path,
            f"unknown key; {row.meaning()}",
            where,
            row.keys or row.closest,
            row.hint(value),
            code="renamed-key",
            value="" if value is None or isinstance(value, Mapping) else yaml_text(value),
            allowed=row.key,
        )


@dataclass(frozen=True)
class Table:
    """All that `renamed.yaml` holds.

    foreign: name, or the end of a dotted path, -> row.   own: whole path -> row.
    values: key of ours -> {what is written elsewhere: what is written here}.
    """

    foreign: Mapping[str, Renamed]
    own: Mapping[str, Renamed] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def explain_flag(flag: str, value: str | None) -> Fault:
    """Answer a flag of another trainer, e.g. ("--learning_rate", "1e-4").

    flag: with its dashes.   value: the text that came with it; None for a switch.
    """
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    typed = f"{flag} {value}" if value else flag
    where = f"command line: {typed}"
    row = table().foreign.get(name.lower())
    if row is not None:
        row = row.for_value(value)
        return Fault(
            flag,
            f"settings are written key=value, without dashes; {row.meaning()}",
            where,
            row.keys or row.closest,
            row.hint(value),
            code="foreign-flag",
            value=value or "",
            allowed=row.key,
        )
    nearest = _nearest_to_flag(name)
    hint = "All keys are listed by `octavo schema` and in docs/config.md."
    if nearest:
        hint = f"Write {assignment(nearest[0], value)}." if value else f"Set {nearest[0]}."
    return Fault(
        flag,
        "no such flag; settings are written key=value, without dashes",
        where,
        nearest,
        hint,
        code="foreign-flag",
        value=value or "",
        allowed="key=value",
    )


def explain_key(path: str) -> Renamed | None:
    """What an unknown key is called here, if another trainer has one of that name.

    path: dotted; the whole of it is looked up, then its ends (`train.dtype`, `dtype`). A name that is a key of ours too
    was only put in the wrong place, and isn't looked up. A row about the transformer answers for another component
    where the path lies in that one.
    """
    pieces = re.sub(r"\[\d+\]", "", path).lower().replace("-", "_").split(".")
    paths = known_paths(RunConfig)
    for start in range(len(pieces)):
        row = table().foreign.get(".".join(pieces[start:]))
        if row is None or (start == len(pieces) - 1 and _is_ours(pieces[-1], paths)):
            continue
        inside = next((name for name in _COMPONENT_WORDS if name in pieces[:start]), "")
        if inside and row.key:
            key = row.key.replace(_COMPONENT, inside).replace("model.dit.", f"model.{inside}.", 1)
            note = row.note.replace("model.dit.", f"model.{inside}.")
            return replace(row, keys=(key,), note=note) if key in paths else row
        return row
    return None


def _is_ours(name: str, paths: Sequence[str]) -> bool:
    return any(path.rpartition(".")[2] == name for path in paths)


def removed_key(path: str) -> Renamed | None:
    """What became of a key that Octavo itself once had."""
    return table().own.get(path)


def value_called_elsewhere(path: str, value: str) -> str | None:
    """What a value such as `adamw8bit` of the key at `path` is called here; None where the table doesn't say."""
    key = re.sub(r"\[\d+\]", "", path)
    values = table().values
    return values.get(key, values.get(key.rpartition(".")[2], {})).get(value.lower())


def components_named(text: str) -> tuple[str, ...]:
    """The components that a text such as "transformer/*.safetensors,vae/*.safetensors" names."""
    words = re.split(r"[^a-z0-9]+", text.lower())
    joined = "_".join(words)
    return tuple(
        component
        for component, names in _COMPONENT_WORDS.items()
        if any(name in words or ("_" in name and name in joined) for name in names)
    )


@cache
def table() -> Table:
    """The shipped table."""
    return read_table(_TABLE_FILE.read_text(encoding="utf-8"))


def read_table(text: str) -> Table:
    """Read a table of the form that `renamed.yaml` describes."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content: dict[str, Any] = yaml.load(text, Loader=loader)
    trainers: dict[str, str] = content["trainers"]
    diffsynth = frozenset(content["diffsynth"].split())
    foreign: dict[str, Renamed] = {}
    for names, row in content["foreign"].items():
        for name in str(names).split():
            assert name not in foreign, f"{name} stands twice in the table"
            foreign[name] = _row(name, row, trainers, diffsynth)
    own = {row["old"]: _own_row(row) for row in content["own"]}
    values = {
        str(key): {str(there).lower(): str(here) for there, here in names.items()}
        for key, names in content["values"].items()
    }
    return Table(foreign, own, values)


def _row(
    name: str, row: Mapping[str, Any], trainers: Mapping[str, str], diffsynth: frozenset[str]
) -> Renamed:
    codes = ["d"] if name in diffsynth else row.get("of", ())
    return Renamed(
        name.rpartition(".")[2],
        trainer=trainers[codes[0]] if len(codes) == 1 else "",
        keys=(row["key"],) if "key" in row else (),
        form=row.get("form", "same"),
        fixed=str(row.get("set", "")),
        note=row.get("note", ""),
        reason=row.get("none", ""),
        closest=tuple(row.get("closest", ())),
    )


def _own_row(row: Mapping[str, Any]) -> Renamed:
    return Renamed(
        row["old"],
        keys=(row["new"],) if "new" in row else (),
        note=row.get("note", ""),
        reason=row.get("gone", ""),
        version=str(row["version"]),
    )


def _converted(value: object, form: str, key: str) -> object:
    """Write a value of another trainer as it is written here; None where that can't be told."""
    text = yaml_text(value) if value is not None and not isinstance(value, Mapping) else ""
    match form:
        case "switch":
            return "false" if text.lower() in _OFF else "true"
        case "opposite":
            return "true" if text.lower() in _OFF else "false"
        case "number":
            return value if text else None
        case "list":
            parts = [str(v) for v in value] if isinstance(value, list | tuple) else None
            parts = re.split(r"[\s,]+", text.strip()) if parts is None and text else parts
            return parts or None
        case "pixels":
            return _pixels(text)
        case "hub_id":
            return text.split(",")[0].split(":")[0].strip("'\"[] ") or None
        case "percent":
            return float(text) / 100 if re.fullmatch(r"\d+(\.\d+)?", text) else None
        case "choice":
            slot = slot_at(RunConfig, tuple(key.split(".")))
            known = slot is not None and text in slot.choices
            return text if known else value_called_elsewhere(key, text)
        case "unknown":
            return None
    return value if text else None


def _pixels(text: str) -> int | None:
    """Pixels of a picture from its side, or from width and height: "1024", "1024,768", "[512, 768]" (the largest)."""
    sides = [int(side) for side in re.findall(r"\d+", text)]
    if not sides:
        return None
    return math.prod(sides) if len(sides) == 2 and not text.startswith("[") else max(sides) ** 2


def _nearest_to_flag(name: str) -> tuple[str, ...]:
    """Keys that a flag nobody knows was probably meant to be: itself, its last part, or one spelt like it."""
    paths = known_paths(RunConfig)
    if name in paths:
        return (name,)
    found = [path for path in paths if path.rpartition(".")[2] == name]
    by_name = {path.rpartition(".")[2]: path for path in reversed(paths)}
    names = [*by_name, *(row for row in table().foreign if "." not in row), *paths]
    for close in difflib.get_close_matches(name, names, n=3, cutoff=0.75):
        row = table().foreign.get(close)
        target = by_name.get(close) or (row.for_value(None).key if row is not None else close)
        found += [target] if target else []
    return tuple(dict.fromkeys(found))[:3]
