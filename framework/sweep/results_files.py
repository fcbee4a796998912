"""A comparison as files for programs: results.csv and results.json."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.sweep.results_rows import PointResult, changed_keys, differing_basis

VERSION = 1


def results_csv(rows: Sequence[PointResult], *, folder: Path) -> str:
    """One row per point: full key names, plain numbers, the unit in the column's name, empty where it isn't known."""
    keys = changed_keys(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    flat = [_flat(row, folder) for row in rows]
    names = list(_flat(PointResult(0, "", {}, None, "waiting"), folder))
    # What was swept stands after the first three columns: place, point, name.
    writer.writerow([*names[:3], *keys, *names[3:]])
    for row, facts in zip(rows, flat, strict=True):
        values = ["" if value is None else value for value in facts.values()]
        writer.writerow([*values[:3], *(row.changes.get(key, "") for key in keys), *values[3:]])
    return text.getvalue()


def results_json(rows: Sequence[PointResult], *, folder: Path) -> str:
    """Everything in the table and the loss curves, for programs; a loss that isn't finite is null in JSON."""
    points = []
    for row in rows:
        facts = {name: _finite(value) for name, value in _flat(row, folder).items()}
        points.append(
            {
                **facts,
                "changes": dict(row.changes),
                "overrides": None if row.overrides is None else list(row.overrides),
                "validation_curve": [[step, _finite(loss)] for step, loss in row.run.validation],
                "train_curve": [[step, _finite(loss)] for step, loss in row.run.train],
            }
        )
    content = {
        "version": VERSION,
        "keys": list(changed_keys(rows)),
        "not_comparable_because_of": list(differing_basis(rows)),
        "points": points,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _flat(row: PointResult, folder: Path) -> dict[str, Any]:
    run = row.run
    best = run.best_validation or (None, None)
    memory = run.peak_memory_bytes
    return {
        "best": row.is_best,
        "point": row.index,
        "name": row.name,
        "state": row.state,
        "validation_loss": run.validation_loss,
        "validation_step": run.validation_step,
        "best_validation_loss": best[1],
        "best_validation_step": best[0],
        "comparable_group": row.group,
        "train_loss": run.train_loss,
        "steps": run.steps,
        "max_steps": run.max_steps,
        "time_s": None if run.seconds is None else round(run.seconds, 3),
        "time_covers": run.time_covers,
        "step_time_s": None if run.seconds_per_step is None else round(run.seconds_per_step, 6),
        "peak_memory_GiB": None if memory is None else round(memory / 2**30, 4),
        "memory_of": run.memory_of,
        "reason": row.reason,
        "run_folder": "" if run.folder is None else relative(run.folder, folder),
    }


def relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes; absolute where there is no way (another drive)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
