"""`octavo train -m`: every point judged, then run, then compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from framework.cli.report import error_console, output_console, print_warnings
from framework.cli.train import program, shown
from framework.sweep.folder import DONE_STATES, PointRecord, SweepFolder
from framework.sweep.jobs import Point

_INTERRUPTED = 130


def run_sweep(overrides: Sequence[str], *, config_dir: Path | None) -> int:
    """Run a sweep, or go on with one that was stopped.

    Exit code 0: all points are done; 1: some failed; 130: stopped. Raises ConfigError before anything is written.
    """
    from framework.compose import read_sweep
    from framework.sweep.check import check_sweep
    from framework.sweep.run import run_points

    request = read_sweep(overrides, config_dir=config_dir)
    sweep = check_sweep(request, config_dir=config_dir)
    print_warnings(sweep.warnings)
    folder = SweepFolder.claim(sweep.parent, key=sweep.key, anew=sweep.anew)
    try:
        launcher = sweep.settings.launcher.name
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        folder.describe(key=sweep.key, command=command, launcher=launcher, config_dir=config_dir)
        teller = _Teller(sweep.count, on_terminal=launcher == "basic")
        teller.begin(folder)
        end = run_points(request, sweep, folder, config_dir=config_dir, on_change=teller.changed)
        _print_results(end.folder)
        if end.was_stopped:
            return _INTERRUPTED
        return _report_unfinished(end.records, on_terminal=launcher == "basic")
    finally:
        folder.release()


class _Teller:
    """Says on the terminal what becomes of the points."""

    def __init__(self, count: int, *, on_terminal: bool) -> None:
        self._count = count
        self._on_terminal = on_terminal
        self._console = error_console()

    def begin(self, folder: SweepFolder) -> None:
        """Say where the sweep is and what is done already."""
        points = f"{self._count} point{'s' if self._count != 1 else ''}"
        records = folder.read_points()
        done = sum(record.state in DONE_STATES for record in records)
        begun = sum(record.state == "started" for record in records)
        failed = sum(record.state == "failed" for record in records)
        line = f"{points}, all valid; results in {shown(folder.path)}"
        if records:
            parts = [(done, "done"), (begun, "begun"), (failed, "failed before")]
            told = ", ".join(f"{number} {name}" for number, name in parts if number)
            line = f"Going on with {shown(folder.path)}: {points}, {told or 'none begun'}"
        self._console.print(Text(line, style="dim"))

    def changed(self, record: PointRecord) -> None:
        """Say that a point started or ended."""
        head = f"Point {record.point.index + 1} of {self._count}"
        title = record.point.title or record.point.name
        if record.state == "started" and not record.summary:
            verb = "" if self._on_terminal else " started"
            again = " (again)" if record.attempts > 1 else ""
            start = "\n" if self._on_terminal else ""
            self._console.print(Text(f"{start}{head}{verb}{again}: {title}", style="bold"))
        elif record.state == "finished" and not self._on_terminal:
            self._console.print(Text(f"{head} finished{_measured(record)}: {title}", style="green"))
        elif record.state == "pruned":
            self._console.print(Text(f"{head} pruned{_measured(record)}: {title}", style="yellow"))
        elif record.state == "failed":
            line = f"{head} failed: {record.error}"
            self._console.print(Text(line, style="bold red"))


def _measured(record: PointRecord) -> str:
    parts = []
    seconds, loss = record.summary.get("seconds"), record.summary.get("val_loss")
    if isinstance(seconds, int | float):
        parts.append(f"{seconds:.0f} s")
    if isinstance(loss, int | float):
        parts.append(f"validation loss {loss:.4f}")
    return f" ({', '.join(parts)})" if parts else ""


def _print_results(folder: Path) -> None:
    """Write the comparison and show it."""
    from framework.sweep.results import results_table, search_lines, write_results
    from framework.sweep.results_commands import generate_command
    from framework.sweep.results_rows import collect

    rows = collect(folder)
    paths = write_results(folder, rows)
    console = output_console()
    console.print()
    console.print(results_table(rows, width=console.options.max_width))
    for line in search_lines(folder):
        console.print(line)
    for path in paths:
        if path.suffix in (".html", ".csv"):
            name = "Page" if path.suffix == ".html" else "Table"
            console.print(f"  {name:<13}{shown(path)}")
    best = next((row for row in rows if row.is_best), None)
    command = generate_command(best, SweepFolder(folder).read()) if best is not None else ""
    if command:
        console.print(Text("Try next, with the best point:", style="bold"))
        console.print(f"  {command.replace('octavo', program('octavo'), 1)}")


def _report_unfinished(records: Sequence[PointRecord], *, on_terminal: bool) -> int:
    """Say what failed and why; exit code 1 where something did."""
    failed = [record for record in records if record.state not in DONE_STATES]
    if not failed:
        return 0
    console = error_console()
    count = f"{len(failed)} of {len(records)} points"
    console.print(Text(f"Error: {count} didn't finish", style="bold red"))
    for record in failed:
        console.print(f"  {_label(record.point)}: {record.error or 'ended before its last step'}")
        log = record.folder / "log.txt"
        if not on_terminal and log.is_file():
            console.print(f"      Log: {shown(log)}")
    console.print(
        "      Next: the same command tries these again and leaves the others as they are."
    )
    return 1


def _label(point: Point) -> str:
    return f"{point.index + 1} ({point.title})" if point.changes else str(point.index + 1)
