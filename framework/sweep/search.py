"""A search for the point with the lowest validation loss: Optuna proposes, any launcher runs, the journal remembers.

What a point is judged by is its last validation loss: that of the weights which the run saves. The lowest one on the
way would reward a state that isn't kept.

Every draw depends on (seed, number of the trial, results so far) alone. With `n_jobs: 1` a search that was stopped and
gone on with therefore tries the same points as one that wasn't.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from framework.atomic import write_text
from framework.compose import SweepRequest
from framework.judge import judge_points
from framework.schema.run import RunConfig
from framework.schema.sweep import OptunaSweeper
from framework.sweep.folder import SweepFolder, point_name
from framework.sweep.jobs import JobOutcome, Launch, Point, PointJob, PruningSpec
from framework.sweep.pruning import open_journal, should_prune, trial_of
from framework.sweep.results_read import as_number, newest_run, read_run
from framework.sweep.search_report import SEARCH_FILE
from framework.sweep.search_space import build_space, draw_overrides

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

__all__ = ["SearchResult", "run_search", "should_prune"]

STUDY_FILE = "study.log"
_STUDY = "octavo"
_METRIC = "val/loss"
# Points drawn at random before tpe has something to learn from: two per key, at least five. A guess.
_MIN_RANDOM = 5
_RANDOM_PER_KEY = 2
_VERSION = 1
# Fewer finished points say nothing about which key mattered. A guess.
_MIN_FOR_IMPORTANCE = 10
# A point that is ended from outside goes on at once; one that is ended so often won't get far.
_MAX_STOPS = 3


@dataclass(frozen=True)
class SearchResult:
    """What a search has come to.

    counts: trials by state: finished, pruned, failed.
    best: the point with the lowest last validation loss; None where no trial finished.
    importances: share of each key in how much the loss varied, adding up to 1; empty with fewer than ten finished.
    """

    counts: Mapping[str, int]
    best: Point | None = None
    best_loss: float | None = None
    importances: Mapping[str, float] = field(default_factory=dict)

    @property
    def best_line(self) -> str:
        """The best values as overrides, ready to paste behind a command; "" where there is no best point."""
        return self.best.title if self.best is not None else ""


def run_search(
    request: SweepRequest,
    settings: OptunaSweeper,
    folder: SweepFolder,
    launch: Launch,
    *,
    config_dir: Path | None = None,
) -> SearchResult:
    """Run trials until there are `settings.n_trials`, each as a point of the sweep in `folder`.

    Trials that a stopped search left running are run again first, in their own folders. A trial that fails is noted and
    the search goes on. Raises KeyboardInterrupt when `launch` does; the same search can be gone on with.
    """
    search = _Search(request, settings, folder, config_dir)
    while True:
        points = search.next_points()
        if not points:
            break
        folder.add_points(point for point, _ in points)
        jobs = [
            PointJob(point, search.pruning(point, config))
            for point, config in points
            if config is not None
        ]
        for outcome in launch(jobs) if jobs else []:
            search.tell(outcome)
    return search.result()


class _Search:
    """One study and what its trials mean as points."""

    def __init__(
        self,
        request: SweepRequest,
        settings: OptunaSweeper,
        folder: SweepFolder,
        config_dir: Path | None,
    ) -> None:
        from optuna import create_study

        self._request = request
        self._settings = settings
        self._folder = folder
        self._config_dir = config_dir
        self._journal = str((folder.path / STUDY_FILE).absolute())
        self._stops: Counter[int] = Counter()
        self._space = build_space(request.dimensions)
        self._study = create_study(
            study_name=_STUDY,
            storage=open_journal(self._journal),
            direction="minimize",
            load_if_exists=True,
        )

    def next_points(self) -> list[tuple[Point, RunConfig | None]]:
        """The next batch: interrupted trials, else new ones; empty when all are done.

        A point without a configuration was refused; its trial has been told so.
        """
        trials = [t for t in self._trials() if not t.state.is_finished()]
        if not trials:
            left = self._settings.n_trials - len(self._trials())
            trials = [self._ask() for _ in range(min(self._settings.n_jobs, left))]
        points = [self._point(trial) for trial in trials]
        verdicts = judge_points(
            [point.overrides for point in points],
            use="train",
            config_dir=self._config_dir,
            files="need",
        )
        for point, verdict in zip(points, verdicts, strict=True):
            if verdict.config is None:
                fault = verdict.faults[0]
                self._fail(point, f"{fault.path}: {fault.message}".lstrip(": "))
        return [(p, v.config) for p, v in zip(points, verdicts, strict=True)]

    def pruning(self, point: Point, config: RunConfig) -> PruningSpec | None:
        """How the point's job asks whether to go on; None without a pruner."""
        ours = self._settings
        if ours.pruner == "none":
            return None
        settings = {
            "pruner": ours.pruner,
            "startup_trials": ours.startup_trials,
            "warmup_steps": ours.warmup_steps,
            "reduction_factor": ours.reduction_factor,
            "first_step": config.validation.every_n_steps,
            "max_steps": config.trainer.max_steps,
        }
        return PruningSpec(self._journal, _STUDY, point.index, _METRIC, settings)

    def tell(self, outcome: JobOutcome) -> None:
        """Note how a trial ended; one that was stopped from outside stays open, and is gone on with next."""
        from optuna.trial import TrialState

        number, steps = outcome.point.index, self._intermediate(outcome.point.index)
        if outcome.state == "failed":
            self._fail(outcome.point, outcome.error, noted=True)
        elif outcome.state == "pruned":
            if steps and not math.isfinite(steps[max(steps)]):
                self._fail(outcome.point, f"the validation loss is {steps[max(steps)]:g}")
            else:
                self._study.tell(number, state=TrialState.PRUNED)
        elif outcome.state == "stopped":
            self._stops[number] += 1
            if self._stops[number] >= _MAX_STOPS:
                self._fail(outcome.point, f"it was ended from outside {_MAX_STOPS} times")
        else:
            loss = _last_loss(outcome)
            if loss is None:
                self._fail(outcome.point, "the run reported no validation loss")
            elif not math.isfinite(loss):
                self._fail(outcome.point, f"the validation loss is {loss:g}")
            else:
                self._study.tell(number, loss)

    def result(self) -> SearchResult:
        """The best point and what mattered, also written to search.json."""
        from optuna.trial import TrialState

        names = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        states = [trial.state for trial in self._trials()]
        counts = {name: states.count(state) for name, state in names.items()}
        counts["failed"] = states.count(TrialState.FAIL)
        result = SearchResult(counts)
        if counts["finished"]:
            best = self._study.best_trial
            assert best.value is not None
            result = SearchResult(counts, self._point(best), best.value, self._importances())
        content = {
            "version": _VERSION,
            "counts": counts,
            "best_point": result.best.index if result.best else None,
            "best_validation_loss": result.best_loss,
            "best_overrides": result.best_line,
            "importances": dict(result.importances),
        }
        write_text(self._folder.path / SEARCH_FILE, json.dumps(content, indent=2) + "\n")
        return result

    # ---- trials ----------------------------------------------------------------------------------

    def _trials(self) -> Sequence[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _ask(self) -> FrozenTrial:
        """Draw the next trial."""
        number = len(self._trials())
        self._study.sampler = _build_sampler(self._settings, number, keys=len(self._space))
        trial = self._study.ask(fixed_distributions=self._space)
        return next(t for t in self._trials() if t.number == trial.number)

    def _point(self, trial: FrozenTrial) -> Point:
        """The point of a trial: as it stands in the sweep already, or what its values mean."""
        for point in self._folder.points():
            if point.index == trial.number:
                return point
        overrides, changes = draw_overrides(self._request.dimensions, trial.params)
        name = point_name(trial.number, changes, count=self._settings.n_trials)
        return Point(trial.number, name, (*self._request.base, *overrides), changes)

    def _fail(self, point: Point, reason: str, *, noted: bool = False) -> None:
        """Note a failed trial with its reason. noted: the point's folder says it already."""
        from optuna.trial import TrialState

        trial_of(self._study, point.index).set_user_attr("reason", reason)
        self._study.tell(point.index, state=TrialState.FAIL)
        if not noted:
            self._folder.end_point(point, "failed", error=reason)

    def _intermediate(self, number: int) -> Mapping[int, float]:
        return next(t.intermediate_values for t in self._trials() if t.number == number)

    def _importances(self) -> dict[str, float]:
        return _importances(self._study, self._trials())


def _importances(study: Study, trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """By Optuna's own measure (PED-ANOVA, arXiv:2304.10255); empty where there is too little to tell."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    values = [t.value for t in trials if t.state == TrialState.COMPLETE]
    keys = {key for t in trials for key in t.params}
    if len(values) < _MIN_FOR_IMPORTANCE or len(set(values)) < 2 or len(keys) < 2:
        return {}
    try:
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (RuntimeError, ValueError):  # too few trials for it, or a key that never changed
        return {}
    return {key: share for key, share in found.items() if math.isfinite(share)}


def _build_sampler(settings: OptunaSweeper, number: int, *, keys: int) -> BaseSampler:
    """The sampler of one trial, seeded by its number so that no state must be kept between trials."""
    from optuna.samplers import RandomSampler, TPESampler

    digest = hashlib.sha256(f"search {settings.seed} {number}".encode()).digest()
    seed = int.from_bytes(digest[:4])
    if settings.sampler == "random":
        return RandomSampler(seed=seed)
    startup = max(_MIN_RANDOM, _RANDOM_PER_KEY * keys)
    # Several trials at once: those still running count as bad, so that the next ones are drawn elsewhere.
    return TPESampler(n_startup_trials=startup, seed=seed, multivariate=True, constant_liar=True)


def _last_loss(outcome: JobOutcome) -> float | None:
    """The last validation loss of a finished run: what it reported, or else what its metrics say."""
    told = as_number(outcome.summary.get("val_loss"))
    if told is not None:
        return told
    run = newest_run(outcome.folder)
    return read_run(run).validation_loss if run is not None else None
