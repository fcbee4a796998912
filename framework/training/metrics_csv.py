"""`metrics.csv`: one row per logged step, readable while the run goes on and exact after a resume."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from framework.atomic import write_text


class MetricsCsv(Logger):
    """Appends each logged step to a CSV file at once, so that a killed run loses none.

    A column that is new widens the file (rewritten atomically); rows from after the step that a run
    resumes at are dropped, so that no step stands twice.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        """path: the CSV file.   resume_step: keep rows up to this step; None starts a new file."""
        super().__init__()
        self._path = path
        self._columns: list[str] = ["step"]
        rank_zero_only(self._open)(resume_step)

    def _open(self, resume_step: int | None) -> None:
        rows: list[dict[str, str]] = []
        if resume_step is not None and self._path.is_file():
            rows = [row for row in read_rows(self._path) if int(row["step"]) <= resume_step]
            if rows:
                self._columns = [name for name in rows[0] if name]
        self._rewrite(rows)

    @property
    def name(self) -> str:
        """Lightning's name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Lightning's version of the logger; the run folder's number says it already."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self._path

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Settings are in config.yaml beside this file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row. Floats are written so that reading them back gives the same bits."""
        row = {"step": str(step or 0)} | {k: repr(float(v)) for k, v in metrics.items()}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_rows(self._path)
            self._columns += new
            self._rewrite([*rows, row])
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the whole rows of a metrics file; a last line that was cut while it was written is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if None not in row.values()]
