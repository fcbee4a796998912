"""What a sweep, or any set of runs, has come to: one row per point, best first, as table, CSV, JSON and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framework.atomic import write_text
from framework.sweep.folder import SWEEP_FILE
from framework.sweep.results_files import results_csv, results_json
from framework.sweep.results_html import results_page
from framework.sweep.results_read import read_json
from framework.sweep.results_rows import (
    PointResult,
    collect,
    collect_runs,
    ranked,
)
from framework.sweep.results_table import results_table
from framework.sweep.search_report import search_lines

__all__ = [
    "PointResult",
    "collect",
    "collect_runs",
    "ranked",
    "results_table",
    "search_lines",
    "write_results",
]

CSV_FILE, JSON_FILE, HTML_FILE = "results.csv", "results.json", "results.html"


def write_results(
    sweep_folder: Path,
    rows: Sequence[PointResult] | None = None,
    *,
    out: Path | None = None,
    of_sweep: bool = True,
) -> tuple[Path, Path, Path]:
    """Write results.csv, results.json and results.html; returns their paths.

    rows: None reads the sweep's.   out: None means the sweep's folder.
    Each file is whole or the old one, so that the page may be open while the sweep runs.
    """
    folder = (out or sweep_folder).absolute()
    found = collect(sweep_folder) if rows is None else list(rows)
    sweep = read_json(sweep_folder / SWEEP_FILE) if of_sweep else {}
    search = search_lines(sweep_folder, with_best=False) if of_sweep else []
    page = results_page(found, folder=folder, sweep=sweep, search=search)
    paths = folder / CSV_FILE, folder / JSON_FILE, folder / HTML_FILE
    texts = results_csv(found, folder=folder), results_json(found, folder=folder), page
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)
    return paths
