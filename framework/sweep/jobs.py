"""What a sweep hands to its launchers and gets back: plain data, because a point may run on another machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PointState = Literal["waiting", "started", "finished", "failed", "pruned"]
"""Where a point of a sweep is. A stopped point is `started`: the same command goes on with it."""

OutcomeState = Literal["finished", "failed", "pruned", "stopped"]


@dataclass(frozen=True)
class PruningSpec:
    """How a running point finds out that it isn't worth going on with.

    journal: the study's journal file.   study: its name.   trial: number of the point's trial in it.
    metric: column of the run's metrics.csv that is judged; lower is better.
    settings: whatever else `framework.sweep.search.should_prune` needs; text, numbers and truth values only.
    """

    journal: str
    study: str
    trial: int
    metric: str = "val/loss"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One run of a sweep, as `sweep.json` keeps it.

    index: its number from 0.   name: of its folder, e.g. "00-precision-fp8-lr-1e-4"; it is its `run.name`.
    overrides: all overrides as typed, without `run.name` and `run.output_dir`.
    changes: what differs between the points, by dotted key, e.g. {"optim.lr": "1e-4"}.
    """

    index: int
    name: str
    overrides: tuple[str, ...]
    changes: Mapping[str, str]

    @property
    def title(self) -> str:
        """The changes as a person would type them."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


@dataclass(frozen=True)
class PointJob:
    """A point that is to be started now.

    pruning: asked every second while the point runs, if given; see `framework.sweep.search.should_prune`.
    """

    point: Point
    pruning: PruningSpec | None = None


@dataclass(frozen=True)
class JobOutcome:
    """How a point ended.

    state: `pruned` after a stop that `pruning` asked for, `stopped` after Ctrl+C or SIGTERM from outside.
    folder: of the point, `<sweep>/points/<name>`; the run folder is the newest number in it.
    summary: what `octavo train --summary` wrote (`val_loss`, `train_loss`, `seconds`, `run_dir` ...); empty where
    the process died before it could.   error: one sentence, "" unless `failed`.
    """

    point: Point
    state: OutcomeState
    folder: Path
    summary: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


Launch = Callable[[Sequence[PointJob]], "list[JobOutcome]"]
"""Run these points, as many at once as the launcher allows, and give their outcomes in the same order.

Raises KeyboardInterrupt when the sweep is stopped from outside; the points have ended by then.
"""
