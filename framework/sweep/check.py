"""Judges a whole sweep before its first point starts: settings, every point, and whether this machine can run it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import ConfigError, Fault
from framework.judge import Verdict, judge_points
from framework.schema.run import RunConfig
from framework.schema.sweep import (
    LAUNCHERS,
    SWEEPERS,
    BasicLauncher,
    OptunaSweeper,
    SweepSettings,
)
from framework.schema.validate import judge_section
from framework.sweep.folder import SWEEPS_FOLDER, point_name, sweep_key, sweep_name
from framework.sweep.jobs import Point
from framework.sweep.launchers import PointNeeds
from framework.sweep.machines import deal_gpus, machine_faults, needs_of
from framework.sweep.search_space import check_search, warn_search

if TYPE_CHECKING:
    from framework.compose import Dimension, SweepRequest

_MANY_POINTS = 1000
_MAX_CORNERS = 64
_INSIDE = 0.381966
_TOLD_POINTS = 3


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep that may start.

    points: all of a grid; empty for a search, which chooses them as it goes.   count: how many there will be.
    parent: folder of all sweeps of this name.   key: of what it computes.   anew: never go on with an earlier one.
    gpus, shared_gpus: see `JobSettings`.
    """

    settings: SweepSettings
    points: tuple[Point, ...]
    count: int
    parent: Path
    key: str
    anew: bool
    needs: PointNeeds
    gpus: tuple[str, ...] = ()
    shared_gpus: str = ""
    warnings: tuple[Fault, ...] = ()


def check_sweep(
    request: SweepRequest,
    *,
    config_dir: Path | None = None,
    on_judged: Callable[[Verdict], None] | None = None,
) -> CheckedSweep:
    """Judge everything and return what is to be run. Raises ConfigError with every fault, each told once.

    on_judged: called after each point, e.g. to move a progress bar.   Writes nothing and starts nothing.
    """
    settings, faults = judge_settings(request)
    faults = [*request.faults, *faults]
    search = request.settings["sweeper"].get("name") == OptunaSweeper().name
    faults += _dimension_faults(request, search=search)
    if any(fault.path in _keys_of(request) or not fault.path for fault in faults):
        raise ConfigError(faults)  # without sound dimensions there are no points to judge
    points = [] if search else grid_points(request)
    lines = corners(request) if search else [point.overrides for point in points]
    verdicts = judge_points(
        lines, use="train", config_dir=config_dir, files="need", on_judged=on_judged
    )
    faults += told_once([(verdict.overrides, verdict.faults) for verdict in verdicts], request)
    configs = [verdict.config for verdict in verdicts if verdict.config is not None]
    if settings is not None:
        faults += machine_faults(settings, [v for v in verdicts if v.config is not None], request)
        if isinstance(settings.sweeper, OptunaSweeper):
            found = _search_faults(settings, settings.sweeper, verdicts, request)
            told = {(fault.path, fault.code) for fault in found}
            faults = [fault for fault in faults if (fault.path, fault.code) not in told] + found
    if faults or settings is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    warnings = told_once([(verdict.overrides, verdict.warnings) for verdict in verdicts], request)
    warnings += _size_warnings(configs, points)
    sweeper = settings.sweeper
    if isinstance(sweeper, OptunaSweeper):
        warnings += warn_search(sweeper, verdicts)
    more = [d.line for d in request.dimensions] if search else []
    groups, shared = deal_gpus(settings, configs)
    return CheckedSweep(
        settings=settings,
        points=tuple(points),
        count=sweeper.n_trials if isinstance(sweeper, OptunaSweeper) else len(points),
        parent=Path(configs[0].run.output_dir).expanduser().absolute()
        / SWEEPS_FOLDER
        / sweep_name(configs),
        key=sweep_key(configs, more, *_search_key(settings)),
        anew=all(config.checkpoint.resume == "never" for config in configs),
        needs=needs_of(configs[0]),
        gpus=groups,
        shared_gpus=shared,
        warnings=tuple(warnings),
    )


def judge_settings(request: SweepRequest) -> tuple[SweepSettings | None, list[Fault]]:
    """The launcher's and the sweeper's settings, each judged by the section of its name."""
    sections, faults = [], []
    for kind, classes in (("launcher", LAUNCHERS), ("sweeper", SWEEPERS)):
        values = request.settings[kind]
        section = classes.get(str(values.get("name")))
        if section is None:  # the request has a fault that says so
            continue
        judged, found = judge_section(section, values, request.where, prefix=f"hydra.{kind}")
        faults += found
        if judged is not None:
            sections.append(judged)
    if len(sections) < 2:
        return None, faults
    return SweepSettings(launcher=sections[0], sweeper=sections[1]), faults


# ---- points --------------------------------------------------------------------------------------


def grid_points(request: SweepRequest) -> list[Point]:
    """Every combination, the last dimension fastest, each with a name of its own."""
    lines = request.points()
    choices = itertools.product(*(dimension.choices or () for dimension in request.dimensions))
    return [
        build_point(index, overrides, chosen, request.dimensions, count=len(lines))
        for index, (overrides, chosen) in enumerate(zip(lines, choices, strict=True))
    ]


def build_point(
    index: int,
    overrides: Sequence[str],
    chosen: Sequence[str],
    dimensions: Sequence[Dimension],
    *,
    count: int,
) -> Point:
    """A point of a sweep.   overrides: all of them.   chosen: "key=value" for each dimension.   count: of points."""
    changes = {
        dimension.key: text.partition("=")[2]
        for dimension, text in zip(dimensions, chosen, strict=True)
    }
    return Point(index, point_name(index, changes, count=count), tuple(overrides), changes)


