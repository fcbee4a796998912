"""The way from a recipe and overrides to plain values."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig

from framework.compose.interpolation import resolve
from framework.compose.merge import apply_override, merge_files, taken_back
from framework.compose.messages import close_names, command_line, hydra_setting, options_hint
from framework.compose.overrides import Words, read_words, refuse_settings, refuse_sweeps
from framework.compose.provenance import Provenance, canonical_path
from framework.compose.repository import ROOT_CONFIG, Repository, hydra_rules
from framework.compose.sources import RECIPE_GROUP, SETUP_GROUP, conf_dir, shown_path
from framework.errors import Fault

_HYDRA_REFUSES = (HydraException, OSError, ValueError, AssertionError, RecursionError, TypeError)
# What is true of a value alone, whatever else the configuration would have said.
_CERTAIN_CODES = frozenset(
    {
        "unknown-key",
        "renamed-key",
        "wrong-value",
        "wrong-type",
        "out-of-range",
        "wrong-length",
        "foreign-flag",
    }
)


@dataclass(frozen=True)
class Composition:
    """What the files and overrides say, before it is judged.

    values: plain nested dicts and lists; a value that must still be given is the string "???".
    where: looks up what set a dotted path.
    faults: everything that is wrong with files and overrides themselves; the faulty part isn't in `values`.
    left_out: dotted paths whose values aren't known because of these faults; "" where a recipe couldn't be read.
    warnings: keys of a recipe that another file takes back, since `_self_` stands before it.
    """

    values: dict[str, Any]
    where: Provenance
    faults: tuple[Fault, ...] = ()
    left_out: frozenset[str] = frozenset()
    warnings: tuple[Fault, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every file could be read, so that a key that isn't there was really not given."""
        return "" not in self.left_out

    def keeps(self, fault: Fault) -> bool:
        """Whether a later fault is one of its own, not only the shadow of a part that was left out."""
        if not any(_touches(path, fault.path) for path in self.left_out):
            return True
        written = fault.where not in ("", "default") and not fault.where.startswith(
            shown_path(conf_dir())
        )
        return fault.code in _CERTAIN_CODES and written


def _touches(left_out: str, path: str) -> bool:
    return (
        left_out in ("", path)
        or path.startswith((f"{left_out}.", f"{left_out}["))
        or left_out.startswith((f"{path}.", f"{path}["))
    )


def compose_run(overrides: Sequence[str], *, config_dir: Path | None = None) -> Composition:
    """Merge conf/, the recipe and the overrides; resolve interpolations; note what set each value.

    overrides: as typed, e.g. ["recipe=pocket_lora", "model.dit.precision=fp8"].
    config_dir: a folder of recipes that is searched first.
    Keys that don't exist are let through, so that the schema can name them with the nearest valid one.
    Raises nothing for what a person wrote: faults are in the result. Reads only YAML.
    """
    with Composer(config_dir=config_dir) as composer:
        return composer.compose(overrides)


@dataclass
class _Base:
    """Files merged in order, before any override of a key."""

    config: DictConfig
    where: Provenance
    faults: list[Fault] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)


