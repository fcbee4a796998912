"""What was typed on the command line, word by word: groups, keys, sweeps, settings of a sweep, and every fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from framework.compose.given_twice import Setting, given_twice
from framework.compose.messages import (
    close_names,
    command_line,
    hydra_setting,
    options_hint,
    unknown_option,
)
from framework.compose.provenance import canonical_path
from framework.compose.repository import Repository
from framework.compose.sources import RECIPE_GROUP, YAML_ENDINGS
from framework.compose.syntax import syntax_fault, syntax_of_broken_pairs
from framework.errors import Fault

# What quotes, lists, mappings, sweeps, escapes and interpolations are written with stands in no plain value.
_PLAIN_VALUE = re.compile(r"""(?P<key>[+]{0,2}[A-Za-z0-9_./]+)=(?P<value>[^'"\[\]{},$\\]*)""")
_FUNCTION = re.compile(
    r"\s*(choice|range|interval|glob|tag|sort|shuffle|int|float|str|bool)\(.*", re.S
)
_UNUSABLE = (HydraException, ValueError, AssertionError, RecursionError, TypeError, OverflowError)


@dataclass
class Words:
    """The command line, sorted.

    groups: choices of a group's option.   keys: values of keys, and keys to remove.   sweeps: several values for one.
    settings: of Hydra's launcher and sweeper.   left_out: paths whose override was faulty.
    faulty_choices: overrides that choose an option in vain; `faults` says why.
    """

    groups: list[Override] = field(default_factory=list)
    keys: list[Override] = field(default_factory=list)
    sweeps: list[Override] = field(default_factory=list)
    settings: list[Override] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    faulty_choices: dict[str, list[Fault]] = field(default_factory=dict)

    def refuse(self, fault: Fault, left_out: str | None = None) -> None:
        """Note a fault, and the path that it leaves without the value that was meant."""
        self.faults.append(fault)
        if left_out is not None:
            self.left_out.append(left_out)


def read_words(tokens: Sequence[str], known: Repository) -> Words:
    """Sort what was typed. Raises nothing for what a person wrote.

    Several values for one key are sorted into `sweeps`; whether they are a fault is for the caller to say.
    """
    words = Words()
    for line in _without_flags(tokens, words, known):
        try:
            override = parse_line(line)
        except _UNUSABLE as error:
            path = canonical_path(line.partition("=")[0].strip().lstrip("+~"))
            words.refuse(syntax_fault(line, error, known), path or None)
            continue
        _sort_in(override, words, known)
    _drop_what_is_given_twice(words, known, list(map(str, tokens)))
    return words


@lru_cache(maxsize=4096)
def parse_line(line: str) -> Override:
    """Parse one override. Hydra wants quotes around `~/é (1)`; a value without any syntax in it is a text anyway."""
    if not line.partition("=")[0].strip("+~ "):
        raise ValueError("no key before =")
    parser = _parser()
    try:
        return parser.parse_override(line)
    except _UNUSABLE:
        plain = _PLAIN_VALUE.fullmatch(line)
        if plain is None or _FUNCTION.fullmatch(plain["value"]):
            raise
        override = parser.parse_override(f"{plain['key']}='{plain['value'].strip()}'")
        override.input_line = line
        return override


@lru_cache(maxsize=1)
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _without_flags(tokens: Sequence[str], words: Words, known: Repository) -> Iterator[str]:
    """Each override in turn; flags of other programs and pairs torn apart by spaces become faults."""
    rest = [str(token) for token in tokens]
    while rest:
        line = rest.pop(0)
        if line.startswith("-") and len(line) > 1:
            values = []
            while "=" not in line and rest and not rest[0].startswith("-") and "=" not in rest[0]:
                values.append(rest.pop(0))
            words.refuse(_flag_fault(line, values, known))
            continue
        torn = syntax_of_broken_pairs(line, rest)
        if torn is not None:
            fault, used = torn
            words.refuse(fault, canonical_path(fault.path))
            del rest[:used]
            continue
        yield line


def _flag_fault(line: str, values: Sequence[str], known: Repository) -> Fault:
    """A word with dashes: one of our keys written as a flag, or a flag of another trainer."""
    flag, has_value, value = line.partition("=")
    key = flag.lstrip("-")
    where = command_line(" ".join([line, *values]))
    if "." in key or known.has_group(key):
        given = value if has_value else " ".join(values) or "VALUE"
        fixed = f"{key}={given}"
        hint = f"Overrides have no dashes: {fixed}."
        message = "isn't a flag of this command"
        return Fault(flag, message, where, (fixed,), hint, code="foreign-flag", value=given)
    from framework.schema.renamed import explain_flag

    fault = explain_flag(flag, value if has_value else " ".join(values) or None)
    return replace(fault, where=where)


def _sort_in(override: Override, words: Words, known: Repository) -> None:
    key, line = override.key_or_group, str(override.input_line)
    where = command_line(line)
    if override.is_hydra_override() or key == "hydra":
        words.settings.append(override)
    elif override.package is not None:
        message = "an override can't put an option under another key with @"
        hint = f"Write {key}=... ; each group is put under its own name."
        words.refuse(Fault(canonical_path(key), message, where, hint=hint, code="override-syntax"))
    elif override.is_delete() and override.is_sweep_override():
        message = "a key that is removed takes no list of values"
        hint = f"Write ~{key}."
        words.refuse(Fault(canonical_path(key), message, where, hint=hint, code="override-syntax"))
    elif override.is_sweep_override():
        words.sweeps.append(override)
    elif known.has_group(key) and (key == RECIPE_GROUP or not isinstance(override.value(), dict)):
        _note_faults(words, line, _sort_in_group, override, known)
    elif not _note_faults(words, line, _is_misspelt_group, override, known):
        words.keys.append(override)


def _note_faults(
    words: Words,
    line: str,
    sort: Callable[[Override, Words, Repository], bool],
    override: Override,
    known: Repository,
) -> bool:
    """Sort a choice in, and note which faults are about it."""
    before = len(words.faults)
    found = sort(override, words, known)
    if len(words.faults) > before:
        words.faulty_choices[line] = words.faults[before:]
    return found


def _sort_in_group(override: Override, words: Words, known: Repository) -> bool:
    """Keep a choice of options that exist; tell the others. Always True: it is a choice."""
    group, value = override.key_or_group, override.value()
    where = command_line(str(override.input_line))
    options = known.options(group)
    if override.is_delete():
        if group == RECIPE_GROUP:
            message = "can't be removed: a run needs a recipe"
            hint = options_hint(group, options)
            words.refuse(Fault(group, message, where, hint=hint, code="unknown-option"), "")
        elif value is not None and (
            not isinstance(value, str) or not known.has_file(f"{group}/{value}")
        ):
            words.refuse(unknown_option(group, str(value), options, where), group)
        else:
            words.groups.append(override)
        return True
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        shown = str(override.input_line).partition("=")[2]
        message = f"must name one of the files of this group, not '{shown}'"
        hint = options_hint(group, options)
        fault = Fault(group, message, where, hint=hint, code="unknown-option", value=shown)
        words.refuse(fault, _unknown_part(group))
        return True
    meant = []
    for name in map(str, names):
        found = option_meant(group, name, known)
        if found is None:
            unknown = unknown_option(group, name, options, where)
            elsewhere = _elsewhere(name, where) if group == RECIPE_GROUP else None
            words.refuse(elsewhere or unknown, _unknown_part(group))
            continue
        if found != name:
            hint = f"Write {group}={found}."
            message = f"'{name}' is a file, but a name is needed"
            fault = Fault(group, message, where, (found,), hint, "unknown-option", value=name)
            words.refuse(fault)
        meant.append(found)
    if meant:
        chosen: Any = meant if isinstance(value, list) else meant[0]
        words.groups.append(replace(override, type=OverrideType.CHANGE, _value=chosen))
    return True


def _elsewhere(name: str, where: str) -> Fault | None:
    """The fault of a recipe that is given as a file in a folder where none is looked for; None if it isn't one."""
    file = Path(name).expanduser()
    if not name.endswith(YAML_ENDINGS) or not file.is_file():
        return None
    message = f"'{name}' is a file, but a name is needed"
    hint = f"Write --config-dir {file.parent} recipe={file.stem}."
    return Fault(RECIPE_GROUP, message, where, hint=hint, code="unknown-option", value=name)


def _unknown_part(group: str) -> str:
    """What isn't known of a run when the option of a group isn't."""
    return "" if group == RECIPE_GROUP else group


def option_meant(group: str, name: str, known: Repository) -> str | None:
    """The option that a name or path stands for, e.g. recipes/a.yaml for a; None if there is none."""
    if known.has_file(f"{group}/{name}"):
        return name
    stem = name
    for ending in YAML_ENDINGS:
        stem = stem.removesuffix(ending)
    parts = stem.replace("\\", "/").split("/")
    if stem == name and parts[0] not in ("recipes", ".", "conf"):
        return None
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if tail and known.has_file(f"{group}/{tail}")), None)


