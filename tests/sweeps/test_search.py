"""A search with real runs: the bad point is really stopped before its last step."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import optuna
import pytest
import yaml

from framework.cli.main import main
from framework.schema.sweep import OptunaSweeper
from framework.sweep.results_read import read_metrics
from framework.sweep.search import _build_sampler
from tests.training.runs import change, run_values, write_pictures

GOOD, BAD = "1e-2", "1e-9"
STEPS = 120


def seed_that_draws(*wanted: str) -> int:
    """A seed for which the random sampler proposes these values of optim.lr in this order."""
    space = {"lr": optuna.distributions.CategoricalDistribution([GOOD, BAD])}
    for seed in range(200):
        settings = OptunaSweeper(sampler="random", seed=seed)
        study = optuna.create_study()
        drawn = []
        for number in range(len(wanted)):
            study.sampler = _build_sampler(settings, number, keys=1)
            drawn.append(study.ask(space).params["lr"])
        if drawn == list(wanted):
            return seed
    raise AssertionError("no such seed")


@pytest.mark.slow
def test_a_bad_point_is_stopped_early_and_the_best_is_told(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values = change(
        run_values(tiny_checkpoint, write_pictures(tmp_path / "pictures"), tmp_path),
        trainer__max_steps=STEPS,
        trainer__log_every_n_steps=10,
        checkpoint__every_n_steps=STEPS,
        validation={"fraction": 0.4, "every_n_steps": 2, "max_samples": 2, "sigmas": [0.5]},
    )
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "tiny.yaml").write_text("# @package _global_\n" + yaml.safe_dump(values))
    command = [
        "train",
        "-m",
        "recipe=tiny",
        f"optim.lr={GOOD},{BAD}",
        "hydra/sweeper=optuna",
        "hydra.sweeper.sampler=random",
        f"hydra.sweeper.seed={seed_that_draws(GOOD, BAD)}",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.startup_trials=1",
        "--config-dir",
        str(recipes),
    ]
    assert main(command) == 0

    sweep = tmp_path / "outputs" / "sweeps" / "tiny" / "001"
    rows = list(csv.DictReader((sweep / "results.csv").read_text().splitlines()))
    assert [(row["optim.lr"], row["state"]) for row in rows] == [
        (GOOD, "finished"),
        (BAD, "pruned"),
    ]
    pruned = sweep / rows[1]["run_folder"]
    assert int(read_metrics(pruned / "metrics.csv")[-1]["step"]) < STEPS
    assert not (pruned / "lora.safetensors").exists()
    assert int(rows[0]["steps"]) == STEPS
    assert json.loads((sweep / "search.json").read_text())["best_overrides"] == f"optim.lr={GOOD}"
    assert f"Best settings: optim.lr={GOOD}" in capfd.readouterr().out
