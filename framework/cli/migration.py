"""What `octavo migrate` does: recipes from commands and files of other trainers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from framework.atomic import write_text
from framework.cli.report import error_console, print_faults
from framework.errors import ConfigError, Fault
from framework.judge import judge_run
from framework.migrate import Migrated, Note, NoteKind, Trainer, migrate

_TITLES: dict[NoteKind, str] = {
    "lost": "No counterpart",
    "changed": "Changed in meaning",
    "check": "To be checked",
    "unneeded": "Needs no setting",
}


@dataclass(frozen=True)
class Given:
    """What was given on the command line.

    command: a command line of the other trainer, or the path of a file; "" where `file` is given.
    file: a shell script or a configuration file.   dataset: kohya's second file.   family: "" to find it.
    out: where the recipe is written; None prints it.
    """

    trainer: Trainer
    command: str = ""
    file: Path | None = None
    dataset: Path | None = None
    family: str = ""
    out: Path | None = None


def run_migration(given: Given) -> int:
    """Print recipes to stdout, or write them, and tell on stderr what has no counterpart; returns 0.

    Raises ConfigError where no recipe can be made, or a file would be overwritten.
    """
    text, where, is_command = _read_request(given)
    recipes = migrate(
        given.trainer,
        text,
        where=where,
        dataset=_read(given.dataset, "--dataset") if given.dataset is not None else "",
        family=given.family,
        is_command=is_command,
    )
    if given.out is None:
        sys.stdout.write("---\n".join(recipe.text for recipe in recipes))
    else:
        for path, recipe in _written(given.out, recipes):
            error_console().print(f"The recipe of {recipe.name} is in {path}")
    for recipe in recipes:
        _print_notes(recipe, several=len(recipes) > 1)
        _print_judgement(recipe)
    return 0


def _read_request(given: Given) -> tuple[str, str, bool]:
    """The text to migrate, what faults name, and whether it is a command or a shell script."""
    file = given.file
    if file is None and given.command and len(given.command.split()) == 1:
        file = Path(given.command)
    if file is None and not given.command.strip():
        hint = "Give a command in quotes, or a script or configuration file."
        raise ConfigError([Fault("", "there is nothing to migrate", "command line", hint=hint)])
    if file is not None:
        is_command = file.suffix.lower() not in (".toml", ".yaml", ".yml", ".json")
        return _read(file, "--file"), str(file), is_command
    return given.command, "", True


def _read(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"'{file}' can't be read: {reason}"
        hint = "Give a text file that exists."
        fault = Fault(option, message, f"command line: {file}", hint=hint, code="file")
        raise ConfigError([fault]) from error


def _written(out: Path, recipes: Sequence[Migrated]) -> list[tuple[Path, Migrated]]:
    """Write the recipes: one to `out`, several beside it with a number in their names. Nothing is overwritten."""
    paths = [out]
    if len(recipes) > 1:
        paths = [out.with_stem(f"{out.stem}_{n}") for n in range(1, len(recipes) + 1)]
    taken = [path for path in paths if path.exists()]
    if taken:
        hint = "Give another name, or remove the file."
        faults = [
            Fault(
                "--out",
                f"'{path}' exists already",
                f"command line: --out {out}",
                hint=hint,
                code="file",
            )
            for path in taken
        ]
        raise ConfigError(faults)
    try:
        for path, recipe in zip(paths, recipes, strict=True):
            write_text(path, recipe.text)
    except OSError as error:
        message = f"the recipe can't be written: {error.strerror or error}"
        where = f"command line: --out {out}"
        hint = "Name a file in a folder that can be written to."
        fault = Fault("--out", message, where, hint=hint, code="file")
        raise ConfigError([fault]) from error
    return list(zip(paths, recipes, strict=True))


def _print_notes(recipe: Migrated, *, several: bool) -> None:
    console = error_console()
    if several:
        console.print(Text(recipe.name, style="bold"))
    for kind, title in _TITLES.items():
        notes = [note for note in recipe.notes if note.kind == kind]
        if not notes:
            continue
        console.print(Text(title, style="bold yellow"))
        width = min(36, max(len(note.name) for note in notes))
        for note in notes:
            console.print(_line(note, width))


def _line(note: Note, width: int) -> Text:
    return Text.assemble("  ", (note.name.ljust(width), "bold"), "  ", note.text)


def _print_judgement(recipe: Migrated) -> None:
    """Judge the recipe as `octavo validate` would, and tell what it finds: a value that has still to be given, say."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{recipe.name}.yaml").write_text(recipe.text, encoding="utf-8")
        verdict = judge_run(
            [f"recipe={recipe.name}"], use="train", config_dir=Path(folder), files="local"
        )
    findings = [*verdict.faults, *(w for w in verdict.warnings if w.code != "file")]
    if findings:
        shown = [Fault(f.path, f.message, "", f.nearest, f.hint, code=f.code) for f in findings]
        print_faults("Octavo's own check of the recipe", shown, "bold yellow")
