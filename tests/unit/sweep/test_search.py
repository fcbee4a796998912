"""The logic of a search, with points that only pretend to run: their loss is a function of their settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import optuna
import pytest
import yaml

from framework.compose import SweepRequest, read_sweep
from framework.errors import ConfigError
from framework.judge import Verdict, judge_points
from framework.schema.sweep import OptunaSweeper
from framework.sweep.check import check_sweep, corners
from framework.sweep.folder import SweepFolder
from framework.sweep.jobs import JobOutcome, PointJob
from framework.sweep.results import collect
from framework.sweep.results_read import read_metrics
from framework.sweep.search import SearchResult, run_search, should_prune
from framework.sweep.search_space import check_search, warn_search
from tests.training.runs import change, run_values, write_pictures
from tests.unit.sweep.folders import write_run

LR = "optim.lr=tag(log, interval(1e-4, 1e-1))"
RANK = "model.dit.lora.rank=2,4,8"
STEPS = 6


@pytest.fixture
def recipes(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with the recipe `tiny`: six steps, validated after each second one."""
    values = change(
        run_values(tiny_checkpoint, write_pictures(tmp_path / "pictures"), tmp_path),
        trainer__max_steps=STEPS,
        validation={"fraction": 0.4, "every_n_steps": 2},
    )
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny.yaml").write_text("# @package _global_\n" + yaml.safe_dump(values))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[SweepFolder]:
    folder = SweepFolder.claim(tmp_path / "sweeps" / "tiny", key="k")
    folder.describe(key="k", command=["octavo"], launcher="basic")
    yield folder
    folder.release()


class Points:
    """Stands in for a launcher. loss: of a point by (learning rate, step); may raise to fail the point."""

    def __init__(self, folder: SweepFolder, loss: Callable[[float, int], float]) -> None:
        self.folder = folder
        self.loss = loss
        self.batches: list[list[int]] = []
        self.last_steps: dict[int, int] = {}
        self.stop_at: int | None = None

    def __call__(self, jobs: Sequence[PointJob]) -> list[JobOutcome]:
        self.batches.append([job.point.index for job in jobs])
        return [self.run(job) for job in jobs]

    def run(self, job: PointJob) -> JobOutcome:
        point = job.point
        run = self.folder.point_folder(point) / "001"
        if point.index == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        losses: dict[int, float] = {0: 2.0}
        state, error = "finished", ""
        try:
            for step in range(2, STEPS + 1, 2):
                losses[step] = self.loss(float(point.changes.get("optim.lr", "1")), step)
                self.last_steps[point.index] = step
                write_run(run, losses=losses)
                if job.pruning is not None and should_prune(
                    job.pruning, read_metrics(run / "metrics.csv")
                ):
                    state = "pruned"
                    break
        except RuntimeError as failure:
            state, error = "failed", str(failure)
        self.folder.end_point(point, state, error=error)  # type: ignore[arg-type]
        folder = self.folder.point_folder(point)
        return JobOutcome(point, state, folder, error=error)  # type: ignore[arg-type]


def bowl(lr: float, step: int) -> float:
    """Best at a learning rate of 0.01, and better with each step."""
    return abs(math.log10(lr) + 2) + 1 / step


def request(recipes: Path, *overrides: str) -> SweepRequest:
    found = read_sweep(["recipe=tiny", *overrides], config_dir=recipes)
    assert found.faults == ()
    return found


def search(points: Points, recipes: Path, *overrides: str, **settings: int | str) -> SearchResult:
    ours = OptunaSweeper.model_validate({"n_trials": 8, "pruner": "none", **settings})
    asked = request(recipes, *(overrides or (LR, RANK)))
    return run_search(asked, ours, points.folder, points, config_dir=recipes)


def changes(sweep: SweepFolder) -> list[dict[str, str]]:
    return [dict(point.changes) for point in sweep.points()]


def test_a_search_finds_what_is_best_and_says_so(sweep: SweepFolder, recipes: Path) -> None:
    points = Points(sweep, bowl)
    result = search(points, recipes, n_trials=25)
    assert result.counts == {"finished": 25, "pruned": 0, "failed": 0}
    assert result.best is not None
    assert 10**-2.3 < float(result.best.changes["optim.lr"]) < 10**-1.7
    assert result.best_loss == min(row.run.validation_loss or 9 for row in collect(sweep.path))
    assert result.best_line.startswith("optim.lr=0.0")
    assert " model.dit.lora.rank=" in result.best_line
    assert result.importances["optim.lr"] > 0.8
    assert sum(result.importances.values()) == pytest.approx(1)
    told = json.loads((sweep.path / "search.json").read_text())
    assert told["best_overrides"] == result.best_line


