"""`octavo prepare`: data sets that recipes train on, made of what a package ships."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from framework.cli.report import output_console
from framework.errors import DataError

prepare_app = typer.Typer(help="Make a data set that recipes train on.")


@prepare_app.callback(invoke_without_command=True)
def _prepare(context: typer.Context) -> None:
    """Make a data set that recipes train on."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@prepare_app.command()
def openmoji(
    style: Annotated[
        Literal["color", "line"],
        typer.Option("--style", help="Coloured pictures or line drawings."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures; made anew.")],
    subset: Annotated[
        Literal["pocket", "all"],
        typer.Option("--subset", help="The pocket model's subjects, or every emoji."),
    ] = "pocket",
    size_px: Annotated[
        int, typer.Option("--size-px", min=16, max=2048, help="Side of the square pictures.")
    ] = 64,
) -> None:
    """Render OpenMoji (CC BY-SA 4.0) with captions; needs no network."""
    try:
        from framework.data.openmoji import prepare_openmoji
    except ModuleNotFoundError as error:
        hint = "Run `pip install octavo[openmoji]`."
        raise DataError(
            f"OpenMoji needs the package {error.name}, which isn't installed", hint=hint
        ) from error
    count = prepare_openmoji(out, style=style, size_px=size_px, subset=subset)
    output_console().print(f"{count} pictures with captions in {out}")
