"""Whether a running point is worth going on with, judged by its validation losses against those of earlier points.

Asked by the point's own job, on whatever machine that runs: the study's journal is a file that all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from framework.sweep.jobs import PruningSpec
from framework.sweep.results_read import curve_of

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.storages import JournalStorage


def should_prune(spec: PruningSpec, rows: Sequence[Mapping[str, str]]) -> bool:
    """Report the losses in `rows` that the study doesn't know yet; True as soon as one of them is reason to stop.

    rows: the run's metrics.csv so far.   The loss before the first step is the same for all points, and after the last
    step there is nothing left to save; both are left out. A loss that isn't a finite number is reason enough.
    spec.settings: `pruner`, `startup_trials`, `warmup_steps`, `reduction_factor` as in OptunaSweeper; `first_step`,
    where the first rung of `asha` is; `max_steps` of this point.
    """
    last = spec.settings["max_steps"]
    losses = [(step, loss) for step, loss in curve_of(rows, spec.metric) if 0 < step < last]
    if not losses:
        return False
    try:
        return _report(spec, losses)
    except (
        OSError
    ):  # a shared file system may be away for a moment; the next question opens the journal anew
        _open_trial.cache_clear()
        return False


def build_pruner(settings: Mapping[str, Any]) -> BasePruner:
    """Optuna's pruner of our settings."""
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    if settings["pruner"] == "median":
        return MedianPruner(
            n_startup_trials=settings["startup_trials"], n_warmup_steps=settings["warmup_steps"]
        )
    if settings["pruner"] == "asha":
        return SuccessiveHalvingPruner(
            min_resource=max(1, settings["warmup_steps"], settings["first_step"]),
            reduction_factor=settings["reduction_factor"],
        )
    return NopPruner()


def _report(spec: PruningSpec, losses: Sequence[tuple[int, float]]) -> bool:
    trial, reported = _open_trial(spec.journal, spec.study, spec.trial, _frozen(spec.settings))
    for step, loss in losses:
        if step in reported:
            continue
        trial.report(loss, step)
        reported.add(step)
        if not math.isfinite(loss) or trial.should_prune():
            return True
    return False


def open_journal(path: str) -> JournalStorage:
    """The storage in a journal file; made if it isn't there. Its lock works on network folders too."""
    from optuna.logging import WARNING, set_verbosity
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    set_verbosity(WARNING)
    return JournalStorage(JournalFileBackend(path))


def trial_of(study: Study, number: int) -> Trial:
    """The trial of a number, for reporting on it."""
    from optuna.trial import Trial

    frozen = next(t for t in study.get_trials(deepcopy=False) if t.number == number)
    return Trial(study, frozen._trial_id)


@lru_cache(maxsize=64)
def _open_trial(
    journal: str, study: str, number: int, settings: tuple[tuple[str, Any], ...]
) -> tuple[Trial, set[int]]:
    """The trial and the steps that it has reported, kept for the next time that it is asked for."""
    from optuna import load_study

    loaded = load_study(
        study_name=study, storage=open_journal(journal), pruner=build_pruner(dict(settings))
    )
    trial = trial_of(loaded, number)
    frozen = next(t for t in loaded.get_trials(deepcopy=False) if t.number == number)
    return trial, set(frozen.intermediate_values)


def _frozen(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(settings.items()))
