"""`octavo export`: a trained LoRA in the form of another program, or merged into a checkpoint that needs none."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from framework.errors import SourceError


class Form(StrEnum):
    """Programs that can open what is written; typer takes no list of literals."""

    peft = "peft"
    diffusers = "diffusers"
    kohya = "kohya"
    comfyui = "comfyui"


@dataclass
class Export:
    """Write a run's LoRA, or any LoRA file, in the form of other programs, or merge it into its checkpoint."""

    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or a LoRA file in any form.")
    ]
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[recipe=NAME] [KEY=VALUE]...",
            help="The model to merge into, where the LoRA doesn't say it.",
            show_default=False,
        ),
    ] = None
    formats: Annotated[
        list[Form] | None,
        typer.Option("--format", help="Program that shall open it; may be given several times."),
    ] = None
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole checkpoint with the LoRA in its weights.")
    ] = False
    precision: Annotated[
        Literal["bf16", "fp8"] | None,
        typer.Option("--precision", help="Of merged components. Default: bf16."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write to. Default for formats: beside the LoRA."),
    ] = None
    config_dir: Annotated[
        Path | None,
        typer.Option(
            "--config-dir", metavar="FOLDER", help="Recipes there are found before all others."
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.merge == bool(self.formats):
            raise typer.BadParameter("give --format, once or several times, or --merge")
        if self.precision is not None and not self.merge:
            raise typer.BadParameter("--precision is for --merge: a LoRA keeps its own")
        if self.merge and self.out is None:
            raise typer.BadParameter("--merge needs --out FOLDER, which must not exist yet")
        if not self.run.exists():
            raise SourceError(
                f"{self.run} doesn't exist",
                hint="name a run's folder, such as outputs/pocket_lora/001, or a LoRA file",
            )
        # Imported when asked for: every other command would wait for what this one needs.
        from framework.cli.exporting import export_forms, export_merged

        if self.merge:
            assert self.out is not None
            export_merged(
                self.run,
                self.overrides or [],
                precision=self.precision or "bf16",
                out=self.out,
                config_dir=self.config_dir,
            )
        else:
            export_forms(self.run, [form.value for form in self.formats or ()], self.out)
