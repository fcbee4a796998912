"""Which configurations `octavo validate` was asked for: a recipe, a sweep's product, files, or all recipes."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from framework.compose import Dimension, SweepRequest, read_sweep, recipe_files, recipe_names
from framework.compose.sources import YAML_ENDINGS, shown_path, yaml_files
from framework.compose.sweep_values import MAX_POINTS
from framework.errors import ConfigError, Fault
from framework.schema.sweep import SweepSettings
from framework.schema.validate import judge_section


@dataclass(frozen=True)
class Target:
    """One configuration to judge.

    name: how a person tells it from the others.   overrides: the whole list, the recipe included.
    config_dir: folder that is searched for its recipe first.   file: the recipe's file; "" where none is found.
    """

    name: str
    overrides: tuple[str, ...]
    config_dir: Path | None
    file: str = ""


@dataclass(frozen=True)
class _Recipe:
    name: str
    shown: str
    config_dir: Path | None


@dataclass(frozen=True)
class Request:
    """What is to be judged.

    targets: every configuration.   faults: of the command line, concerning all of them.
    typed: override -> how it was typed, for those that stand for the end of an interval.
    """

    targets: tuple[Target, ...]
    faults: tuple[Fault, ...]
    typed: Mapping[str, str]


def read_targets(arguments: Sequence[str], *, every: bool, config_dir: Path | None) -> Request:
    """Turn the command line into configurations.

    arguments: overrides, also with several values each, and paths of recipe files.
    Raises ConfigError where they contradict each other or name nothing.
    """
    files, overrides = split_files(arguments)
    _check_paths(files, config_dir)
    recipe = _recipe_of(overrides)
    _check_choice(files, every=every, recipe=recipe)
    sweep = read_sweep(overrides, config_dir=config_dir)
    dimensions = [_without_interval(dimension) for dimension in sweep.dimensions]
    points = [sweep.base]
    if sweep.num_points <= MAX_POINTS:
        points = [(*sweep.base, *chosen) for chosen in itertools.product(*dimensions)]
    if files:
        recipes = [_recipe_in(file, config_dir) for file in files]
    elif every:
        names = recipe_names(config_dir)
        recipes = [_Recipe(name, f"recipe={name}", config_dir) for name in names]
    elif config_dir is not None and not recipe:
        recipes = _recipes_below(config_dir)
    else:
        recipes = []
    typed = {
        choice: dimension.line
        for dimension, choices in zip(sweep.dimensions, dimensions, strict=True)
        if dimension.choices is None
        for choice in choices
    }
    targets = _with_recipes(recipes, points, sweep.base)
    if not recipes:
        found = recipe_files(config_dir)
        targets = [_as_typed(point, sweep.base, found, config_dir) for point in points]
    faults = dict.fromkeys([*sweep.faults, *_settings_faults(sweep)])
    return Request(tuple(targets), tuple(faults), typed)


def _settings_faults(sweep: SweepRequest) -> list[Fault]:
    """What is wrong with the keys of a launcher or sweeper; an unknown one is a fault of the sweep itself."""
    faults = []
    for kind, field in SweepSettings.model_fields.items():
        settings = sweep.settings[kind]
        for choice in get_args(field.annotation):
            if choice.model_fields["name"].default == settings.get("name"):
                faults += judge_section(choice, settings, sweep.where, prefix=f"hydra.{kind}")[1]
    return faults


def _with_recipes(
    recipes: Sequence[_Recipe], points: Sequence[tuple[str, ...]], base: tuple[str, ...]
) -> list[Target]:
    """Every recipe with every combination of overrides."""
    targets = []
    for recipe in recipes:
        file = recipe_files(recipe.config_dir).get(recipe.name, (Path(recipe.shown),))[0]
        for point in points:
            name = " ".join([recipe.shown, *_changes(point, base)])
            overrides = (f"recipe={recipe.name}", *point)
            targets.append(Target(name, overrides, recipe.config_dir, shown_path(file)))
    return targets


def split_files(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Tell paths of recipe files from overrides; what follows a `--flag` of another trainer is that flag's value."""
    files: list[Path] = []
    overrides: list[str] = []
    after_flag = False
    for argument in arguments:
        if argument in ("-m", "--multirun"):
            continue  # of `octavo train`; every combination is judged anyway
        is_path = "=" not in argument and not argument.startswith("-") and not after_flag
        if is_path and (argument.endswith(YAML_ENDINGS) or Path(argument).is_dir()):
            files.append(Path(argument))
        else:
            overrides.append(argument)
            after_flag = "=" not in argument and (after_flag or argument.startswith("-"))
    return files, overrides