class Composer:
    """Makes many compositions; files that they share are read and merged once.

    What lies on the disk is taken as it is when a file is first needed.
    """

    def __init__(self, *, config_dir: Path | None = None) -> None:
        self.repository = Repository(config_dir)
        self._bases: dict[tuple[str, ...], _Base] = {}
        self._faults: list[Fault] = []
        if config_dir is not None and not config_dir.is_dir():
            found = "is a file, not a folder" if config_dir.exists() else "doesn't exist"
            where = command_line(f"--config-dir {config_dir}")
            hint = "Name a folder that holds recipes."
            message = f"'{config_dir}' {found}"
            self._faults.append(Fault("--config-dir", message, where, hint=hint, code="file"))

    def __enter__(self) -> Composer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bases.clear()

    def compose(self, overrides: Sequence[str]) -> Composition:
        """Make one composition; see `compose_run`."""
        words = read_words(overrides, self.repository)
        refuse_sweeps(words, self.repository)
        refuse_settings(words)
        self._refuse_missing_recipe(words, overrides)
        base = self._base(words)
        config, where = copy.deepcopy(base.config), base.where.copy()
        faults = [*self._faults, *words.faults, *base.faults]
        left_out = {*words.left_out, *base.left_out}
        for override in words.keys:
            fault = apply_override(config, override)
            if fault is None:
                where.add_override(override.get_key_element(), str(override.input_line))
            else:
                faults.append(fault)
                left_out.add(canonical_path(override.key_or_group))
        values, broken, paths = resolve(config, where)
        return Composition(
            values=values,
            where=where,
            faults=tuple(dict.fromkeys([*faults, *broken])),
            left_out=frozenset({*left_out, *paths}),
            warnings=tuple(base.warnings),
        )

    def _refuse_missing_recipe(self, words: Words, overrides: Sequence[str]) -> None:
        """Tell a command line that names no recipe; the rest of it is judged all the same."""
        if any(_is_recipe(override) for override in words.groups):
            return
        if "" in words.left_out:
            return  # it names one, and that has a fault already
        options = self.repository.options(RECIPE_GROUP)
        example = options[0] if options else "NAME"
        dotless = [str(line).partition("=")[0] for line in overrides if "=" in str(line)]
        close = close_names(RECIPE_GROUP, dotless, cutoff=0.8)
        fault = Fault(
            RECIPE_GROUP,
            f"must be given, e.g. {RECIPE_GROUP}={example}",
            command_line("no recipe= in it"),
            (RECIPE_GROUP,) if close else (),
            options_hint(RECIPE_GROUP, options),
            code="missing-key",
        )
        words.refuse(fault, "")

    def _base(self, words: Words) -> _Base:
        key = tuple(sorted(_group_line(override) for override in words.groups))
        base = self._bases.get(key)
        if base is None:
            base = self._merged(words.groups)
            self._bases[key] = base
        return base

    def _merged(self, groups: Sequence[Override]) -> _Base:
        """Order and merge the files that a choice of options asks for."""
        faults: list[Fault] = []
        left_out: list[str] = []
        with hydra_rules():
            defaults = self._followed(list(groups), faults, left_out)
        if any(override.key_or_group == SETUP_GROUP for override in groups):
            defaults = _setup_last(defaults)
        config, where, refused, lost = merge_files(defaults, self.repository)
        left_out += lost
        for default in defaults:
            path = str(default.config_path)
            file, entries = self.repository.file(path), self.repository.defaults(path)
            faults += [*file.faults, *entries.faults]
            left_out += entries.left_out
            if file.broken:
                group = path.rpartition("/")[0]
                left_out.append("" if path.startswith(RECIPE_GROUP) else group)
        for place in where.files_with_key("hydra"):
            faults.append(hydra_setting("hydra", place, hint="Remove the section `hydra`."))
            break
        if "hydra" in list(config):
            del config["hydra"]
        where.forget("hydra")
        warnings = taken_back(defaults, self.repository, where)
        return _Base(config, where, [*faults, *refused], left_out, warnings)

    def _followed(
        self, groups: list[Override], faults: list[Fault], left_out: list[str]
    ) -> list[ResultDefault]:
        """The files in Hydra's order. What Hydra refuses is told and left out, until it refuses nothing more."""
        if not self.repository.defaults(ROOT_CONFIG).entries:  # a fault of its own
            left_out.append("")
            return [ResultDefault(config_path=ROOT_CONFIG, package="")]
        has_recipe = any(_is_recipe(override) for override in groups)
        if not has_recipe and RECIPE_GROUP in self.repository.root_groups:
            groups = [*groups, _removal(RECIPE_GROUP)]
        groups = [self._appended(override) for override in groups]
        while True:
            try:
                return list(
                    create_defaults_list(
                        repo=self.repository,
                        config_name=ROOT_CONFIG,
                        overrides_list=groups,
                        prepend_hydra=False,
                        skip_missing=False,
                    ).defaults
                )
            except _HYDRA_REFUSES as error:
                fault, dropped = self._refused(error, groups)
                faults.append(fault)
                left_out.append("" if dropped is None else dropped.key_or_group)
                if dropped is None or _is_recipe(dropped):
                    left_out.append("")
                if not groups:
                    return []
                groups = self._fewer(groups, dropped)

    @staticmethod
    def _fewer(groups: list[Override], dropped: Override | None) -> list[Override]:
        """What to try next: all but the choice that was refused, else no recipe, else nothing."""
        if dropped is not None and not (dropped.is_delete() and _is_recipe(dropped)):
            kept = [override for override in groups if override is not dropped]
            if _is_recipe(dropped):
                kept.append(_removal(RECIPE_GROUP))
            return kept
        if any(_is_recipe(o) and not o.is_delete() for o in groups):
            kept = [override for override in groups if not _is_recipe(override)]
            return [*kept, _removal(RECIPE_GROUP)]
        return [_removal(RECIPE_GROUP)] if len(groups) > 1 else []

    def _appended(self, override: Override) -> Override:
        """Choose an option of a group that the root configuration doesn't name, as if it did."""
        if override.is_delete() or override.key_or_group in self.repository.root_groups:
            return override
        return Override(
            type=OverrideType.ADD,
            key_or_group=override.key_or_group,
            value_type=override.value_type,
            _value=override._value,
            input_line=override.input_line,
        )

    def _refused(
        self, error: Exception, groups: Sequence[Override]
    ) -> tuple[Fault, Override | None]:
        """Say in our words what Hydra refused, and which choice of the command line it was, if one."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = re.match(r"In '?([^':]+)'?:\s*(.*)", lines[0])
        where, message = "", lines[0]
        if found is not None:
            message = found[2] or (lines[1].strip() if len(lines) > 1 else lines[0])
            if self.repository.has_file(found[1]):
                where = self.repository.file(found[1]).shown
        required = re.match(r"You must specify '([^']+)'", message)
        named = re.search(r"(?:override|delete) '?([\w/]+)", message)
        group = required[1] if required else named[1] if named else ""
        dropped = next((o for o in groups if o.key_or_group == group), None)
        if where == "" and dropped is not None and dropped.input_line:
            where = command_line(dropped.input_line)
        if where == "":
            recipe = next((o for o in groups if _is_recipe(o)), None)
            where = command_line(str(recipe.input_line)) if recipe is not None else "default"
        hint = "Correct the defaults list there."
        if required is not None:
            options = self.repository.options(group)
            message, hint = f"must be given, e.g. {group}=NAME", options_hint(group, options)
        elif dropped is not None and dropped.is_delete():
            message, hint = "can't be removed: the run hasn't chosen it", "Leave this override out."
        fault = Fault(group or "defaults", message, where, hint=hint, code="defaults-list")
        return fault, dropped


def _setup_last(defaults: list[ResultDefault]) -> list[ResultDefault]:
    """Put a set-up that the command line chose behind the recipe, so that its keys win."""
    return sorted(defaults, key=lambda d: str(d.config_path).startswith(f"{SETUP_GROUP}/"))


def _is_recipe(override: Override) -> bool:
    return bool(override.key_or_group == RECIPE_GROUP)


def _removal(group: str) -> Override:
    return Override(OverrideType.DEL, group, None, None, input_line=f"~{group}")


def _group_line(override: Override) -> str:
    return f"{override.type.name} {override.key_or_group}={override.value()!r}"
