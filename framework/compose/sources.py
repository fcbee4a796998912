"""Where configuration files are found, and how `recipe=<name>` reaches a flat folder of recipes.

Hydra knows only groups inside its own configuration folder. A config source and a search-path plugin (both part of its
public plugin API) make `recipes/<name>.yaml` the option `<name>` of the group `recipe`, the user's own folder first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from framework.errors import ConfigError, Fault

RECIPE_GROUP = "recipe"
_PACKAGE = Path(__file__).resolve().parents[1]
# Set only while Octavo composes, so that the plugin leaves other Hydra programs in the same process alone.
_ACTIVE_FOLDERS: ContextVar[tuple[Path, ...]] = ContextVar("active_recipe_folders", default=())


def conf_dir() -> Path:
    """Folder of the configuration groups: inside an installed wheel, or beside the package in a source tree."""
    return _shipped("conf")


def shipped_recipes_dir() -> Path:
    """Folder of the recipes that come with Octavo."""
    return _shipped("recipes")


def recipe_folders() -> tuple[Path, ...]:
    """Folders that are searched for a recipe, first match wins: `./recipes` of the user, then the shipped ones."""
    folders = (Path.cwd() / "recipes", shipped_recipes_dir())
    return tuple(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def recipe_names() -> tuple[str, ...]:
    """Every name that `recipe=` takes here, sorted."""
    names = {
        file.relative_to(folder).with_suffix("").as_posix()
        for folder in recipe_folders()
        for file in folder.rglob("*.yaml")
    }
    return tuple(sorted(names))


def shown_path(file: Path) -> str:
    """Write a path as a person would type it: relative to the current folder where it lies below it."""
    try:
        return file.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return str(file)


@contextmanager
def recipes_on_search_path() -> Iterator[None]:
    """Let Hydra find recipes while the block runs."""
    plugins = Plugins.instance()
    plugins.register(RecipeSource)
    plugins.register(RecipeSearchPath)
    token = _ACTIVE_FOLDERS.set(recipe_folders())
    try:
        yield
    finally:
        _ACTIVE_FOLDERS.reset(token)


class RecipeSearchPath(SearchPathPlugin):
    """Puts the recipe folders on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append every active folder, in order of precedence."""
        for folder in _ACTIVE_FOLDERS.get():
            search_path.append(provider="octavo", path=f"{RecipeSource.scheme()}://{folder}")


class RecipeSource(ConfigSource):
    """Serves the files of one folder as options of the group `recipe`."""

    @staticmethod
    def scheme() -> str:
        """Prefix of search-path entries that this source handles."""
        return "octavo-recipes"

    def file_of(self, config_path: str) -> Path | None:
        """The file behind `recipe/<name>`, whether it exists or not; None for paths of other groups."""
        group, _, name = config_path.partition("/")
        if group != RECIPE_GROUP or not name:
            return None
        return Path(self.path, name if name.endswith(".yaml") else f"{name}.yaml")

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one recipe. Without a `@package` header its keys are those of the whole configuration.

        Raises ConfigError that names file, line and column where the file isn't readable YAML.
        """
        file = self.file_of(config_path)
        assert file is not None
        text = read_yaml_text(file)
        header = self._get_header_dict(text)
        header["package"] = header.get("package") or "_global_"
        try:
            config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        except yaml.YAMLError as error:
            raise ConfigError([yaml_fault(error, file)]) from error
        except OmegaConfBaseException as error:
            message = f"can't be read: {str(error).splitlines()[0]}"
            raise ConfigError([Fault("", message, where=shown_path(file))]) from error
        if not OmegaConf.is_dict(config):
            message = "a recipe must be a mapping of keys, e.g. `optim: {lr: 1e-4}`"
            raise ConfigError([Fault("", message, where=shown_path(file))])
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{self.path}",
            config=config,
            header=header,
        )

    def available(self) -> bool:
        """Whether the folder exists."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether the path is the group itself or a sub-folder of recipes."""
        if config_path in ("", RECIPE_GROUP):
            return True
        group, _, name = config_path.partition("/")
        return group == RECIPE_GROUP and Path(self.path, name).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Whether a recipe of that name exists."""
        file = self.file_of(config_path)
        return file is not None and file.is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names below a path: recipes without their ending, and sub-folders."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [RECIPE_GROUP]
        folder = Path(self.path, config_path.removeprefix(RECIPE_GROUP).lstrip("/"))
        names = set()
        if folder.is_dir() and self.is_group(config_path):
            if results_filter in (None, ObjectType.CONFIG):
                names |= {file.stem for file in folder.glob("*.yaml")}
            if results_filter in (None, ObjectType.GROUP):
                names |= {sub.name for sub in folder.iterdir() if sub.is_dir()}
        return sorted(names)


def read_yaml_text(file: Path) -> str:
    """Read a configuration file as UTF-8. Raises ConfigError if it can't be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"can't be read as UTF-8 text: {error}"
        raise ConfigError([Fault("", message, where=shown_path(file))]) from error


def yaml_fault(error: yaml.YAMLError, file: Path) -> Fault:
    """Describe a YAML syntax error with file, line and column."""
    where, message = shown_path(file), "not valid YAML"
    if isinstance(error, yaml.MarkedYAMLError):
        if error.problem_mark is not None:
            where += f":{error.problem_mark.line + 1}:{error.problem_mark.column + 1}"
        message += f": {error.problem}" if error.problem else ""
    return Fault("", message, where=where, hint="Check indentation, colons and quotes there.")


def _shipped(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
