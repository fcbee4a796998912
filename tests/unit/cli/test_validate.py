"""`octavo validate` for people: what is judged, what is printed where, and the exit code."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from framework.cli import validate as validate_module
from framework.cli.main import main
from framework.cli.targets import read_targets, split_files
from framework.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "lightning", "diffusers", "transformers", "peft", "accelerate")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with two recipes of their own; the data is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    for name in ("ink", "chalk"):
        write(tmp_path / "recipes" / f"{name}.yaml", recipe_text(name))
    return tmp_path


def recipe_text(name: str, more: str = "") -> str:
    return (
        f"defaults: [pocket_lora, _self_]\ndata: {{path: pictures}}\nrun: {{name: {name}}}\n{more}"
    )


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def names(arguments: Sequence[str], **options: object) -> list[str]:
    given = {"every": False, "config_dir": None, **options}
    return [target.name for target in read_targets(arguments, **given).targets]  # type: ignore[arg-type]


def test_one_valid_configuration(project: Path, capsys: Capture) -> None:
    assert main(["validate", "recipe=ink", "data.path=pictures"]) == 0
    assert capsys.readouterr() == ("The configuration of ink is valid.\n", "")


def test_one_configuration_with_a_fault_leaves_stdout_clean(project: Path, capsys: Capture) -> None:
    assert main(["validate", "recipe=ink", "model.dit.precison=fp8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "Error: 1 fault in the configuration"
    assert lines[1].startswith("  model.dit.precison: unknown key")
    assert lines[2] == "      Set by: command line: model.dit.precison=fp8"
    assert not [line for line in lines if line.startswith("      In: ")]


def test_a_product_names_the_points_of_each_fault_once(project: Path, capsys: Capture) -> None:
    command = ["validate", "recipe=ink,chalk", "model.dit.precision=fp8,fp9", "optim.lr=1e-4,5e-5"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.count("'fp9'") == 1
    concerned = next(line for line in captured.err.splitlines() if line.startswith("      In: "))
    assert concerned == (
        "      In: 4 of 8 configurations: "
        "recipe=ink model.dit.precision=fp9 optim.lr=1e-4; "
        "recipe=ink model.dit.precision=fp9 optim.lr=5e-5; "
        "recipe=chalk model.dit.precision=fp9 optim.lr=1e-4; and 1 more"
    )
    assert re.fullmatch(r"8 configurations: 4 valid, 4 with faults; \d+\.\d s\n", captured.out)


def test_a_fault_of_the_command_line_concerns_all(project: Path, capsys: Capture) -> None:
    assert main(["validate", "recipe=ink,chalk", "oops"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("'oops' isn't of the form key=value") == 1
    assert "      In: all 2 configurations" in captured.err


def test_a_search_is_judged_at_both_ends_of_its_intervals(project: Path, capsys: Capture) -> None:
    assert main(["validate", "recipe=ink", "optim.lr=interval(1e-5,20)"]) == 2
    captured = capsys.readouterr()
    assert "optim.lr: 20 is not allowed" in captured.err
    assert "Set by: command line: optim.lr=interval(1e-5,20)\n" in captured.err
    assert captured.out.startswith("2 configurations: 1 valid, 1 with faults")


@pytest.mark.parametrize(
    ("overrides", "phrase"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs: 0 is not"),
        (["hydra/launcher=joblib", "hydra.launcher.jobs=2"], "hydra.launcher.jobs: unknown key"),
        (["hydra/launcher=jobli"], "Nearest: joblib"),
    ],
)
def test_settings_of_a_sweep_are_judged_too(
    project: Path, overrides: list[str], phrase: str, capsys: Capture
) -> None:
    assert main(["validate", "recipe=ink", "optim.lr=1e-4,5e-5", *overrides]) == 2
    assert phrase in capsys.readouterr().err


def test_all_recipes_shipped_and_own(project: Path, capsys: Capture) -> None:
    assert {"recipe=ink", "recipe=chalk", "recipe=pocket_lora"} <= set(names([], every=True))
    count = len(names([], every=True))
    assert (
        main(["validate", "--all", "model.dit.precision=fp8,bf16", "model.dit.trainable=lora"]) == 0
    )
    assert capsys.readouterr().out.startswith(f"{2 * count} configurations: {2 * count} valid")


def test_a_folder_of_recipes(project: Path, capsys: Capture) -> None:
    write(project / "team" / "bad.yaml", recipe_text("bad", "optim: {lr: fast}\n"))
    write(project / "team" / "styles" / "good.yml", recipe_text("good"))
    assert main(["validate", "--config-dir", "team"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("2 configurations: 1 valid, 1 with faults")
    assert "Set by: team/bad.yaml:4:9\n" in captured.err
    assert "      In: 1 of 2 configurations: recipe=bad\n" in captured.err


def test_a_recipe_of_a_folder_hides_others(project: Path, capsys: Capture) -> None:
    write(project / "team" / "ink.yaml", recipe_text("ink", "optim: {lr: fast}\n"))
    assert main(["validate", "recipe=ink"]) == 0
    assert main(["validate", "recipe=ink", "--config-dir", "team"]) == 2
    assert "team/ink.yaml:4:9" in capsys.readouterr().err


def test_files_are_recipes_named_by_their_paths(project: Path, capsys: Capture) -> None:
    bad = write(project / "else where" / "bad.yaml", recipe_text("bad", "optim: {lr: fast}\n"))
    targets = read_targets(
        ["recipes/ink.yaml", str(bad), "trainer.seed=1,2"], every=False, config_dir=None
    ).targets
    assert [target.name for target in targets] == [
        "recipes/ink.yaml trainer.seed=1",
        "recipes/ink.yaml trainer.seed=2",
        "else where/bad.yaml trainer.seed=1",
        "else where/bad.yaml trainer.seed=2",
    ]
    assert main(["validate", "recipes/ink.yaml"]) == 0
    assert capsys.readouterr().out == "The configuration of recipes/ink.yaml is valid.\n"
    assert main(["validate", str(bad)]) == 2
    assert "Set by: else where/bad.yaml:4:9\n" in capsys.readouterr().err


def test_a_file_of_a_sub_folder_finds_the_recipes_beside_it(project: Path) -> None:
    write(project / "recipes" / "styles" / "base.yaml", recipe_text("base"))
    text = "defaults: [styles/base, _self_]\nrun: {name: fine}\n"
    write(project / "recipes" / "styles" / "fine.yaml", text)
    assert main(["validate", "recipes/styles/fine.yaml"]) == 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["nowhere.yaml"], {}, "there is no file 'nowhere.yaml'"),
        (["recipes"], {}, "'recipes' is a folder"),
        ([], {"config_dir": Path("nowhere")}, "there is no folder 'nowhere'"),
        ([], {"config_dir": Path("pictures")}, "there is no YAML file in 'pictures'"),
        (["recipe=ink"], {"every": True}, "chosen by --all and by recipe= at once"),
        (["recipes/ink.yaml", "recipe=ink"], {}, "chosen by recipe= and by a file at once"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused_with_a_next_step(
    project: Path, arguments: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match="1 fault") as caught:
        names(arguments, **options)
    (fault,) = caught.value.faults
    assert message in fault.message
    assert fault.where.startswith("command line: ")
    assert fault.hint.endswith(".")


def test_values_of_foreign_flags_are_no_files() -> None:
    files, overrides = split_files(["recipe=ink", "--dataset_config", "sets.yaml", "x=1", "b.yaml"])
    assert files == [Path("b.yaml")]
    assert overrides == ["recipe=ink", "--dataset_config", "sets.yaml", "x=1"]


def test_the_command_of_a_sweep_can_be_pasted(project: Path, capsys: Capture) -> None:
    assert main(["validate", "-m", "recipe=ink", "optim.lr=1e-4,5e-5"]) == 0
    assert capsys.readouterr().out.startswith("2 configurations: 2 valid")


def test_nothing_to_judge_is_a_fault(project: Path, capsys: Capture) -> None:
    assert main(["validate"]) == 2
    captured = capsys.readouterr()
    assert "recipe: must be given" in captured.err
    assert "ink" in captured.err


@pytest.mark.parametrize(
    ("overrides", "strict", "plain"),
    [
        (["model.dit.trainable=full"], 2, 0),
        (["data.path=nowhere"], 0, 0),
        (["optim.lr=1e-4"], 0, 0),
    ],
    ids=["a warning", "a file that another machine may have", "no warning"],
)
def test_with_strict_warnings_count(
    project: Path, overrides: list[str], strict: int, plain: int, capsys: Capture
) -> None:
    assert main(["validate", "recipe=ink", *overrides]) == plain
    before = capsys.readouterr()
    assert main(["validate", "recipe=ink", *overrides, "--strict"]) == strict
    captured = capsys.readouterr()
    assert before.out == "The configuration of ink is valid.\n"
    assert captured.out == ("" if strict else before.out)
    assert ("with --strict, warnings count" in captured.err) == bool(strict)
    command = ["validate", "recipe=ink,chalk", *overrides, "--strict"]
    assert main(command) == strict
    assert ("with --strict, warnings count" in capsys.readouterr().out) == bool(strict)


def test_many_configurations_move_a_bar_on_a_terminal(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(
        validate_module, "error_console", lambda: Console(stderr=True, force_terminal=True)
    )
    seeds = ",".join(str(seed) for seed in range(30))
    assert main(["validate", "recipe=ink", f"trainer.seed={seeds}"]) == 0
    assert "30/30" in capsys.readouterr().err
    assert main(["validate", "recipe=ink", "trainer.seed=1,2"]) == 0
    assert "Validating" not in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "json", "github", "sarif"])
def test_judging_a_hundred_leaves_torch_unloaded(project: Path, form: str) -> None:
    code = (
        "import sys; from framework.cli.main import main; code = main(sys.argv[1:]);"
        f"sys.exit(code or ','.join(n for n in {HEAVY!r} if n in sys.modules) or 0)"
    )
    seeds = ",".join(str(seed) for seed in range(100))
    command = ["validate", "recipe=ink", f"trainer.seed={seeds}", "--format", form]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *command],
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "100" in result.stdout
