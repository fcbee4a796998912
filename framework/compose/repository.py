"""Gives Hydra's defaults-list algorithm the files of conf/ and of the recipe folders, each read once.

Hydra's own loader isn't used: it imports every installed launcher and sweeper plugin, reads files anew for each
composition, and stops at the first fault. Only the algorithm that orders files is Hydra's
(`hydra._internal.defaults_list`, checked against hydra-core 1.3; the version is pinned).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ConfigDefault, InputDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.version import VersionBase, setbase
from omegaconf import OmegaConf

from framework.compose.defaults import Defaults, read_defaults
from framework.compose.sources import RECIPE_GROUP, conf_dir, group_files, recipe_files, shown_path
from framework.compose.yaml_file import YamlFile, read_yaml_file
from framework.errors import Fault

ROOT_CONFIG = "config"
HYDRA_FOLDER = "hydra"
_VERSION_BASE = "1.3"


@contextmanager
def hydra_rules() -> Iterator[None]:
    """Follow the rules of one Hydra version in the block; a Hydra program around us keeps its own."""
    base = VersionBase.instance()
    before = base.getbase()
    setbase(_VERSION_BASE)
    try:
        yield
    finally:
        base.version_base = before


class Repository(IConfigRepository):
    """Every configuration file by its path without ending: "config", "optim/adamw", "recipe/pocket_lora".

    root_groups: groups that the root configuration chooses an option of.
    """

    def __init__(self, config_dir: Path | None = None) -> None:
        self._paths: dict[str, tuple[Path, ...]] = {
            path: (file,)
            for path, file in group_files(conf_dir()).items()
            if path.split("/")[0] != HYDRA_FOLDER
        }
        for name, files in recipe_files(config_dir).items():
            self._paths[f"{RECIPE_GROUP}/{name}"] = files
        self._groups = {RECIPE_GROUP}
        for path in self._paths:
            parts = path.split("/")[:-1]
            self._groups |= {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
        self._files: dict[str, YamlFile] = {}
        self._defaults: dict[str, Defaults] = {}
        self._extra_faults: dict[str, list[Fault]] = {}
        self.root_groups: set[str] = {group for group in self._groups if "/" not in group}
        chosen = [getattr(entry, "group", None) for entry in self.defaults(ROOT_CONFIG).entries]
        self.root_groups = {str(group) for group in chosen if group} or self.root_groups

    def has_group(self, group: str) -> bool:
        """Whether the group exists."""
        return group in self._groups

    def has_file(self, config_path: str) -> bool:
        """Whether `group/option` exists."""
        return config_path in self._paths

    def options(self, group: str) -> list[str]:
        """Every option of a group, those in sub-folders too."""
        start = f"{group}/"
        return sorted(path.removeprefix(start) for path in self._paths if path.startswith(start))

    def file(self, config_path: str) -> YamlFile:
        """The content of an existing file."""
        found = self._files.get(config_path)
        if found is None:
            first, *others = self._paths[config_path]
            found = read_yaml_file(first)
            if others:
                message = f"{shown_path(first)} and {shown_path(others[0])} have the same name"
                hint = "Rename or remove one of them."
                found.faults.append(Fault("", message, found.shown, hint=hint, code="file"))
            self._files[config_path] = found
        return found

    def defaults(self, config_path: str) -> Defaults:
        """The defaults list of an existing file; entries that lead back to it are taken out."""
        found = self._defaults.get(config_path)
        if found is None:
            found = self._raw_defaults(config_path)
            kept: list[tuple[InputDefault, str]] = []
            for entry, place in zip(found.entries, found.places, strict=True):
                circle = self._circle(config_path, entry)
                if not circle:
                    kept.append((entry, place))
                    continue
                names = " → ".join(path.removeprefix(f"{RECIPE_GROUP}/") for path in circle)
                message = f"{names.split(' ')[0]} stands on itself: {names}"
                hint = "Remove one of these entries of the defaults lists."
                group = config_path.partition("/")[0]
                fault = Fault(group, message, place, hint=hint, code="defaults-list")
                found.faults.append(fault)
                found.left_out.append("")
            found.entries = [entry for entry, _ in kept]
            found.places = [place for _, place in kept]
            self._defaults[config_path] = found
        return found

    def _raw_defaults(self, config_path: str) -> Defaults:
        return read_defaults(self.file(config_path), config_path, self)

    def _circle(self, start: str, entry: InputDefault) -> list[str]:
        """The way from a file over one of its entries back to itself; empty if there is none."""
        if not isinstance(entry, ConfigDefault) or entry.is_self():
            return []
        ways = [[start, str(entry.path).removeprefix("/")]]
        seen = set()
        while ways:
            way = ways.pop()
            if way[-1] == start:
                return way
            if way[-1] in seen or not self.has_file(way[-1]):
                continue
            seen.add(way[-1])
            known = self._defaults.get(way[-1]) or self._raw_defaults(way[-1])
            ways += [
                [*way, str(below.path).removeprefix("/")]
                for below in known.entries
                if isinstance(below, ConfigDefault) and not below.is_self()
            ]
        return []

    # What Hydra's algorithm asks for.

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Content and defaults list of a file; None where it doesn't exist."""
        if config_path not in self._paths:
            return None
        found = self.file(config_path)
        package = found.package
        if package is None and config_path.startswith(f"{RECIPE_GROUP}/"):
            package = "_global_"
        return ConfigResult(
            provider="octavo",
            path=found.shown,
            config=found.config,
            header={"package": package},
            defaults_list=self.defaults(config_path).entries,
        )

    def group_exists(self, config_path: str) -> bool:
        """Whether the group exists."""
        return self.has_group(config_path)

    def config_exists(self, config_path: str) -> bool:
        """Whether the file exists."""
        return self.has_file(config_path)

    def get_group_options(
        self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG
    ) -> list[str]:
        """Every option of a group."""
        return self.options(group_name)

    def get_sources(self) -> list[ConfigSource]:
        """Hydra lists these in messages that are never shown."""
        return []

    def get_schema_source(self) -> ConfigSource:
        """Not asked for by the algorithm that orders files."""
        raise NotImplementedError

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        """Nothing to do: the files are found when the repository is made."""


def read_settings(kind: str, name: str) -> tuple[YamlFile | None, list[str]]:
    """The file conf/hydra/<kind>/<name>, None if it doesn't exist, and the names that there are."""
    start = f"{HYDRA_FOLDER}/{kind}/"
    files = {
        path.removeprefix(start): file
        for path, file in group_files(conf_dir()).items()
        if path.startswith(start)
    }
    return (read_yaml_file(files[name]) if name in files else None), sorted(files)


def plain_values(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts and lists, interpolations unresolved."""
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
