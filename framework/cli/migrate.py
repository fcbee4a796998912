"""The options of `octavo migrate`; what it does is `framework/cli/migration.py`, read only when it is asked for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer


@dataclass
class Migrate:
    """Make a recipe of a command or file of another trainer, and say what has no counterpart."""

    # A class, because its options are many: typer reads the fields as it reads a function's parameters.
    trainer: Annotated[
        Literal["diffsynth", "kohya", "musubi", "ai-toolkit"],
        typer.Argument(metavar="TRAINER", help="diffsynth, kohya, musubi or ai-toolkit."),
    ]
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="Its command line in quotes, or its configuration file.",
            show_default=False,
        ),
    ] = None
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="A shell script or configuration file."),
    ] = None
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", metavar="FILE", help="The data set's file of kohya's trainers."),
    ] = None
    family: Annotated[
        str,
        typer.Option("--family", metavar="NAME", help="Where the model doesn't tell its family."),
    ] = ""
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the recipe there; never overwrites."),
    ] = None

    def __post_init__(self) -> None:
        from framework.cli.migration import Given, run_migration

        words = self.command or []
        command = words[0] if len(words) == 1 else shlex.join(words)
        run_migration(Given(self.trainer, command, self.file, self.dataset, self.family, self.out))
