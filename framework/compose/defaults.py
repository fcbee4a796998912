"""The defaults list of a file: which other files it stands on, and which options of groups it chooses.

Every entry is checked by itself before Hydra follows the list, because Hydra stops at the first fault. A faulty entry
is left out; one whose meaning is plain (a forgotten `override` or slash) is told and then taken as it was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault

from framework.compose.messages import close_names, hydra_setting, options_hint, unknown_option
from framework.compose.sources import RECIPE_GROUP, YAML_ENDINGS
from framework.compose.yaml_file import YamlFile, plain
from framework.errors import Fault

_KEYWORDS = ("override", "optional")
_FORM_HINT = "An entry is the name of a recipe, `override /GROUP: OPTION`, or `_self_`."


class Options(Protocol):
    """What the groups hold."""

    root_groups: set[str]

    def has_group(self, group: str) -> bool:
        """Whether the group exists."""

    def has_file(self, config_path: str) -> bool:
        """Whether `group/option` exists."""

    def options(self, group: str) -> list[str]:
        """Every option of a group."""


@dataclass
class Defaults:
    """The entries of one file that can be followed.

    places: for each entry, where it stands.   left_out: paths whose values are unknown, because what sets them was left
    out; "" means that a whole recipe is missing.
    """

    entries: list[InputDefault] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_defaults(found: YamlFile, config_path: str, known: Options) -> Defaults:
    """Check the defaults list of a file. config_path: its own path, e.g. "recipe/styles/ink"."""
    reader = _Reader(found, config_path, known)
    node = found.defaults
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            reader.read(item)
        reader.put_overrides_last()
    elif node is not None and not (
        isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
    ):
        kind = "a mapping" if isinstance(node, yaml.MappingNode) else f"'{node.value}'"
        message = f"must be a list of entries, not {kind}"
        hint = "Write each entry on a line of its own that starts with `- `."
        place = found.defaults_place
        reader.result.faults.append(
            Fault("defaults", message, place, hint=hint, code="defaults-list")
        )
        reader.result.left_out.append("")
    return reader.result


class _Reader:
    def __init__(self, found: YamlFile, config_path: str, known: Options) -> None:
        self._found = found
        self._path = config_path
        self._folder = config_path.rpartition("/")[0]
        self._known = known
        self._is_root = "/" not in config_path
        self.result = Defaults()

    def read(self, node: yaml.Node) -> None:
        place = self._found.place(node)
        try:
            item = plain(node)
        except (yaml.YAMLError, ValueError):
            item = None
        if isinstance(item, str):
            self._read_name(item, place)
        elif isinstance(item, dict) and len(item) == 1:
            ((key, value),) = item.items()
            self._read_group(str(key), value, place)
        else:
            message = "this entry of the defaults list is neither a name nor `GROUP: OPTION`"
            hint = _FORM_HINT
            if isinstance(item, dict) and len(item) > 1:
                message = (
                    f"one entry of the defaults list holds several: {', '.join(map(str, item))}"
                )
                hint = "Start each of them with `- ` on a line of its own."
            self._refuse("defaults", message, place, hint, left_out="")

    def put_overrides_last(self) -> None:
        """Move overrides behind the other entries, where Hydra wants them; the order says nothing else."""
        both = list(zip(self.result.entries, self.result.places, strict=True))
        both.sort(key=lambda pair: pair[0].is_override())
        self.result.entries = [entry for entry, _ in both]
        self.result.places = [place for _, place in both]

    def _add(self, entry: InputDefault, place: str) -> None:
        self.result.entries.append(entry)
        self.result.places.append(place)

    def _refuse(
        self,
        path: str,
        message: str,
        place: str,
        hint: str,
        *,
        nearest: tuple[str, ...] = (),
        left_out: str | None = None,
    ) -> None:
        fault = Fault(path, message, place, nearest, hint, code="defaults-list")
        self.result.faults.append(fault)
        if left_out is not None:
            self.result.left_out.append(left_out)

    def _read_name(self, text: str, place: str) -> None:
        """An entry without a colon: `_self_`, or another file to stand on."""
        name, _, package = text.partition("@")
        name = name.strip()
        if name == "_self_":
            if any(entry.is_self() for entry in self.result.entries):
                hint = "Keep one: what stands behind it wins over this file's own keys."
                self._refuse("defaults", "_self_ stands there twice", place, hint)
            elif package:
                hint = "Write `_self_` alone."
                self._refuse("defaults", "_self_ can't be put under a key", place, hint)
            else:
                self._add(ConfigDefault(path="_self_"), place)
            return
        keyword, _, rest = name.partition(" ")
        if keyword in _KEYWORDS and rest:
            hint = f"Write `{keyword} /GROUP: OPTION`."
            self._refuse("defaults", f"`{text}` names no option", place, hint)
            return
        stem = name.removesuffix(".yaml").removesuffix(".yml")
        target = self._parent_path(stem)
        if target is None and stem.startswith(("recipes/", "./recipes/")):
            target = self._parent_path(stem.removeprefix("./").removeprefix("recipes/"))
        if target is None:
            self._missing_parent(name, stem, place)
        elif name.endswith(YAML_ENDINGS) or "recipes/" in name:
            hint = f"Write `- {target.removeprefix(f'{RECIPE_GROUP}/')}`."
            message = "a recipe is named without its folder and ending"
            self._refuse("defaults", message, place, hint)
            self._add(ConfigDefault(path=f"/{target}", package=package or None), place)
        elif target == self._path:
            hint = "Remove this entry."
            self._refuse(RECIPE_GROUP, f"{stem} stands on itself", place, hint, left_out="")
        else:
            self._add(ConfigDefault(path=f"/{target}", package=package or None), place)

    def _parent_path(self, name: str) -> str | None:
        """The file that an entry means: beside this one, below the recipes, or by its full path."""
        candidates = [name.removeprefix("/")]
        if not name.startswith("/"):
            candidates = [f"{self._folder}/{name}".lstrip("/"), *candidates]
            if self._in_recipe:
                candidates.insert(1, f"{RECIPE_GROUP}/{name}")
        return next((path for path in candidates if self._known.has_file(path)), None)

    @property
    def _in_recipe(self) -> bool:
        return self._path.startswith(f"{RECIPE_GROUP}/")

    def _missing_parent(self, name: str, stem: str, place: str) -> None:
        if self._in_recipe and (
            stem in self._known.root_groups or stem.lstrip("/") in self._known.root_groups
        ):
            group = stem.lstrip("/")
            hint = f"Write `override /{group}: OPTION`. {options_hint(group, self._known.options(group))}."
            self._refuse("defaults", f"`{name}` is a group and names no option", place, hint)
            return
        group = RECIPE_GROUP if self._in_recipe else self._folder
        short = stem.removeprefix(f"/{RECIPE_GROUP}/").removeprefix("recipes/")
        self.result.faults.append(unknown_option(group, short, self._known.options(group), place))
        self.result.left_out.append("" if self._in_recipe else group)

    def _read_group(self, key: str, value: Any, place: str) -> None:
        """An entry with a colon: the option of a group."""
        *keywords, name = key.split() or [""]
        if not name:
            self._refuse(
                "defaults", "an entry of the defaults list names no group", place, _FORM_HINT
            )
            return
        wrong = [word for word in keywords if word not in _KEYWORDS]
        if wrong:
            nearest = close_names(wrong[0], _KEYWORDS)
            hint = f"Write `override {name}: {value}`."
            message = f"`{wrong[0]}` isn't a word of the defaults list"
            self._refuse("defaults", message, place, hint, nearest=nearest)
            keywords = ["override"]
        group, _, package = name.partition("@")
        full = group.removeprefix("/") if group.startswith("/") or self._is_root else ""
        full = full or f"{self._folder}/{group}"
        if full.split("/")[0] == "hydra" or group == "hydra":
            hint = "Launchers and sweepers are chosen on the command line: hydra/launcher=NAME."
            self.result.faults.append(hydra_setting(group.lstrip("/"), place, hint=hint))
            return
        meant = group.removeprefix("/")
        if package:
            hint = f"Write `override /{meant}: {value}`; each group is put under its own name."
            message = "an option can't be put under another key with @"
            self._refuse(meant, message, place, hint, left_out=meant)
            return
        override, optional = "override" in keywords, "optional" in keywords
        if not self._is_root:
            if meant == RECIPE_GROUP:
                hint = f"A recipe stands on another by its name alone: `- {value}`."
                self._refuse(RECIPE_GROUP, "can't be chosen by a recipe", place, hint, left_out="")
                return
            if meant in self._known.root_groups and not (override and group.startswith("/")):
                hint = f"Write `override /{meant}: {value}`."
                missing = "its slash" if override else "`override`"
                self._refuse(meant, f"this entry lacks {missing}", place, hint)
                full, override = meant, True
        if not self._known.has_group(full):
            self._unknown_group(group.removeprefix("/"), value, place)
            return
        options = self._checked_options(full, value, place, optional)
        if options is _NOTHING and self._is_root:
            options = None  # the group stays there, so that the command line can choose
        if options is not _NOTHING:
            entry = GroupDefault(
                group=full if self._is_root else f"/{full}",
                value=options,
                optional=optional,
                override=override,
            )
            self._add(entry, place)

    def _unknown_group(self, group: str, value: Any, place: str) -> None:
        groups = sorted(self._known.root_groups - {RECIPE_GROUP})
        nearest = close_names(group, groups)
        nearest += tuple(
            name
            for name in groups
            if name not in nearest and self._known.has_file(f"{name}/{value}")
        )
        hint = f"Groups are: {', '.join(groups)}."
        if nearest:
            hint = f"Write `override /{nearest[0]}: {value}`."
        message = f"there is no group called '{group}'"
        self._refuse(group, message, place, hint, nearest=nearest)

    def _checked_options(self, group: str, value: Any, place: str, optional: bool) -> Any:
        """The option or options that an entry asks for, without those that don't exist."""
        if value is None or value == "???":
            return value
        if "${" in str(value):
            hint = f"Name the option: `override /{group}: {self._known.options(group)[0]}`."
            message = f"'{value}' can't be filled in: a defaults list takes no interpolations"
            self._refuse(group, message, place, hint, left_out=group)
            return _NOTHING
        wanted = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in wanted) or isinstance(value, dict):
            hint = options_hint(group, self._known.options(group))
            message = f"must name one of the files of this group, not {value!r}"
            self._refuse(group, message, place, hint, left_out=group)
            return _NOTHING
        unknown = [name for name in wanted if not self._known.has_file(f"{group}/{name}")]
        for name in unknown:
            if optional:
                continue
            options = self._known.options(group)
            self.result.faults.append(unknown_option(group, name, options, place))
            self.result.left_out.append(group)
        if not unknown or optional:
            return value
        kept = [name for name in wanted if name not in unknown]
        return kept if kept and isinstance(value, list) else _NOTHING


_NOTHING = object()