def _check_paths(files: Sequence[Path], config_dir: Path | None) -> None:
    """Raise ConfigError that names every path that can't be read as what it was given as."""
    faults = []
    for file in files:
        where = f"command line: {file}"
        if file.is_dir():
            hint = (
                f"Give its files, or every recipe in it as `octavo validate --config-dir {file}`."
            )
            faults.append(Fault("", f"{str(file)!r} is a folder", where, hint=hint, code="file"))
        elif not file.is_file():
            hint = "Check the path; it starts from the current folder."
            faults.append(
                Fault("", f"there is no file {str(file)!r}", where, hint=hint, code="file")
            )
    if config_dir is not None and not config_dir.is_dir():
        where = f"command line: --config-dir {config_dir}"
        message = f"there is no folder {str(config_dir)!r}"
        hint = "Give the folder that holds your recipes."
        faults.append(Fault("--config-dir", message, where, hint=hint, code="file"))
    if faults:
        raise ConfigError(faults)


def _check_choice(files: Sequence[Path], *, every: bool, recipe: str) -> None:
    """Raise ConfigError where the recipes to judge are given in two ways at once."""
    given = [way for way, used in (("--all", every), ("recipe=", bool(recipe))) if used]
    given += ["a file"] if files else []
    if len(given) > 1:
        message = f"recipes are chosen by {' and by '.join(given)} at once"
        hint = "Use one of them; overrides such as model.dit.precision=fp8 can be added to each."
        typed = ["--all"] * every + [f"recipe={recipe}"] * bool(recipe) + [str(f) for f in files]
        where = f"command line: {shlex.join(typed)}"
        raise ConfigError([Fault("", message, where, hint=hint, code="rule")])


def _without_interval(dimension: Dimension) -> tuple[str, ...]:
    """The values of a dimension as overrides; of an interval that a search would explore, both ends."""
    if dimension.choices is not None:
        return dimension.choices
    return tuple(f"{dimension.key}={end:g}" for end in dimension.interval or ())


def _as_typed(
    point: tuple[str, ...],
    base: tuple[str, ...],
    found: Mapping[str, tuple[Path, ...]],
    config_dir: Path | None,
) -> Target:
    """A configuration whose overrides name the recipe themselves."""
    recipe = _recipe_of(point)
    changes = _changes(point, base)
    if recipe and not any(change.startswith("recipe=") for change in changes):
        changes = [f"recipe={recipe}", *changes]
    file = shown_path(found[recipe][0]) if recipe in found else ""
    return Target(" ".join(changes) or shlex.join(point), point, config_dir, file)


def _changes(point: Sequence[str], base: Sequence[str]) -> list[str]:
    """The overrides that tell a point from the others, as they are typed in a shell."""
    return [shlex.quote(override) for override in point if override not in base]


def _recipe_of(point: Sequence[str]) -> str:
    """What a list of overrides names as its recipe; "" where it names none."""
    chosen = [o.partition("=")[2] for o in point if o.lstrip("+").startswith("recipe=")]
    return chosen[-1].strip("'\"") if chosen else ""


def _recipe_in(file: Path, config_dir: Path | None) -> _Recipe:
    """The recipe that a file holds: by its name where it is found by that, else by the folder in which it lies."""
    path = file.resolve()
    for name, found in recipe_files(config_dir).items():
        if path in (candidate.resolve() for candidate in found):
            return _Recipe(name, shown_path(file), config_dir)
    return _Recipe(path.stem, shown_path(file), path.parent)


def _recipes_below(folder: Path) -> list[_Recipe]:
    """Every recipe of a folder. Raises ConfigError where it has none."""
    names = {file.relative_to(folder).with_suffix("").as_posix() for file in yaml_files(folder)}
    if not names:
        message = f"there is no YAML file in {str(folder)!r}"
        hint = "Give the folder that holds your recipes, or a recipe as recipe=NAME."
        where = f"command line: --config-dir {folder}"
        raise ConfigError([Fault("--config-dir", message, where, hint=hint, code="file")])
    return [_Recipe(name, f"recipe={name}", folder) for name in sorted(names)]
