"""The way from another trainer's command or file to recipes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from framework.errors import ConfigError, Fault
from framework.migrate.ai_toolkit import migrate_yaml
from framework.migrate.diffsynth import migrate_arguments, migrate_script
from framework.migrate.draft import Draft, Note, render_recipe
from framework.migrate.flags import Trainer, read_table
from framework.migrate.kohya import migrate_commands, migrate_toml
from framework.migrate.models import families


@dataclass(frozen=True)
class Migrated:
    """One recipe.

    name: of its run, and for its file.   text: the recipe as YAML, with a comment behind each key.
    notes: settings without counterpart, changed in meaning, or to be checked.
    """

    name: str
    text: str
    notes: tuple[Note, ...]


def migrate(
    trainer: Trainer,
    text: str,
    *,
    where: str,
    dataset: str = "",
    family: str = "",
    is_command: bool = True,
) -> list[Migrated]:
    """Make recipes of a command line, a shell script or a configuration file.

    text: the command or the file's content.   where: what faults name, e.g. "train.sh".
    dataset: content of the data set file that kohya's trainers have.   family: "" to find it from the model.
    is_command: whether the text is a command or a shell script; else it is TOML, or the training_args.json of a run of
    DiffSynth-Studio. ai-toolkit's is always YAML.
    Raises ConfigError with every fault where no recipe can be made.
    """
    if family and family not in families():
        nearest = tuple(difflib.get_close_matches(family, families(), n=1))
        message = f"there is no family called '{family}'; allowed: {', '.join(families())}"
        place = f"command line: --family {family}"
        raise ConfigError([Fault("--family", message, place, nearest, code="wrong-value")])
    if trainer == "diffsynth" and not is_command:
        drafts = migrate_arguments(text, where=where, family=family)
    elif trainer == "diffsynth":
        drafts = migrate_script(text, where=where, family=family)
    elif trainer == "ai-toolkit":
        drafts = migrate_yaml(text, where=where, family=family)
    elif is_command:
        drafts = migrate_commands(trainer, text, dataset=dataset, where=where, family=family)
    else:
        drafts = migrate_toml(trainer, text, dataset=dataset, where=where, family=family)
    if not drafts:
        name = read_table(trainer).trainer
        message = f"no training command of {name} was found"
        hint = "Give the whole command, from `accelerate launch` or `python` on, in quotes; or a script with --file."
        raise ConfigError([Fault("", message, where, hint=hint, code="invalid")])
    faults = [fault for draft in drafts for fault in draft.faults]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    names = _distinct([str(draft.value("run.name") or "migrated") for draft in drafts])
    return [
        _finished(draft, name, trainer, (number, len(drafts)))
        for number, (draft, name) in enumerate(zip(drafts, names, strict=True), start=1)
    ]


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number behind those that come more than once."""
    return [
        f"{name}_{names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _finished(draft: Draft, name: str, trainer: Trainer, position: tuple[int, int]) -> Migrated:
    repeats, steps = draft.value("data.repeats"), draft.value("trainer.max_steps")
    if repeats is not None and steps is not None and repeats > steps:
        del draft.settings["data.repeats"]
    setting = draft.settings.get("run.name")
    draft.set_("run.name", name, setting.source if setting else "")
    number, count = position
    part = f", recipe {number} of {count}" if count > 1 else ""
    head = [
        f"Made by `octavo migrate {trainer}`{part}. Behind each key stands what it was made from.",
        "",
        f"Run:   octavo train recipe={name}   (this file as ./recipes/{name}.yaml)",
    ]
    for note in draft.notes:
        if note.kind == "check":
            head.append(f"Check: {note.name}: {note.text}")
    return Migrated(name, render_recipe(draft, head), tuple(draft.notes))