def _is_misspelt_group(override: Override, words: Words, known: Repository) -> bool:
    """Tell a choice of a group that doesn't exist, `modle=flux` or `optimizer=adamw`; False if it is a plain key."""
    from framework.schema.names import known_paths
    from framework.schema.run import RunConfig

    key, value = override.key_or_group, override.value()
    if "." in key or key in known_paths(RunConfig) or override.is_delete():
        return False
    if not isinstance(value, str):
        return False
    groups = sorted(known.root_groups)
    nearest = close_names(key, groups, cutoff=0.7)
    holders = [group for group in groups if known.has_file(f"{group}/{value}")]
    nearest = tuple(dict.fromkeys([*(n for n in nearest if n in holders), *nearest, *holders]))
    if not nearest:
        return False
    meant = nearest[0]
    fixed = f"{meant}={value}"
    hint = f"Write {fixed}." if meant in holders else options_hint(meant, known.options(meant))
    message = "unknown key; there is no group of this name either"
    where = command_line(str(override.input_line))
    words.refuse(Fault(key, message, where, nearest, hint, "unknown-key", value=value))
    if meant in holders:
        if not any(group.key_or_group == meant for group in words.groups):
            words.groups.append(
                replace(override, type=OverrideType.CHANGE, key_or_group=meant, _value=value)
            )
    else:
        words.left_out.append(_unknown_part(meant))
    return True


