"""The points of a sweep, or of any set of runs, as rows of a comparison: what each is, where it is, and its rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from framework.errors import RunError
from framework.sweep.folder import POINT_FILE, POINTS_FOLDER, SWEEP_FILE
from framework.sweep.jobs import PointState
from framework.sweep.results_read import SUMMARY_FILE, RunRecord, newest_run, read_json, read_run

BASIS_KEYS = (
    "model.family",
    "model.source",
    "model.revision",
    "model.vae.source",
    "model.vae.precision",
    "data.path",
    "data.max_px",
    "data.max_aspect_ratio",
    "objective.loss",
    "objective.huber_delta",
    "validation.fraction",
    "validation.max_samples",
    "validation.sigmas",
    "validation.seed",
)
"""What decides which pictures a validation loss is measured on, and against what: only where all of these agree may two
validation losses be compared."""
_NOT_COMPARED = (
    "run.",
    "logger.",
    "sample.",
    "checkpoint.every_n_steps",
    "checkpoint.keep_last",
    "data.cache_dir",
    "data.num_workers",
    "trainer.log_every_n_steps",
    "validation.every_n_steps",
)
"""Beginnings of keys that decide nothing about what a run computes."""
RANK: Mapping[PointState, int] = {
    "finished": 0,
    "pruned": 1,
    "started": 2,
    "failed": 3,
    "waiting": 4,
}


@dataclass(frozen=True)
class PointResult:
    """One row of a comparison.

    changes: what differs between the points, by dotted key, as typed.   overrides: None where they aren't known.
    reason: why it failed or was pruned, in one sentence.
    run: what the run's folder says.
    group: "A", "B" ...: points of one letter have comparable validation losses; "" for one that has none.
    is_best: the lowest last validation loss of the finished points in its group.
    """

    index: int
    name: str
    changes: Mapping[str, str]
    overrides: tuple[str, ...] | None
    state: PointState
    reason: str = ""
    run: RunRecord = field(default_factory=RunRecord)
    group: str = ""
    is_best: bool = False

    @property
    def title(self) -> str:
        """The changes as a person would type them, or the name where nothing differs."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) or self.name


def collect(sweep_folder: Path) -> list[PointResult]:
    """Read all points of a sweep, whatever state they are in; best first, then unfinished and failed ones.

    Never fails for what a point lacks. RunError where the folder holds no readable sweep.json.
    """
    rows = []
    for index, point in enumerate(read_points(sweep_folder)):
        name = str(point.get("name", index))
        overrides, changes = point.get("overrides"), point.get("changes")
        state, reason, record = _read_point(sweep_folder / POINTS_FOLDER / name)
        rows.append(
            PointResult(
                index=index,
                name=name,
                changes=_as_texts(changes) if isinstance(changes, dict) else {},
                overrides=tuple(map(str, overrides)) if isinstance(overrides, list) else None,
                state=state,
                reason=reason,
                run=record,
            )
        )
    return ranked(rows)


def collect_runs(folders: Sequence[Path]) -> list[PointResult]:
    """Read single runs; what differs between their resolved configurations takes the place of swept keys."""
    records = [read_run(folder) for folder in folders]
    keys = _differing(records)
    rows = []
    for index, record in enumerate(records):
        assert record.folder is not None
        rows.append(
            PointResult(
                index=index,
                name=f"{record.folder.parent.name}/{record.folder.name}",
                changes={key: as_yaml(record.setting(key)) for key in keys},
                overrides=None,
                state="finished" if record.state == "finished" else "started",
                run=record,
            )
        )
    return ranked(rows)


def read_points(sweep_folder: Path) -> list[dict[str, Any]]:
    """The points in sweep.json. RunError where there is none that can be read."""
    points = read_json(sweep_folder / SWEEP_FILE).get("points")
    if not isinstance(points, list):
        raise RunError(
            "no sweep lies in this folder",
            where=str(sweep_folder),
            found=f"no readable {SWEEP_FILE}",
            hint="Name a folder like outputs/sweeps/<run.name>/001.",
        )
    return [point for point in points if isinstance(point, dict)]


