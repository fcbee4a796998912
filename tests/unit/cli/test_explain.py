"""`octavo explain`: what a key does, what it may be, and what set its present value."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from framework.cli.main import main
from framework.compose import compose_run, recipe_names
from framework.schema.in_words import example_in_words
from framework.schema.json_schema import SWEEP_GROUPS, sweep_options
from framework.schema.names import known_paths
from framework.schema.related import related_keys
from framework.schema.run import RunConfig
from framework.schema.validate import judge_values

Capture = pytest.CaptureFixture[str]
PATHS = known_paths(RunConfig)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = (
        "defaults: [pocket_lora, _self_]\nmodel:\n  dit:\n    precision: fp8\noptim: {lr: 3e-4}\n"
    )
    (tmp_path / "recipes" / "ink.yaml").write_text(text)
    return tmp_path


def explained(capsys: Capture, *arguments: str, code: int = 0) -> list[str]:
    assert main(["explain", *arguments]) == code
    captured = capsys.readouterr()
    return (captured.out if code == 0 else captured.err).splitlines()


def test_a_key_without_a_recipe(capsys: Capture) -> None:
    assert explained(capsys, "model.dit.precision")[:5] == [
        "model.dit.precision",
        "  How frozen weights are stored. Computation stays in `model.compute_dtype`.",
        "  Values: fp8, bf16",
        "  Default: bf16",
        "  Example: model.dit.precision=fp8",
    ]


@pytest.mark.parametrize(
    ("arguments", "now"),
    [
        (["model.dit.precision", "recipe=ink"], "fp8, set by recipes/ink.yaml:4:5"),
        (["optim.lr", "recipe=ink"], "3e-4, set by recipes/ink.yaml:5:9"),
        (["optim.lr", "recipe=ink", "optim.lr=0.5"], "0.5, set by command line: optim.lr=0.5"),
        (["optim.lr=0.5", "recipe=ink"], "0.5, set by command line: optim.lr=0.5"),
        (["sample.seed", "recipe=ink"], "0, the default"),
        (["optim.betas", "recipe=ink"], "null, the default"),
        (["data.path", "recipe=ink", "data.path=???"], "must still be set, see command line: "),
        (["hydra.launcher.n_jobs", "recipe=ink", "hydra/launcher=joblib"], "2, set by "),
    ],
)
def test_the_present_value_and_what_set_it(
    project: Path, arguments: list[str], now: str, capsys: Capture
) -> None:
    lines = explained(capsys, *arguments)
    assert [line for line in lines if line.startswith(f"  Now: {now}")], lines


def test_a_faulty_configuration_is_explained_all_the_same(project: Path, capsys: Capture) -> None:
    command = ["explain", "optim.lr", "recipe=ink", "optim.lr=50", "data.pth=x", "data.max_px=1"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "  Now: 50, set by command line: optim.lr=50\n" in captured.out
    assert (
        "  Fault: 50 is not allowed; it must be greater than 0 and less than 10\n" in captured.out
    )
    assert "has 2 other faults; `octavo validate` tells them." in captured.err


def test_a_section_lists_its_keys(project: Path, capsys: Capture) -> None:
    lines = explained(capsys, "optim")
    assert lines[:2] == ["optim", "  The optimizer and its learning-rate schedule."]
    assert [line for line in lines if line.split()[:2] == ["optim.lr", "1e-4"]]
    lines = explained(capsys, "optim", "recipe=ink")
    assert [
        line for line in lines if line.split()[:3] == ["optim.lr", "3e-4", "recipes/ink.yaml:5:9"]
    ]
    assert [line for line in lines if line.split()[:3] == ["optim.ema", "null", "default"]]


@pytest.mark.parametrize(
    ("key", "phrases"),
    [
        ("model.dit.precison", ["there is no such key", "Nearest: model.dit.precision"]),
        ("modle", ["there is no such key", "Next: "]),
        ("hydra.launcher.jobs", ["there is no such key", "Nearest: hydra.launcher.n_jobs"]),
        ("hydra", ["there is no such key", "hydra.launcher"]),
        ("", ["there is no such key"]),
    ],
)
def test_an_unknown_key_is_reported_like_any_fault(
    key: str, phrases: list[str], capsys: Capture
) -> None:
    lines = explained(capsys, key, code=2)
    assert lines[0] == "Error: 1 fault in the configuration"
    text = "\n".join(lines)
    assert [phrase for phrase in phrases if phrase not in text] == [], text
    assert "      Next: " in text


@pytest.mark.parametrize("name", ["fp8_models", "--fp8_models", "--fp8-models"])
def test_another_trainers_name_is_answered_with_ours(name: str, capsys: Capture) -> None:
    lines = explained(capsys, name)
    assert lines[0].startswith(f"{name}: what DiffSynth-Studio calls fp8_models is model.dit.")
    assert "model.dit.precision" in lines


def test_the_index_of_a_list_is_no_part_of_its_key(capsys: Capture) -> None:
    for key in ("sample.size_px[0]", "sample.size_px.0", "sample.size_px"):
        assert explained(capsys, key)[0] == "sample.size_px"


def test_recipe_lists_what_it_takes(project: Path, capsys: Capture) -> None:
    lines = explained(capsys, "recipe")
    assert "  Value: ink  (recipes/ink.yaml)" in lines
    assert len([line for line in lines if line.startswith("  Value: ")]) == len(recipe_names())


def test_a_key_of_several_launchers_is_told_for_each(capsys: Capture) -> None:
    lines = explained(capsys, "hydra.launcher.n_jobs")
    assert "hydra.launcher.n_jobs  with hydra/launcher=joblib" in lines
    assert "hydra.launcher.n_jobs  with hydra/launcher=submitit_local" in lines
    assert explained(capsys, "hydra/sweeper")[0] == "hydra.sweeper  with hydra/sweeper=basic"


@pytest.mark.parametrize("path", PATHS)
def test_every_key_is_explained_and_its_example_works(path: str, capsys: Capture) -> None:
    lines = explained(capsys, path)
    assert lines[0] == path
    example = next((line for line in lines if line.startswith("  Example: ")), None)
    if example is None:
        return  # a section
    (override,) = shlex.split(example.removeprefix("  Example: "))
    needs_project = path.startswith("logger.wandb.") and path != "logger.wandb.project"
    around = ["logger.wandb.project=x"] if needs_project else []
    composition = compose_run(["recipe=pocket_lora", *around, override])
    assert composition.faults == ()
    _, faults, _ = judge_values(composition.values, composition.where, use="plan")
    told = {"unknown-key", "wrong-value", "wrong-type", "out-of-range", "wrong-length"}
    assert [fault for fault in faults if fault.path == path and fault.code in told] == []


@pytest.mark.parametrize("path", PATHS)
def test_related_keys_exist(path: str) -> None:
    for keys, how in related_keys(path):
        assert set(keys) <= set(PATHS)
        assert path not in keys
        assert not how.endswith(".")


def test_the_table_of_related_keys_names_no_key_that_is_gone() -> None:
    from framework.schema.related import _table

    assert {key for keys, _ in _table() for key in keys} <= set(PATHS)


def test_every_key_of_a_launcher_or_sweeper_is_explained(capsys: Capture) -> None:
    for group in SWEEP_GROUPS:
        for option in sweep_options(group):
            for name, key in option["properties"].items():
                lines = explained(capsys, f"{group.replace('/', '.')}.{name}")
                assert f"  {key['description']}" in lines
                assert example_in_words(key)