def refuse_sweeps(words: Words, known: Repository) -> None:
    """Turn several values for one key into faults; one run takes one."""
    for override in words.sweeps:
        key = override.key_or_group
        hint = "To run each of them add -m to `octavo train`; `octavo validate` takes them as they are."
        if not known.has_group(key):
            hint += f" For a list write {key}=[1,2]; for a text with a comma '{key}=\"a,b\"'."
        line = str(override.input_line)
        fault = Fault(
            canonical_path(key),
            "holds several values for a sweep, but one run takes one value",
            command_line(line),
            hint=hint,
            code="override-syntax",
            value=line.partition("=")[2],
        )
        words.refuse(fault, _unknown_part(canonical_path(key)))


def refuse_settings(words: Words) -> None:
    """Turn settings of Hydra into faults."""
    for override in words.settings:
        where = command_line(str(override.input_line))
        words.refuse(hydra_setting(override.key_or_group, where))


def _drop_what_is_given_twice(words: Words, known: Repository, order: list[str]) -> None:
    """Tell keys and groups that have two different values; the last one is kept for judging the rest."""
    grouped = [o for o in words.sweeps if known.has_group(o.key_or_group)]
    plain = [override for override in words.sweeps if override not in grouped]
    for overrides in ([*words.groups, *grouped], [*words.keys, *plain], words.settings):
        settings = [
            Setting(
                canonical_path(o.key_or_group), str(o.input_line), o.is_delete(), _comparable(o)
            )
            for o in sorted(overrides, key=lambda o: order.index(str(o.input_line)))
        ]
        faults, lost = given_twice(settings)
        words.faults += faults
        for part in (words.groups, words.keys, words.sweeps, words.settings):
            part[:] = [override for override in part if str(override.input_line) not in lost]


def _comparable(override: Override) -> Any:
    return str(override.input_line) if override.is_sweep_override() else override.value()