def corners(request: SweepRequest) -> list[tuple[str, ...]]:
    """What of a search can be judged before it begins: its extremes, or each of them alone where they are many."""
    ends = [dimension.choices or _interval_ends(dimension) for dimension in request.dimensions]
    combinations = list(itertools.islice(itertools.product(*ends), _MAX_CORNERS + 1))
    if len(combinations) > _MAX_CORNERS:
        first = [values[0] for values in ends]
        combinations = [
            (*first[:place], value, *first[place + 1 :])
            for place, values in enumerate(ends)
            for value in values
        ]
    return [(*request.base, *chosen) for chosen in dict.fromkeys(combinations)]


def _interval_ends(dimension: Dimension) -> tuple[str, ...]:
    assert dimension.interval is not None
    low, high = dimension.interval
    if dimension.whole:
        return tuple(f"{dimension.key}={int(end)}" for end in dimension.interval)
    numbers = [low, high]
    if low.is_integer() and high.is_integer():
        # A number inside shows whether the key takes fractions, too.
        numbers.insert(1, low + _INSIDE * (high - low))
    return tuple(f"{dimension.key}={number!r}" for number in numbers)


# ---- faults --------------------------------------------------------------------------------------


def told_once(
    found: Sequence[tuple[Sequence[str], Iterable[Fault]]], request: SweepRequest
) -> list[Fault]:
    """Each fault of any point once, with the points that have it where not all do.   found: (overrides, faults)."""
    owners: dict[Fault, list[int]] = {}
    for index, (_, faults) in enumerate(found):
        for fault in faults:
            owners.setdefault(fault, []).append(index)
    swept = {choice for dimension in request.dimensions for choice in dimension.choices or ()}
    told = []
    for fault, indices in owners.items():
        culprit = fault.where.removeprefix("command line: ")
        with_culprit = [i for i, (overrides, _) in enumerate(found) if culprit in overrides]
        if len(indices) < len(found) and not (culprit in swept and indices == with_culprit):
            titles = [
                f"{index + 1} ({' '.join(line for line in found[index][0] if line in swept)})"
                for index in indices
            ]
            more = f" and {len(titles) - _TOLD_POINTS} more" if len(titles) > _TOLD_POINTS else ""
            points = f"point{'s' if len(titles) > 1 else ''} {', '.join(titles[:_TOLD_POINTS])}"
            where = f"{fault.where}; " if fault.where else ""
            fault = replace(fault, where=f"{where}{points}{more} of {len(found)}")
        told.append(fault)
    return told


def _keys_of(request: SweepRequest) -> set[str]:
    return {dimension.key for dimension in request.dimensions}


def _dimension_faults(request: SweepRequest, *, search: bool) -> list[Fault]:
    faults = []
    for dimension in request.dimensions:
        key, where = dimension.key, f"command line: {dimension.line}"
        if dimension.interval is not None and not search:
            message = "an interval is searched, not run through"
            low, high = dimension.interval
            hint = f"Set hydra/sweeper=optuna, or give values: {key}={low:g},{high:g}."
            faults.append(Fault(key, message, where, hint=hint, code="rule"))
        elif dimension.interval is None and not dimension.choices:
            message = "matches nothing, so that the sweep has no points"
            faults.append(Fault(key, message, where, hint="Correct the pattern.", code="rule"))
    if search and not request.dimensions:
        message = "a search needs a key that it may choose a value for"
        hint = "Give one, e.g. 'optim.lr=tag(log, interval(1e-5, 1e-3))'."
        faults.append(Fault("", message, hint=hint, code="rule"))
    return faults


def _search_faults(
    settings: SweepSettings,
    sweeper: OptunaSweeper,
    verdicts: Sequence[Verdict],
    request: SweepRequest,
) -> list[Fault]:
    faults = check_search(request, sweeper, verdicts)
    where = "command line: hydra/sweeper=optuna"
    if importlib.util.find_spec("optuna") is None:
        message = "a search needs the package optuna, which isn't installed"
        hint = "Run `pip install octavo[optuna]`."
        faults.append(Fault("hydra.sweeper", message, where, hint=hint))
    if sweeper.n_jobs > 1 and isinstance(settings.launcher, BasicLauncher):
        key = "hydra.sweeper.n_jobs"
        message = (
            f"{sweeper.n_jobs} points can't run at once: the launcher 'basic' runs one at a time"
        )
        hint = "Set hydra/launcher=joblib, or hydra.sweeper.n_jobs=1."
        faults.append(Fault(key, message, request.where(key), hint=hint, code="rule"))
    return faults


def _search_key(settings: SweepSettings) -> list[object]:
    """What of a search decides which points it chooses; a longer one goes on with a shorter one."""
    if not isinstance(settings.sweeper, OptunaSweeper):
        return []
    return [settings.sweeper.model_dump(exclude={"n_trials", "n_jobs"})]


def _size_warnings(configs: Sequence[RunConfig], points: Sequence[Point]) -> list[Fault]:
    warnings = []
    if len(points) > _MANY_POINTS:
        message = f"the sweep has {len(points)} points"
        hint = "A search needs fewer: hydra/sweeper=optuna."
        warnings.append(Fault("", message, hint=hint, code="unusual"))
    first: dict[str, Point] = {}
    for config, point in zip(configs, points, strict=False):
        same = first.setdefault(sweep_key([config]), point)
        if same is not point:
            message = f"points {same.index + 1} and {point.index + 1} are the same run"
            where = f"command line: {point.title}" if point.changes else ""
            hint = "Leave out one of the two values."
            warnings.append(Fault("", message, where, hint=hint, code="unusual"))
    return warnings
