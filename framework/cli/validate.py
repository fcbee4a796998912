"""`octavo validate`: judges configurations in one go, and reports for people, scripts and continuous integration."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from framework.cli.findings import Judged, Report
from framework.cli.report import (
    error_console,
    output_console,
    print_error,
    print_faults,
    print_warnings,
)
from framework.cli.targets import Request, read_targets
from framework.errors import ConfigError, Fault
from framework.judge import Verdict, judge_points

Form = Literal["text", "json", "github", "sarif"]
_MANY = 20  # fewer are judged before a progress bar could be read


def run_validation(
    targets: Sequence[str],
    *,
    every: bool,
    config_dir: Path | None,
    form: Form,
    strict: bool,
) -> int:
    """Judge every configuration that the command line names; return 0 where all can be used, else 2.

    targets: overrides, also with several values each (all combinations are judged), and paths of recipe files.
    every: every recipe that can be found.   config_dir: searched first; alone, every recipe in it is judged.
    form: the result goes to stdout; as text, faults and warnings go to stderr.   strict: warnings count as faults.
    Reads YAML, and headers of checkpoints that are on this disk. Torch stays unloaded.
    """
    start = time.perf_counter()
    try:
        judged = _judge_all(read_targets(targets, every=every, config_dir=config_dir))
    except ConfigError as error:
        judged = [Judged("command line", tuple(targets), error.faults, ())]
    report = Report(tuple(judged), time.perf_counter() - start, strict)
    if form == "text":
        _print_text(report)
    elif form == "json":
        from framework.cli.formats import report_json

        sys.stdout.write(report_json(report))
    elif form == "sarif":
        from framework.cli.sarif import report_sarif

        sys.stdout.write(report_sarif(report.of_the_repository()))
    else:
        _write_for_github(report.of_the_repository())
    return 2 if report.failed else 0


def _judge_all(request: Request) -> list[Judged]:
    """Judge every configuration in order; a bar on a terminal shows how far it is."""
    console = error_console()
    columns = (TextColumn("Validating"), BarColumn(), MofNCompleteColumn())
    hidden = len(request.targets) < _MANY or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=len(request.targets))
        verdicts: list[Verdict] = []
        for folder, group in itertools.groupby(request.targets, key=lambda one: one.config_dir):
            points = [target.overrides for target in group]
            verdicts += judge_points(
                points,
                use="train",
                config_dir=folder,
                on_judged=lambda _: progress.advance(task),
            )
    return [
        Judged(
            name=target.name or verdict.name,
            overrides=target.overrides,
            faults=tuple(dict.fromkeys([*request.faults, *_as_typed(verdict.faults, request)])),
            warnings=_as_typed(verdict.warnings, request),
            file=target.file,
        )
        for target, verdict in zip(request.targets, verdicts, strict=True)
    ]


def _as_typed(faults: Sequence[Fault], request: Request) -> tuple[Fault, ...]:
    """Name the interval that a person typed, where a fault names the end of it that was judged."""
    lines = {f"command line: {end}": line for end, line in request.typed.items()}
    return tuple(
        replace(fault, where=f"command line: {lines[fault.where]}")
        if fault.where in lines
        else fault
        for fault in faults
    )


def _write_for_github(report: Report) -> None:
    """Write annotations to stdout, and the job summary into the file that GitHub Actions names."""
    from framework.cli.formats import github_summary, report_github

    sys.stdout.write(report_github(report))
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(github_summary(report))


def _print_text(report: Report) -> None:
    """Write the report for a person: faults and warnings on stderr, the result on stdout."""
    if len(report.judged) > 1:
        _print_findings(report)
        style = "bold red" if report.failed else "bold green"
        output_console().print(Text(report.summary(), style=style))
        return
    only = report.judged[0]
    if only.faults:
        print_error(ConfigError(only.faults))
    print_warnings(only.warnings)
    if not report.failed:
        name = only.name.removeprefix("recipe=")
        output_console().print(f"The configuration of {name} is valid.")
    elif not only.faults:
        error_console().print(Text("Error: with --strict, warnings count as faults", "bold red"))


def _print_findings(report: Report) -> None:
    findings = report.findings()
    for level, word, style in (
        ("error", "fault", "bold red"),
        ("warning", "warning", "bold yellow"),
    ):
        chosen = [finding for finding in findings if finding.level == level]
        if not chosen:
            continue
        start = "Error: " if level == "error" else ""
        title = f"{start}{len(chosen)} {word}{'s' * (len(chosen) != 1)} in the configurations"
        concerns = [report.concerned(finding) for finding in chosen]
        print_faults(title, [finding.fault for finding in chosen], style, concerns=concerns)
