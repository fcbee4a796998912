"""The group of commands `octavo data`; what they do is in `framework/cli/data.py`, loaded when one is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Look at a data set before training on it.")


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    """Look at a data set before training on it."""
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@data_app.command()
def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH [data.KEY=VALUE]... | recipe=NAME [KEY=VALUE]...",
            help="A folder, metadata file, shards or hub://owner/name; or the data of a recipe.",
            show_default=False,
        ),
    ] = None,
    contact_sheet: Annotated[
        Path | None,
        typer.Option("--contact-sheet", metavar="FILE", help="Draw pictures into a .png file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    family: Annotated[
        str | None,
        typer.Option("--family", help="Model family of the buckets, beside a path."),
    ] = None,
    config_dir: Annotated[
        Path | None,
        typer.Option(
            "--config-dir", metavar="FOLDER", help="Recipes there are found before all others."
        ),
    ] = None,
) -> int:
    """Say what a data set holds and what is wrong with it: sizes, buckets, broken and double pictures, captions."""
    from framework.cli.data import run_inspection

    return run_inspection(
        words or [],
        contact_sheet=contact_sheet,
        as_json=as_json,
        family=family,
        config_dir=config_dir,
    )
