"""Resuming from a path: what must be there, and which run's checkpoint can be taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.errors import Fault
from tests.unit.judge.checking import check, only_fault

RUN = "outputs/cats/001"
LORA: dict[str, Any] = {"rank": 4, "alpha": 4}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    """A working directory with a checkpoint in `model` and a data set in `data/cats`."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_checkpoint)
    Path("data/cats").mkdir(parents=True)
    Path("data/cats/1.png").touch()


def write_run(folder: str = RUN, step: int = 100, **model: Any) -> Path:
    """A run folder as training leaves it, with the configuration of `check`."""
    path = Path(folder)
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / f"step-{step:08d}.ckpt").touch()
    dit = {"trainable": "lora", "lora": LORA} | model.pop("dit", {})
    config = {
        "model": {"family": "qwen_image", "source": "model", "dit": dit, **model},
        "optim": {"name": "adamw"},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def resume(typed: str = RUN, **changes: Any) -> Fault:
    return only_fault(check({"checkpoint.resume": typed, **changes}))


@pytest.mark.parametrize("typed", ["auto", "never"])
def test_the_two_words_need_no_file(typed: str) -> None:
    assert check({"checkpoint.resume": typed}).faults == ()


@pytest.mark.parametrize(
    "typed",
    [RUN, f"{RUN}/", f"{RUN}/checkpoints", f"{RUN}/checkpoints/step-00000100.ckpt"],
)
def test_a_run_of_the_same_kind_is_taken_by_folder_and_by_file(typed: str) -> None:
    write_run()
    found = check({"checkpoint.resume": typed})
    assert (found.faults, found.warnings) == ((), ())


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("nevr", "never"), ("Auto", "auto"), ("outputs/cats/01", "outputs/cats/001"), ("latest", "")],
)
def test_a_path_that_does_not_exist_comes_with_the_nearest(typed: str, nearest: str) -> None:
    write_run()
    fault = resume(typed)
    assert (fault.path, fault.code, fault.value) == ("checkpoint.resume", "file", typed)
    assert fault.nearest == ((nearest,) if nearest else ())
    assert fault.hint == f"Write checkpoint.resume={nearest}." or not nearest


def test_the_folder_around_the_runs_names_them_newest_first() -> None:
    write_run()
    write_run("outputs/cats/010")
    Path("outputs/cats/011").mkdir()  # has no checkpoint
    fault = resume("outputs/cats")
    assert "holds no checkpoints, but 2 runs that do" in fault.message
    assert fault.nearest == ("outputs/cats/010", "outputs/cats/001")
    assert "holds no checkpoints" in resume("outputs/cats/011").message


def test_a_run_of_another_family_is_refused() -> None:
    write_run(family="flux")
    fault = resume()
    assert fault.code == "rule"
    assert "is of the family flux, this one of qwen_image" in fault.message
    assert "checkpoint.resume=never" in fault.hint


@pytest.mark.parametrize(
    ("model", "changes", "message", "hint"),
    [
        ({"dit": {"trainable": "full"}}, {}, "it trained model.dit.trainable=full, this run lora",
         "Set model.dit.trainable=full"),
        ({"dit": {"lora": {"rank": 8}}}, {}, "model.dit.lora.rank was 8, here it is 4", "Set model.dit.lora.rank=8"),
        ({"dit": {"lora": None}}, {}, "model.dit.lora.rank was 16, here it is 4", "Set model.dit.lora.rank=16"),
        ({"dit": {"lora": LORA | {"use_dora": True}}}, {}, "model.dit.lora.use_dora was true, here it is false",
         "Set model.dit.lora.use_dora=true"),
        ({"dit": {"lora": LORA | {"target_modules": ["attn.to_q"]}}}, {},
         "on other layers (2 then, 16 here, different e.g. in transformer_blocks.0",
         "Set model.dit.lora.target_modules=[attn.to_q]"),
        ({"text_encoder": {"trainable": "lora"}}, {}, "it trained model.text_encoder.trainable=lora, this run none",
         "Set model.text_encoder.trainable=lora"),
        ({}, {"optim.name": "sgd", "optim.lr": 1e-2}, "its optimizer is adamw, this run's sgd", "Set optim.name=adamw"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_belong_says_what_differs_and_the_ways_out(
    model: dict[str, Any], changes: dict[str, Any], message: str, hint: str
) -> None:
    write_run(**model)
    fault = resume(**changes)
    assert fault.code == "rule"
    assert "doesn't belong to this configuration" in fault.message
    assert message in fault.message
    assert hint in fault.hint
    assert "checkpoint.resume=never" in fault.hint


def test_all_differences_are_in_one_fault_and_its_lora_is_offered() -> None:
    run = write_run(dit={"lora": {"rank": 8, "use_dora": True}})
    (run / "lora.safetensors").touch()
    fault = resume()
    assert "rank was 8" in fault.message
    assert "use_dora was true" in fault.message
    assert f"model.dit.lora.init_from={run.absolute()}/lora.safetensors" in fault.hint


def test_layers_written_otherwise_but_the_same_are_fine() -> None:
    write_run(dit={"lora": LORA | {"target_modules": ["attn.to_q"]}})
    same = {"model.dit.lora": LORA | {"target_modules": ["*.attn.to_q"]}}
    assert check({"checkpoint.resume": RUN, **same}).faults == ()


def test_what_changes_the_meaning_of_the_weights_is_warned_of() -> None:
    write_run(source="other/model", dit={"lora": LORA | {"alpha": 8}})
    found = check({"checkpoint.resume": RUN})
    assert found.faults == ()
    assert {fault.path for fault in found.warnings} == {"checkpoint.resume", "model.dit.lora.alpha"}


def test_a_checkpoint_that_has_all_the_steps_leaves_nothing_to_train() -> None:
    write_run(step=1000)
    fault = resume()
    assert fault.path == "trainer.max_steps"
    assert "1000 steps leave nothing to train" in fault.message
    assert check({"checkpoint.resume": RUN, "trainer.max_steps": 1001}).faults == ()


@pytest.mark.parametrize("text", ["", "[1", "- a", "model: 5\noptim: x\n", "model: {dit: 1}"])
def test_a_run_whose_configuration_can_not_be_read_is_left_to_training(text: str) -> None:
    run = write_run()
    (run / "config.yaml").write_text(text)
    check({"checkpoint.resume": RUN})
