"""Where configuration files lie: the groups in conf/, and recipes in a given folder, in ./recipes or shipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

RECIPE_GROUP = "recipe"
SETUP_GROUP = "vram"
"""Its options set keys of other sections; chosen on the command line they win over the recipe."""
YAML_ENDINGS = (".yaml", ".yml")
_PACKAGE = Path(__file__).resolve().parents[1]


def conf_dir() -> Path:
    """Folder of the configuration groups: inside an installed wheel, or beside the package in a source tree."""
    return _shipped("conf")


def shipped_recipes_dir() -> Path:
    """Folder of the recipes that come with Octavo."""
    return _shipped("recipes")


def recipe_folders(config_dir: Path | None = None) -> tuple[Path, ...]:
    """Folders that are searched for a recipe, first match wins.

    They are `config_dir`, then `./recipes` of the user, then the shipped ones; those that don't exist are left out.
    """
    given = [] if config_dir is None else [config_dir]
    folders = (*given, Path.cwd() / "recipes", shipped_recipes_dir())
    return tuple(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def recipe_names(config_dir: Path | None = None) -> tuple[str, ...]:
    """Every name that `recipe=` takes here, sorted."""
    return tuple(sorted(recipe_files(config_dir)))


def recipe_files(config_dir: Path | None = None) -> dict[str, tuple[Path, ...]]:
    """The file behind each recipe's name; two where a.yaml and a.yml lie side by side, which nothing can decide."""
    found: dict[str, tuple[Path, ...]] = {}
    for folder in recipe_folders(config_dir):
        below: dict[str, list[Path]] = {}
        for file in yaml_files(folder):
            name = file.relative_to(folder).with_suffix("").as_posix()
            below.setdefault(name, []).append(file)
        for name, files in below.items():
            found.setdefault(name, tuple(sorted(files)))
    return found


def group_files(folder: Path) -> dict[str, Path]:
    """Every file of conf/ by its path without ending, e.g. "optim/adamw", and "hydra/launcher/basic"."""
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file for file in yaml_files(folder)
    }


def yaml_files(folder: Path) -> Iterator[Path]:
    """Every YAML file below a folder; hidden folders and files are left out, links to folders not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.endswith(YAML_ENDINGS) and not name.startswith("."):
                yield Path(parent, name)


def shown_path(file: Path) -> str:
    """Write a path as a person would type it: relative to the current folder where it lies below it."""
    try:
        return (Path.cwd() / file).relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return str(file)


def _shipped(name: str) -> Path:
    packaged = _PACKAGE / f"_{name}"
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
