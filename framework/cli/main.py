"""The command `octavo`: reads the command line, and turns every error that is meant for a person into a report."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from framework import __version__
from framework.cli.data_app import data_app
from framework.cli.export import Export
from framework.cli.migrate import Migrate
from framework.cli.prepare_app import prepare_app
from framework.cli.report import error_console, output_console, print_error, print_usage_error
from framework.errors import OctavoError

# typer carries its own copy of click in some versions, so the base of command-line errors is found by its name.
_COMMAND_LINE_ERROR: type[Exception] = next(
    ancestor for ancestor in typer.BadParameter.__mro__ if ancestor.__name__ == "ClickException"
)
_INTERRUPTED = 130

app = typer.Typer(
    name="octavo",
    help="Train large diffusion models from declarative YAML, with frozen weights stored in FP8.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(prepare_app, name="prepare")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="recipe=NAME [KEY=VALUE]...",
        help="The recipe and what differs from it, e.g. recipe=pocket_lora model.dit.precision=fp8.",
        show_default=False,
    ),
]

ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir", metavar="FOLDER", help="Recipes there are found before all others."
    ),
]
# Flags that aren't ours go to the overrides' report, which knows what other trainers' flags are called here.
_FLAGS_PASS = {"ignore_unknown_options": True}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the run failed, 2 the request can't be met, 130 stopped.

    argv: without the program's name; None means the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if misspelt := _misspelt_option(arguments):
        print_usage_error(*misspelt)
        return 2
    try:
        code = typer.main.get_command(app).main(
            arguments, prog_name="octavo", standalone_mode=False
        )
    except OctavoError as error:
        print_error(error)
        return error.exit_code
    except _COMMAND_LINE_ERROR as error:
        return _report_usage(error, arguments)
    except (KeyboardInterrupt, typer.Abort):
        return _report_interrupt(arguments)
    except SystemExit as error:
        # Lightning catches Ctrl+C itself, tears the run down and leaves with exit().
        if isinstance(error.__context__, KeyboardInterrupt):
            return _report_interrupt(arguments)
        raise
    if code == _INTERRUPTED:  # typer caught Ctrl+C
        return _report_interrupt(arguments)
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def _octavo(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
) -> None:
    if version:
        output_console().print(f"octavo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@app.command(context_settings=_FLAGS_PASS)
def train(
    overrides: Overrides = None,
    multirun: Annotated[
        bool,
        typer.Option(
            "--multirun", "-m", help="Run every combination of KEY=A,B; go on with a stopped sweep."
        ),
    ] = False,
    config_dir: ConfigDir = None,
    summary: Annotated[
        Path | None,
        typer.Option("--summary", metavar="FILE", help="Write how the run ended as JSON."),
    ] = None,
) -> int:
    """Train a run, or go on with one that was stopped."""
    if multirun:
        from framework.cli.sweep import run_sweep

        if summary is not None:
            raise typer.BadParameter(
                "a sweep writes a results.json of its own: leave out --summary"
            )
        return run_sweep(overrides or [], config_dir=config_dir)
    from framework.cli.train import run_training

    run_training(overrides or [], config_dir=config_dir, summary=summary)
    return 0


@app.command("plan", context_settings=_FLAGS_PASS)
@dataclass
class Plan:
    """Say what a run will hold in memory, from the headers of its weights alone."""

    # A class, because its options are many, as those of `generate`.
    overrides: Overrides = None
    config_dir: ConfigDir = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", metavar="COMPONENT", help="List the layers of one component instead."
        ),
    ] = None
    error: Annotated[
        bool,
        typer.Option(
            "--error", help="Measure what FP8 costs in accuracy instead; reads the weights."
        ),
    ] = False
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="SIZE", help="Choose settings for a device of this size, e.g. 24GiB."
        ),
    ] = None
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="SIZE", help="Host memory that --fit may use."),
    ] = None
    activations: Annotated[
        bool,
        typer.Option(help="Trace activations, which takes torch and some seconds."),
    ] = True
    chart: Annotated[
        Path | None,
        typer.Option("--chart", metavar="FILE", help="Draw the phases as a .png or .svg file."),
    ] = None

    def __post_init__(self) -> None:
        if self.error:
            if any((self.layers, self.fit, self.host, self.chart)):
                raise typer.BadParameter(
                    "--error prints a report of its own: leave out --layers, --fit, --host, --chart"
                )
            from framework.cli.encoding_error import run_encoding_error

            run_encoding_error(
                self.overrides or [], as_json=self.as_json, config_dir=self.config_dir
            )
            return
        from framework.cli.plan import fit_overrides, run_plan

        overrides = [*(self.overrides or []), *fit_overrides(self.fit, self.host)]
        run_plan(
            overrides,
            as_json=self.as_json,
            layers=self.layers,
            activations=self.activations,
            chart=self.chart,
            config_dir=self.config_dir,
        )


@app.command(context_settings=_FLAGS_PASS)
def validate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[recipe=A,B [KEY=VALUE,VALUE]...] [FILE.yaml]...",
            help="A recipe with overrides, every combination of several, or recipe files.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every recipe that can be found.")] = False,
    config_dir: ConfigDir = None,
    form: Annotated[
        Literal["text", "json", "github", "sarif"],
        typer.Option("--format", help="For people, scripts, GitHub Actions or code scanning."),
    ] = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as faults.")] = False,
) -> int:
    """Judge configurations in a moment: no weight is read, nothing is fetched, torch stays unloaded."""
    from framework.cli.validate import run_validation

    return run_validation(
        targets or [], every=every, config_dir=config_dir, form=form, strict=strict
    )


@app.command(context_settings=_FLAGS_PASS)
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="E.g. model.dit.precision, or optim.")],
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
) -> None:
    """Say what a key does, what it may be, and what set its present value."""
    from framework.cli.explain import run_explain

    run_explain(key, overrides or [], config_dir=config_dir)


@app.command()
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="A sweep's folder, or several runs' folders."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for results.csv and results.html of several runs."),
    ] = None,
) -> int:
    """Compare the runs of a sweep, finished or not, by validation loss, time and memory."""
    from framework.cli.compare import run_compare

    return run_compare(folders, out=out)


@app.command("generate", context_settings=_FLAGS_PASS)
@dataclass
class Generate:
    """Make pictures with the model of a recipe, with or without a LoRA."""

    # A class, because its options are many: typer reads the fields as it reads a function's parameters.
    overrides: Overrides = None
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="What to draw; once per picture. Default: sample.prompts."),
    ] = None
    lora: Annotated[Path | None, typer.Option("--lora", help="A LoRA file, or a run's folder.")] = (
        None
    )
    seed: Annotated[int | None, typer.Option("--seed", help="Default: sample.seed.")] = None
    steps: Annotated[
        int | None, typer.Option("--steps", help="Default: sample.num_inference_steps.")
    ] = None
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Default: sample.guidance_scale.")
    ] = None
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Default: sample.size_px.")
    ] = None
    frames: Annotated[
        int | None, typer.Option("--frames", help="Of a clip. Default: sample.num_frames.")
    ] = None
    controls: Annotated[
        list[Path] | None,
        typer.Option(
            "--control",
            help="A picture to edit; once per prompt. Default: sample.control_images.",
        ),
    ] = None
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNG files.")] = Path(
        "outputs/generated"
    )
    config_dir: ConfigDir = None

    def __post_init__(self) -> None:
        from framework.cli.generate import run_generation, sample_overrides

        changes = sample_overrides(
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            size=self.size,
            frames=self.frames,
            controls=self.controls or (),
        )
        run_generation(
            [*(self.overrides or []), *changes],
            prompts=self.prompts or [],
            lora=self.lora,
            out=self.out,
            config_dir=self.config_dir,
        )


app.command("export", context_settings=_FLAGS_PASS)(Export)
app.command("migrate", context_settings=_FLAGS_PASS)(Migrate)


@app.command()
def schema(
    form: Annotated[
        Literal["json", "markdown"],
        typer.Option("--format", help="JSON Schema, or the page of all keys."),
    ] = "json",
    of: Annotated[
        str,
        typer.Option(
            "--of",
            metavar="NAME",
            help="run: a whole configuration; recipe: what a recipe's file may hold; or a group such as model.",
        ),
    ] = "run",
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FOLDER", help="Write every schema there instead."),
    ] = None,
) -> None:
    """Print every key that a configuration may hold."""
    from framework.cli.schema import schema_text, write_schemas

    if write is not None:
        write_schemas(write)
    else:
        sys.stdout.write(schema_text(form, of))


def _report_usage(error: BaseException, arguments: Sequence[str]) -> int:
    """Report a command line that can't be understood; exit code 2."""
    message = str(getattr(error, "format_message", lambda: str(error))())
    command = next((name for name in arguments if name in _command_names()), "")
    hint = f"`octavo {command} --help` lists what it takes.".replace("  ", " ")
    dashed = [line for line in arguments if line.startswith("--") and "." in line.partition("=")[0]]
    if dashed:
        hint = f"Overrides have no dashes: {dashed[0].lstrip('-')}"
    print_usage_error(message, hint)
    return 2