def ranked(rows: Sequence[PointResult]) -> list[PointResult]:
    """Sort by the last validation loss within comparable groups, finished points first; mark the best of each group."""
    bases = {row.index: _basis(row.run) for row in rows if row.run.validation}
    sizes = Counter(bases.values())
    first = {basis: min(i for i, b in bases.items() if b == basis) for basis in sizes}
    order = sorted(sizes, key=lambda basis: (-sizes[basis], first[basis]))
    letters = {basis: _letter(number) for number, basis in enumerate(order)}
    grouped = [
        replace(row, group=letters[bases[row.index]] if row.index in bases else "") for row in rows
    ]
    grouped.sort(key=_place)
    done: set[str] = set()
    marked = []
    for row in grouped:
        loss = row.run.validation_loss
        can_win = row.state == "finished" and loss is not None and math.isfinite(loss)
        marked.append(replace(row, is_best=can_win and row.group not in done))
        if can_win:
            done.add(row.group)
    return marked


def differing_basis(rows: Sequence[PointResult]) -> tuple[str, ...]:
    """Keys that keep the validation losses of these rows from being comparable; empty where they are."""
    found = [row.run for row in rows if row.group]
    return tuple(key for key in BASIS_KEYS if len({_basis_value(run, key) for run in found}) > 1)


def changed_keys(rows: Sequence[PointResult]) -> tuple[str, ...]:
    """Dotted keys that differ between the rows, in the order of their points."""
    ordered = sorted(rows, key=lambda row: row.index)
    return tuple(dict.fromkeys(key for row in ordered for key in row.changes))


def as_yaml(value: Any) -> str:
    """Write a value as an override would: null, true, [1,2]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ",".join(as_yaml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_yaml(item)}" for key, item in value.items()) + "}"
    return str(value)


def _read_point(folder: Path) -> tuple[PointState, str, RunRecord]:
    """State, reason and newest run of one point's folder."""
    told, summary = read_json(folder / POINT_FILE), read_json(folder / SUMMARY_FILE)
    run_folder = newest_run(folder)
    record = RunRecord()
    if run_folder is not None:
        # A summary of an earlier attempt says nothing about the folder of a later one; one without a folder is
        # of a run that was stopped or failed, and a new start would have removed it.
        told_of = Path(str(summary.get("run_dir") or run_folder)).name
        record = read_run(run_folder, summary=summary if told_of == run_folder.name else None)
    begun: PointState = "waiting" if run_folder is None else "started"
    state = next((known for known in RANK if known == told.get("state")), begun)
    if state == "started" and record.state == "finished":
        state = "finished"  # killed between the run's last file and this note
    reason = str(told.get("error") or _reason(summary)) if state in ("failed", "pruned") else ""
    return state, reason, record


def _reason(summary: Mapping[str, Any]) -> str:
    error = summary.get("error")
    if isinstance(error, Mapping):
        found = str(error.get("found") or "")
        message = str(error.get("message") or "")
        faults = error.get("faults")
        if isinstance(faults, list) and faults and isinstance(faults[0], Mapping):
            message = f"{faults[0].get('path', '')}: {faults[0].get('message', '')}".lstrip(": ")
        return f"{message} ({found})" if found else message
    return str(error or "")


def _basis(run: RunRecord) -> tuple[str, ...]:
    return tuple(_basis_value(run, key) for key in BASIS_KEYS)


def _basis_value(run: RunRecord, key: str) -> str:
    """What a key means for the loss: a VAE of its own hides the model's source; only Huber's loss has a delta."""
    if key in ("model.source", "model.revision") and run.setting("model.vae.source") is not None:
        return ""
    if key == "objective.huber_delta" and run.setting("objective.loss") != "huber":
        return ""
    return as_yaml(run.setting(key))


def _place(row: PointResult) -> tuple[int, str, bool, float, int]:
    loss = row.run.validation_loss
    known = loss is not None and math.isfinite(loss)
    ordered = known and row.state in ("finished", "pruned")
    value = loss if ordered and loss is not None else 0.0
    return (RANK[row.state], row.group or "~", not known, value, row.index)


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"Z{number}"


def _as_texts(values: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()}


def _differing(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """Keys whose values differ between resolved configurations, without what only names or logs a run."""
    flat = [dict(_leaves(record.config)) for record in records if record.config]
    keys = dict.fromkeys(key for values in flat for key in values)
    return tuple(
        key
        for key in keys
        if not key.startswith(_NOT_COMPARED) and len({values.get(key) for values in flat}) > 1
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, as_yaml(value)
