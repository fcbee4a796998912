"""`octavo compare`: the table and the page of a sweep, made anew also while it runs, or of any runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framework.cli.report import error_console, output_console, print_usage_error
from framework.sweep.folder import POINTS_FOLDER, SWEEP_FILE, numbered_folders
from framework.sweep.results import (
    collect,
    collect_runs,
    results_table,
    search_lines,
    write_results,
)
from framework.sweep.results_commands import shown_from
from framework.sweep.results_read import newest_run
from framework.sweep.results_rows import PointResult, read_points

_RUN_FILE = "run.json"


def run_compare(folders: Sequence[Path], *, out: Path | None) -> int:
    """Compare the points of one sweep, or several runs (those of sweeps among them); returns the exit code.

    out: where results.csv, results.json and results.html are written. One sweep's go into its own folder unless it is
    given; those of several runs aren't written without it.
    The table goes to stdout. 2 where a folder is neither a sweep's nor a run's.
    """
    faults = [fault for fault in map(_fault, folders) if fault is not None]
    for message, hint in faults:
        print_usage_error(message, hint)
    if faults:
        return 2
    sweep = folders[0] if len(folders) == 1 and _is_sweep(folders[0]) else None
    rows = collect(sweep) if sweep is not None else collect_runs(_runs(folders))
    _print_table(rows)
    for line in search_lines(sweep) if sweep is not None else []:
        output_console().print(line)
    if sweep is None and out is None:
        error_console().print("Give --out FOLDER to write results.csv and results.html as well.")
        return 0
    paths = write_results(sweep or folders[0], rows, out=out, of_sweep=sweep is not None)
    for title, path in zip(("Table", "Data", "Page"), paths, strict=True):
        output_console().print(f"  {title:<7}{shown_from(path, Path.cwd())}")
    return 0


def _print_table(rows: Sequence[PointResult]) -> None:
    console = output_console()
    console.print(results_table(rows, width=console.options.max_width))


def _runs(folders: Sequence[Path]) -> list[Path]:
    """Run folders, in order and once each; a sweep stands for the newest runs of its points."""
    found: list[Path] = []
    for folder in folders:
        if not _is_sweep(folder):
            found.append(folder)
            continue
        names = [str(point.get("name")) for point in read_points(folder)]
        runs = [newest_run(folder / POINTS_FOLDER / name) for name in names]
        found += [run for run in runs if run is not None]
    return list(dict.fromkeys(path.absolute() for path in found))


def _is_sweep(folder: Path) -> bool:
    return (folder / SWEEP_FILE).is_file()


def _fault(folder: Path) -> tuple[str, str] | None:
    """(what is wrong, next step) with a folder that can't be compared; None for one that can."""
    if _is_sweep(folder) or (folder / _RUN_FILE).is_file():
        return None
    if not folder.exists():
        return f"{folder}: there is no such folder", _inside(folder.parent)
    if not folder.is_dir():
        return f"{folder}: is a file, not a folder", "Name the folder of a sweep or a run."
    message = f"{folder}: is neither a sweep's folder (sweep.json) nor a run's (run.json)"
    return message, _inside(folder)


def _inside(folder: Path) -> str:
    """A hint that names what can be compared just below a folder."""
    for path in reversed(numbered_folders(folder)):
        if _is_sweep(path):
            return f"Its newest sweep: octavo compare {path}"
        if (path / _RUN_FILE).is_file():
            return f"Its runs: octavo compare {folder}/*"
    return "Sweeps lie in <run.output_dir>/sweeps/<run.name>/001, runs in <run.output_dir>/<run.name>/001."
