"""Reads what a run has left in its folder, whatever state it is in: nothing is guessed, nothing missing is an error."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

SUMMARY_FILE = "summary.json"
SHEET_FILE = "samples.png"
Curve = tuple[tuple[int, float], ...]
"""(step, loss) in order of steps."""
MemoryOf = Literal["", "device", "process"]
TimeCovers = Literal["", "run", "last session", "steps"]
_STEP_FOLDER = "step-"
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says; None and empty where it doesn't say it.

    folder: None where the run has none yet.   config: the resolved configuration.
    validation, train: the loss curves; a loss that isn't finite stays in them.
    validation_loss: the last one, at `validation_step`.   best_validation_loss: the lowest, at `best_validation_step`.
    seconds: see `time_covers`: "run" is all sessions of the run from start to end, "last session" the one that ended
    last, "steps" the optimizer steps alone (no validation, samples or loading).
    seconds_per_step: median of the logged means.
    peak_memory_bytes: the most that any session held; `memory_of` says of what.
    pictures: files of the last sampled step, one per prompt in `prompts`.
    """

    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    steps: int | None = None
    max_steps: int | None = None
    validation: Curve = ()
    train: Curve = ()
    seconds: float | None = None
    time_covers: TimeCovers = ""
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    memory_of: MemoryOf = ""
    sheet: Path | None = None
    lora: Path | None = None
    trained_model: Path | None = None
    prompts: tuple[str, ...] = ()
    pictures: tuple[Path, ...] = ()
    pictures_step: int | None = None

    @property
    def validation_loss(self) -> float | None:
        """The last validation loss."""
        return self.validation[-1][1] if self.validation else None

    @property
    def validation_step(self) -> int | None:
        """The step of the last validation loss."""
        return self.validation[-1][0] if self.validation else None

    @property
    def best_validation(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest finite validation loss."""
        finite = [(loss, step) for step, loss in self.validation if math.isfinite(loss)]
        return min(finite)[::-1] if finite else None

    @property
    def train_loss(self) -> float | None:
        """The last logged training loss."""
        return self.train[-1][1] if self.train else None

    def setting(self, path: str) -> Any:
        """Value of a dotted key of the resolved configuration; None where there is none."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def read_run(folder: Path, *, summary: Mapping[str, Any] | None = None) -> RunRecord:
    """Read a run's folder. summary: what `octavo train --summary` wrote of this run's last session, if it did."""
    config = read_yaml(folder / "config.yaml")
    state = read_json(folder / "run.json")
    rows = read_metrics(folder / "metrics.csv")
    prompts = _texts(_nested(config, "sample", "prompts"))
    step, pictures = _last_pictures(folder, len(prompts))
    seconds, covers = _seconds(state, summary or {}, rows)
    memory = [m for m in (_whole(row.get("peak_memory_bytes")) for row in rows) if m]
    memory += [m for m in (_whole((summary or {}).get("peak_memory_bytes")),) if m]
    return RunRecord(
        folder=folder,
        config=config,
        state=str(state.get("state", "")),
        steps=_last_step(state, rows),
        max_steps=_whole(_nested(config, "trainer", "max_steps")),
        validation=curve_of(rows, "val/loss"),
        train=curve_of(rows, "train/loss"),
        seconds=seconds,
        time_covers=covers,
        seconds_per_step=_median([v for _, v in curve_of(rows, "step_seconds")]),
        peak_memory_bytes=max(memory, default=None),
        memory_of=_memory_of(read_json(folder / "plan.json")) if memory else "",
        sheet=_existing(folder / SHEET_FILE),
        lora=_existing(folder / "lora.safetensors"),
        trained_model=_existing(folder / "model"),
        prompts=prompts,
        pictures=pictures,
        pictures_step=step,
    )


def newest_run(parent: Path) -> Path | None:
    """The run folder with the highest number in `parent`; None where there is none."""
    try:
        numbered = [path for path in parent.iterdir() if path.name.isdecimal() and path.is_dir()]
    except OSError:
        return None
    return max(numbered, key=lambda path: int(path.name), default=None)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Whole rows of a metrics.csv, also while a run writes it; empty where there is none.

    A last line that is just being written, a row of another length and one without a step are left out.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    whole = io.StringIO(text[: text.rfind("\n") + 1])
    rows = []
    try:
        for row in csv.DictReader(whole):
            if None not in row and None not in row.values() and _whole(row.get("step")) is not None:
                rows.append(row)
    except csv.Error:
        pass  # what stands before the unreadable part is still true
    return rows


def curve_of(rows: Sequence[Mapping[str, str]], column: str) -> Curve:
    """(step, value) of each row that has a value in `column`; NaN and infinity are kept."""
    points = [(_whole(row["step"]), as_number(row.get(column))) for row in rows]
    return tuple((step, value) for step, value in points if step is not None and value is not None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, half written or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; empty where the file is missing or unreadable."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _seconds(
    state: Mapping[str, Any], summary: Mapping[str, Any], rows: Sequence[Mapping[str, str]]
) -> tuple[float | None, TimeCovers]:
    """How long the run took: the sum over its sessions, or what is known of it.

    run.json's `seconds` adds up all sessions. Without it, a summary speaks for a run that was never stopped; else the
    logged time of the optimizer steps, which is in metrics.csv for all sessions, is what can be said.
    """
    total = as_number(state.get("seconds"))
    if total is not None:
        return total, "run"
    last = as_number(summary.get("seconds"))
    if last is not None and state.get("created") == state.get("started"):
        return last, "run"
    in_steps, before = 0.0, 0
    times = curve_of(rows, "step_seconds")
    for step, mean in times:
        in_steps += mean * (step - before)
        before = step
    if times:
        return in_steps, "steps"
    return (last, "last session") if last is not None else (None, "")


def _last_step(state: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> int | None:
    steps = [_whole(row["step"]) for row in rows] + [_whole(state.get("step"))]
    return max((step for step in steps if step is not None), default=None)


def _memory_of(plan: Mapping[str, Any]) -> MemoryOf:
    device = str(plan.get("device", ""))
    if not device:
        return ""
    return "process" if device.startswith("cpu") else "device"


def _last_pictures(folder: Path, count: int) -> tuple[int | None, tuple[Path, ...]]:
    """The last sampled step that has a picture for every prompt."""
    best: tuple[int | None, tuple[Path, ...]] = (None, ())
    for path in (folder / "samples").glob(f"{_STEP_FOLDER}*"):
        step = _whole(path.name.removeprefix(_STEP_FOLDER))
        pictures = tuple(path / f"{index:02d}.png" for index in range(count))
        newer = step is not None and (best[0] is None or step > best[0])
        if newer and count and all(picture.is_file() for picture in pictures):
            best = (step, pictures)
    return best


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _nested(values: Mapping[str, Any], *names: str) -> Any:
    found: Any = values
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def as_number(value: Any) -> float | None:
    """A number, NaN and infinity among them; None for what is none."""
    if isinstance(value, bool) or value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _whole(value: Any) -> int | None:
    number = as_number(value)
    return int(number) if number is not None and math.isfinite(number) else None


def _median(values: Sequence[float]) -> float | None:
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return None
    middle = len(finite) // 2
    return finite[middle] if len(finite) % 2 else (finite[middle - 1] + finite[middle]) / 2
