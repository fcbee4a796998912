from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from framework.compose import read_sweep
from framework.errors import ConfigError, Fault
from framework.sweep import machines
from framework.sweep.check import CheckedSweep, check_sweep, corners
from tests.training.runs import change, run_values, write_pictures


@pytest.fixture
def recipes(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipe `tiny`; no GPU is seen."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values = run_values(tiny_checkpoint, write_pictures(tmp_path / "pictures"), tmp_path)
    values = change(values, validation={"fraction": 0.4, "every_n_steps": 1}, data__max_px=4096)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


def check(recipes: Path, *overrides: str) -> CheckedSweep:
    request = read_sweep(["recipe=tiny", *overrides], config_dir=recipes)
    return check_sweep(request, config_dir=recipes)


def faults(recipes: Path, *overrides: str) -> list[Fault]:
    with pytest.raises(ConfigError, match="in the configuration") as caught:
        check(recipes, *overrides)
    return list(caught.value.faults)


def test_the_product_becomes_named_points(recipes: Path, tmp_path: Path) -> None:
    sweep = check(recipes, "model.dit.precision=fp8,bf16", "optim.lr=1e-3,1e-4")
    assert [point.name for point in sweep.points] == [
        "00-precision-fp8-lr-1e-3",
        "01-precision-fp8-lr-1e-4",
        "02-precision-bf16-lr-1e-3",
        "03-precision-bf16-lr-1e-4",
    ]
    assert sweep.points[2].changes == {"model.dit.precision": "bf16", "optim.lr": "1e-3"}
    assert sweep.points[2].title == "model.dit.precision=bf16 optim.lr=1e-3"
    assert sweep.count == 4
    assert sweep.parent == tmp_path / "outputs" / "sweeps" / "tiny"
    assert not sweep.anew
    assert not (tmp_path / "outputs").exists()


def test_one_point_is_a_sweep_too(recipes: Path) -> None:
    assert [point.name for point in check(recipes).points] == ["00"]


def test_a_sweep_that_may_not_go_on_says_so(recipes: Path) -> None:
    assert check(recipes, "checkpoint.resume=never").anew


def test_a_fault_of_one_value_is_told_once(recipes: Path) -> None:
    (fault,) = faults(recipes, "model.dit.precision=fp8,fp9", "optim.lr=1e-3,1e-4")
    assert fault.path == "model.dit.precision"
    assert fault.where == "command line: model.dit.precision=fp9"


def test_a_fault_that_all_points_have_is_told_once(recipes: Path) -> None:
    (fault,) = faults(recipes, "model.dit.precison=fp8", "optim.lr=1e-3,1e-4")
    assert fault.where == "command line: model.dit.precison=fp8"


def test_a_fault_of_a_combination_names_its_points(recipes: Path) -> None:
    found = faults(recipes, "model.dit.precision=fp8,bf16", "model.dit.trainable=lora,full")
    (fault,) = [fault for fault in found if "can't be combined" in fault.message]
    assert fault.where.endswith("; point 2 (model.dit.precision=fp8 model.dit.trainable=full) of 4")


def test_missing_data_of_one_point_is_found_before_the_first_starts(
    recipes: Path, tmp_path: Path
) -> None:
    (fault,) = faults(recipes, f"data.path={tmp_path}/pictures,{tmp_path}/nothing")
    assert fault.path == "data.path"
    assert "nothing" in fault.where


def test_settings_of_the_launcher_are_judged_with_the_points(recipes: Path) -> None:
    found = faults(recipes, "hydra/launcher=joblib", "hydra.launcher.n_job=3", "optim.lr=fast,1e-4")
    assert {fault.path for fault in found} == {"hydra.launcher.n_job", "optim.lr"}
    assert found[0].nearest == ("hydra.launcher.n_jobs",)


def test_an_unknown_launcher_is_one_fault(recipes: Path) -> None:
    (fault,) = faults(recipes, "hydra/launcher=jobli", "optim.lr=1e-3,1e-4")
    assert fault.nearest == ("joblib",)


def test_intervals_need_a_search(recipes: Path) -> None:
    (fault,) = faults(recipes, "optim.lr=interval(1e-4,1e-3)")
    assert fault.where == "command line: optim.lr=interval(1e-4,1e-3)"
    assert "hydra/sweeper=optuna" in fault.hint


def test_a_search_needs_something_to_choose(recipes: Path) -> None:
    (fault,) = faults(recipes, "hydra/sweeper=optuna")
    assert "a search needs a key" in fault.message


def test_a_search_needs_a_validation_loss_and_a_launcher_for_several_points(recipes: Path) -> None:
    found = faults(
        recipes,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_jobs=2",
        "optim.lr=interval(1e-4,1e-3)",
        "validation.fraction=0",
    )
    assert {fault.path for fault in found} == {"validation.fraction", "hydra.sweeper.n_jobs"}


def test_a_search_is_judged_at_its_ends(recipes: Path) -> None:
    (fault,) = faults(recipes, "hydra/sweeper=optuna", "optim.lr=interval(1e-4,100)")
    assert fault.path == "optim.lr"
    sweep = check(recipes, "hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-3)")
    assert (sweep.points, sweep.count) == ((), 20)


def test_a_longer_search_goes_on_with_a_shorter_one(recipes: Path) -> None:
    search = ("hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-3)")
    key = check(recipes, *search).key
    assert check(recipes, *search, "hydra.sweeper.n_trials=99").key == key
    assert check(recipes, *search, "hydra.sweeper.seed=1").key != key
    wider = ("hydra/sweeper=optuna", "optim.lr=interval(1e-4,2e-3)")
    assert check(recipes, *wider).key != key


def test_corners_are_few_where_there_are_many_keys(recipes: Path) -> None:
    keys = ["optim.lr", "optim.weight_decay", "optim.warmup_steps", "trainer.seed", "data.repeats"]
    keys += ["data.caption_dropout", "objective.logit_mean"]
    lines = [f"{key}=interval(1,2)" for key in keys]
    request = read_sweep(["recipe=tiny", *lines], config_dir=recipes)
    found = corners(request)
    assert len(found) == 1 + 2 * len(keys)  # low, high and one between
    assert found[0][:2] == ("recipe=tiny", "optim.lr=1.0")


@pytest.mark.parametrize(
    ("gpus", "more", "groups", "shared"),
    [
        ("", (), (), ""),
        ("0,1,2,3", (), ("0", "1"), ""),
        ("0,1,2,3", ("hydra.launcher.gpus_per_point=2",), ("0,1", "2,3"), ""),
        ("4,5", ("hydra.launcher.gpus_per_point=0",), (), "4,5"),
        ("0,1", ("model.device=cpu",), (), ""),
        ("0,1", ("model.device=cuda:1",), (), ""),
        ("0,1,2,3", ("trainer.devices=2", "trainer.strategy=ddp"), ("0,1", "2,3"), ""),
    ],
)
def test_points_at_once_are_dealt_gpus(
    recipes: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: str,
    more: tuple[str, ...],
    groups: tuple[str, ...],
    shared: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    device = () if any(line.startswith("model.device") for line in more) else ("model.device=auto",)
    sweep = check(recipes, "hydra/launcher=joblib", "optim.lr=1e-3,1e-4", *device, *more)
    assert (sweep.gpus, sweep.shared_gpus) == (groups, shared)


def test_more_points_at_once_than_gpus_are_refused(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    lines = ("hydra/launcher=joblib", "optim.lr=1e-3,1e-4", "model.device=auto")
    (fault,) = faults(recipes, *lines)
    assert fault.path == "hydra.launcher.n_jobs"
    assert "2 points at once with 1 GPU each need 2; this machine shows 1" in fault.message
    assert check(recipes, *lines, "hydra.launcher.n_jobs=1").gpus == ("0",)


def test_several_machines_need_slurm(recipes: Path) -> None:
    (fault,) = faults(recipes, "trainer.num_nodes=1,2")
    assert fault.path == "trainer.num_nodes"
    assert fault.where == "command line: trainer.num_nodes=2"


def test_slurm_must_be_there_and_serve_all_points(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("hydra/launcher=submitit_slurm", "trainer.devices=1,2", "trainer.strategy=ddp")
    monkeypatch.setattr(machines.shutil, "which", lambda name: None)
    found = faults(recipes, *lines)
    assert ["sbatch and srun" in fault.message for fault in found] == [True, False]
    assert "different nodes, processes or GPUs" in found[1].message
    monkeypatch.setattr(machines.shutil, "which", lambda name: name)
    assert len(faults(recipes, *lines)) == 1
    sweep = check(recipes, lines[0], "trainer.devices=2", "trainer.strategy=ddp")
    assert (sweep.needs.nodes, sweep.needs.processes, sweep.needs.gpus) == (1, 2, 0)


def test_a_missing_package_is_told_before_anything_starts(
    recipes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_by = importlib.util.find_spec
    missing = ("hydra_plugins.hydra_joblib_launcher", "optuna")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else found_by(name)
    )
    (fault,) = faults(recipes, "hydra/launcher=joblib", "optim.lr=1e-3,1e-4")
    assert fault.hint == "Run `pip install octavo[joblib]`."
    assert fault.where == "command line: hydra/launcher=joblib"
    (fault,) = faults(recipes, "hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-3)")
    assert fault.hint == "Run `pip install octavo[optuna]`."


def test_points_that_are_the_same_run_are_warned_about(recipes: Path) -> None:
    sweep = check(recipes, "trainer.log_every_n_steps=1,2")
    assert [warning.message for warning in sweep.warnings] == ["points 1 and 2 are the same run"]


def test_a_device_that_isnt_named_counts_as_a_gpu(recipes: Path) -> None:
    request = read_sweep(["recipe=tiny", "model.device=auto"], config_dir=recipes)
    assert check_sweep(request, config_dir=recipes).needs.gpus == 1