def _misspelt_option(arguments: Sequence[str]) -> tuple[str, str] | None:
    """Message and hint for a flag that is nearly one of the command's own.

    Flags that are not reach the report on overrides, which knows other trainers' flags.
    """
    commands = getattr(typer.main.get_command(app), "commands", {})
    if not arguments or arguments[0] not in commands:
        return None
    parameters = commands[arguments[0]].params
    own = [flag for p in parameters for flag in (*p.opts, *p.secondary_opts)]
    for argument in arguments[1:]:
        flag = argument.partition("=")[0]
        if not flag.startswith("--") or flag in own or "." in flag:
            continue
        close = difflib.get_close_matches(flag, own, n=1, cutoff=0.85)
        if close and flag != "--help":
            hint = f"Write {close[0]}; `octavo {arguments[0]} --help` lists what it takes."
            return f"No such option: {flag}", hint
    return None


def _command_names() -> tuple[str, ...]:
    commands = tuple(
        str(info.name or getattr(info.callback, "__name__", "")) for info in app.registered_commands
    )
    return (*commands, *(str(group.name) for group in app.registered_groups))


def _report_interrupt(arguments: Sequence[str]) -> int:
    line = "Stopped."
    if arguments[:1] == ["train"]:
        line = "Stopped. The same command goes on from the last checkpoint."
    error_console().print(line)
    return _INTERRUPTED