def test_points_are_named_and_stay_inside_the_space(sweep: SweepFolder, recipes: Path) -> None:
    search(Points(sweep, bowl), recipes, "data.batch_size=range(1,8,2)", LR)
    found = sweep.points()
    assert [point.index for point in found] == list(range(8))
    for point in found:
        assert 1e-4 <= float(point.changes["optim.lr"]) <= 1e-1
        assert point.changes["data.batch_size"] in {"1", "3", "5", "7"}
        assert point.overrides[0] == "recipe=tiny"
        assert len(point.changes["optim.lr"]) <= 9  # four digits
        assert point.name.startswith(f"{point.index:02d}-batch-size-")
    assert len({point.changes["optim.lr"] for point in found}) == 8


def test_the_seed_decides_and_another_one_differs(recipes: Path, tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        folder = SweepFolder.claim(tmp_path / str(number), key="k")
        folder.describe(key="k", command=[], launcher="basic")
        search(Points(folder, bowl), recipes, n_trials=12, seed=seed)
        drawn.append(changes(folder))
        folder.release()
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_stopped_search_goes_on_as_if_it_had_not_been_stopped(
    sweep: SweepFolder, recipes: Path, tmp_path: Path, sampler: str
) -> None:
    whole = SweepFolder.claim(tmp_path / "whole", key="k")
    whole.describe(key="k", command=[], launcher="basic")
    search(Points(whole, bowl), recipes, n_trials=12, sampler=sampler)
    whole.release()

    points = Points(sweep, bowl)
    points.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        search(points, recipes, n_trials=12, sampler=sampler)
    assert len(sweep.points()) == 8
    points.batches.clear()
    result = search(points, recipes, n_trials=12, sampler=sampler)
    assert points.batches[0] == [7]  # the one that was running comes first, in its own folder
    assert result.counts["finished"] == 12
    assert changes(sweep) == changes(whole)


def test_a_longer_search_keeps_what_it_has(sweep: SweepFolder, recipes: Path) -> None:
    points = Points(sweep, bowl)
    search(points, recipes, n_trials=3)
    search(points, recipes, n_trials=5)
    assert points.batches == [[0], [1], [2], [3], [4]]


def test_points_come_in_batches(sweep: SweepFolder, recipes: Path) -> None:
    points = Points(sweep, bowl)
    search(points, recipes, n_trials=7, n_jobs=3)
    assert points.batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_failed_point_is_noted_and_the_search_goes_on(sweep: SweepFolder, recipes: Path) -> None:
    def fails_high(lr: float, step: int) -> float:
        if lr > 0.01:
            raise RuntimeError("memory is full")
        return bowl(lr, step)

    result = search(Points(sweep, fails_high), recipes, n_trials=10)
    assert result.counts["failed"] > 0
    assert result.counts["failed"] + result.counts["finished"] == 10
    assert result.best is not None
    assert float(result.best.changes["optim.lr"]) <= 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pruner", ["none", "median"])
def test_a_loss_that_is_no_number_fails_the_point_with_the_reason(
    sweep: SweepFolder, recipes: Path, value: float, pruner: str
) -> None:
    result = search(Points(sweep, lambda lr, step: value), recipes, n_trials=2, pruner=pruner)
    assert result.counts == {"finished": 0, "pruned": 0, "failed": 2}
    assert result.best is None
    assert {row.state for row in collect(sweep.path)} == {"failed"}
    assert {row.reason for row in collect(sweep.path)} == {f"the validation loss is {value:g}"}


def test_a_run_without_a_loss_is_a_failure(sweep: SweepFolder, recipes: Path) -> None:
    points = Points(sweep, bowl)

    def without_loss(job: PointJob) -> JobOutcome:
        return JobOutcome(job.point, "finished", sweep.point_folder(job.point))

    points.run = without_loss  # type: ignore[method-assign]
    assert search(points, recipes, n_trials=1).counts["failed"] == 1
    assert collect(sweep.path)[0].reason == "the run reported no validation loss"


def test_a_point_that_is_ended_again_and_again_is_given_up(
    sweep: SweepFolder, recipes: Path
) -> None:
    points = Points(sweep, bowl)
    run = points.run

    def ended(job: PointJob) -> JobOutcome:
        if job.point.index == 0:
            return JobOutcome(job.point, "stopped", sweep.point_folder(job.point))
        return run(job)

    points.run = ended  # type: ignore[method-assign]
    result = search(points, recipes, n_trials=2)
    assert points.batches == [[0], [0], [0], [1]]
    assert result.counts == {"finished": 1, "pruned": 0, "failed": 1}


def test_a_few_points_say_nothing_about_what_mattered(sweep: SweepFolder, recipes: Path) -> None:
    assert search(Points(sweep, bowl), recipes, n_trials=9).importances == {}


def test_the_median_pruner_stops_a_bad_point_before_its_end(
    sweep: SweepFolder, recipes: Path
) -> None:
    points = Points(sweep, bowl)
    result = search(points, recipes, n_trials=14, pruner="median", startup_trials=4)
    assert result.counts["pruned"] > 0
    assert all(points.last_steps[number] == STEPS for number in range(4))
    for row in collect(sweep.path):
        assert (row.state == "pruned") == (points.last_steps[row.index] < STEPS)


def test_asha_keeps_the_best_share_of_each_rung(sweep: SweepFolder, recipes: Path) -> None:
    points = Points(sweep, bowl)
    result = search(
        points, recipes, n_trials=14, pruner="asha", reduction_factor=2, sampler="random"
    )
    assert result.counts["pruned"] > result.counts["finished"] > 0
    assert min(points.last_steps.values()) == 2  # the first rung: the first validation
    assert result.best is not None


def test_no_point_is_stopped_while_warming_up(sweep: SweepFolder, recipes: Path) -> None:
    points = Points(sweep, bowl)
    search(points, recipes, n_trials=12, pruner="median", startup_trials=1, warmup_steps=4)
    assert 2 not in points.last_steps.values()
    assert 4 in points.last_steps.values()


def test_a_journal_that_is_away_for_a_moment_stops_no_point(
    sweep: SweepFolder, recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    report = optuna.trial.Trial.report

    def away_at_first(trial: optuna.trial.Trial, value: float, step: int) -> None:
        calls.append(step)
        if len(calls) == 1:
            raise OSError("stale file handle")
        report(trial, value, step)

    monkeypatch.setattr(optuna.trial.Trial, "report", away_at_first)
    points = Points(sweep, bowl)
    result = search(points, recipes, n_trials=1, pruner="median", startup_trials=0)
    assert result.counts["finished"] == 1
    assert calls == [2, 2, 4]


def test_a_point_that_can_not_be_composed_fails_before_it_starts(
    sweep: SweepFolder, recipes: Path
) -> None:
    points = Points(sweep, bowl)
    result = search(points, recipes, "trainer.seed=interval(1, 9)", n_trials=2)
    assert points.batches == []
    assert result.counts["failed"] == 2
    assert "trainer.seed" in collect(sweep.path)[0].reason


# ---- before the first point ----------------------------------------------------------------------


def judged(asked: SweepRequest, recipes: Path) -> list[Verdict]:
    return judge_points(corners(asked), use="train", config_dir=recipes, files="need")


@pytest.mark.parametrize(
    ("overrides", "path", "phrase"),
    [
        ([LR, "validation.fraction=0"], "validation.fraction", "compares its points by"),
        (["validation.seed=1,2"], "validation.seed", "different from point to point"),
        (["data.max_aspect_ratio=interval(1, 3)"], "data.max_aspect_ratio", "can't be compared"),
        ([LR, "logger.csv=false"], "logger.csv", "metrics.csv"),
    ],
)
def test_a_search_that_can_not_tell_good_from_bad_is_refused(
    recipes: Path, overrides: list[str], path: str, phrase: str
) -> None:
    asked = request(recipes, *overrides)
    faults = check_search(asked, OptunaSweeper(), judged(asked, recipes))
    assert [fault.path for fault in faults] == [path]
    assert phrase in faults[0].message
    assert faults[0].where.startswith("command line: ")
    assert faults[0].hint.endswith(".")


def test_fractions_for_a_key_of_whole_numbers_are_refused_in_the_words_that_were_typed(
    recipes: Path,
) -> None:
    asked = request(recipes, "trainer.seed=interval(1, 9)", "hydra/sweeper=optuna")
    with pytest.raises(ConfigError, match="1 fault") as caught:
        check_sweep(asked, config_dir=recipes)
    (fault,) = caught.value.faults
    assert (fault.path, fault.code) == ("trainer.seed", "wrong-type")
    assert fault.where == "command line: trainer.seed=interval(1, 9)"
    assert fault.hint == "Write 'trainer.seed=int(interval(1, 9))'."
    whole = request(recipes, "trainer.seed=int(interval(1, 9))", "hydra/sweeper=optuna")
    assert check_sweep(whole, config_dir=recipes).count == 20


def test_a_sound_search_has_no_faults_and_no_warnings(recipes: Path) -> None:
    asked = request(recipes, LR, RANK)
    verdicts = judged(asked, recipes)
    assert check_search(asked, OptunaSweeper(), verdicts) == []
    assert warn_search(OptunaSweeper(), verdicts) == []


def test_a_pruner_with_nothing_to_judge_by_is_warned_of(recipes: Path) -> None:
    asked = request(recipes, LR, "validation.every_n_steps=6")
    verdicts = judged(asked, recipes)
    (warning,) = warn_search(OptunaSweeper(), verdicts)
    assert warning.path == "validation.every_n_steps"
    assert "no point can be stopped before its end" in warning.message
    assert warn_search(OptunaSweeper(pruner="none"), verdicts) == []
