"""What the disk says of data, LoRA files and folders: what is missing, what was probably meant, how to make it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from framework.errors import Fault
from framework.judge.disk import FileCheck, check_files
from framework.schema.validate import Use, examine_values
from tests.unit.judge.checking import check, only_fault
from tests.unit.schema.minimal import changed


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """A working directory with a checkpoint in `model` and a data set in `data/cats`."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_checkpoint)
    Path("data/cats").mkdir(parents=True)
    Path("data/cats/1.png").touch()
    return tmp_path


def test_a_configuration_whose_files_are_all_here_has_nothing_to_say(here: Path) -> None:
    assert check() == FileCheck((), (), checked_layers=True)


def test_data_that_does_not_exist_comes_with_the_nearest_names(here: Path) -> None:
    fault = only_fault(check({"data.path": "data/cat"}))
    assert (fault.path, fault.code, fault.value) == ("data.path", "file", "data/cat")
    assert fault.where == "place of data.path"
    assert fault.message == '"data/cat" does not exist'
    assert fault.nearest == ("data/cats",)
    assert fault.hint == "Write data.path=data/cats."


def test_data_with_nothing_near_it_says_where_relative_paths_start(here: Path) -> None:
    fault = only_fault(check({"data.path": "elsewhere/pictures"}))
    assert fault.nearest == ()
    assert "the folder in which the command runs" in fault.hint


def test_on_another_machine_missing_files_are_warnings(here: Path) -> None:
    changes = {
        "data.path": "data/cat",
        "checkpoint.resume": "outputs/x/001",
        "model.dit.lora": {"rank": 4, "alpha": 4, "init_from": "lora.safetensors"},
    }
    found = check(changes, need=False)
    assert found.faults == ()
    assert {fault.path for fault in found.warnings} == {
        "data.path",
        "checkpoint.resume",
        "model.dit.lora.init_from",
    }
    assert {fault.path for fault in check(changes).faults} == {f.path for f in found.warnings}


@pytest.mark.parametrize("use", ["plan", "generate"])
def test_planning_and_generating_need_no_data_and_resume_nothing(here: Path, use: Use) -> None:
    assert check({"data.path": "none", "checkpoint.resume": "none"}, use=use).faults == ()


def test_an_empty_folder_and_a_file_that_lists_nothing_are_refused(here: Path) -> None:
    Path("data/empty").mkdir()
    assert "is empty" in only_fault(check({"data.path": "data/empty"})).message
    Path("data/list.txt").touch()
    fault = only_fault(check({"data.path": "data/list.txt"}))
    assert "neither a folder nor a .csv" in fault.message
    Path("data/list.csv").touch()
    assert check({"data.path": "data/list.csv"}).faults == ()


def test_how_a_recipe_makes_its_data_is_quoted(here: Path) -> None:
    Path("recipe.yaml").write_text(
        "# Cats.\n#\n# Prepare:   octavo prepare cats --out data/kats\n"
        "#            python init.py --out made/model\n# Run:  x data/kats\ndata:\n  path: data/kats\n"
    )

    def where(path: str) -> str:
        return "recipe.yaml:7:3" if path in ("data.path", "model.source") else "default"

    fault = only_fault(check({"data.path": "data/kats"}, where=where))
    assert fault.hint == "Run `octavo prepare cats --out data/kats`, as the recipe says."
    assert fault.nearest == ("data/cats",)
    # Of the command that makes something else nothing is said.
    fault = only_fault(check({"data.path": "data/dogs"}, where=where))
    assert "octavo prepare" not in fault.hint
    # A model that the recipe makes is written like a hub id.
    fault = only_fault(check({"model.source": "made/model"}, where=where))
    assert (fault.path, fault.code) == ("model.source", "file")
    assert fault.hint == "Run `python init.py --out made/model`, as the recipe says."


def test_runs_inside_the_data_are_warned_of(here: Path) -> None:
    (warning,) = check({"run.output_dir": "data/cats/outputs"}).warnings
    assert warning.path == "run.output_dir"
    assert check({"run.output_dir": "data/outputs"}).warnings == ()


def test_a_lora_file_that_is_missing_or_a_folder_is_refused(here: Path) -> None:
    Path("lora.safetensors").touch()

    def of(name: str) -> Fault:
        return only_fault(check({"model.dit.lora": {"rank": 4, "alpha": 4, "init_from": name}}))

    fault = of("lora.safetensor")
    assert (fault.path, fault.code) == ("model.dit.lora.init_from", "file")
    assert fault.nearest == ("lora.safetensors",)
    Path("run").mkdir()
    assert "is a folder without a LoRA" in of("run").message
    shutil.copy("lora.safetensors", "run/lora.safetensors")
    assert check({"model.dit.lora": {"init_from": "run"}}).faults == ()
    fault = only_fault(check({"model.dit.lora": {"preset": "gone.safetensors"}}))
    assert (fault.path, fault.code) == ("model.dit.lora.preset", "file")
    assert "no safetensors header" in of("lora.safetensors").message  # empty


def test_a_lora_file_of_another_rank_is_refused(here: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(8, 16),
        f"{name}.lora_B.weight": torch.zeros(16, 8),
    }
    save_file(tensors, "lora.safetensors")
    lora = {"rank": 4, "alpha": 4, "init_from": "lora.safetensors"}
    fault = only_fault(check({"model.dit.lora": lora}))
    assert "has rank 8, but model.dit.lora.rank=4" in fault.message
    assert "Set model.dit.lora.rank=8" in fault.hint
    assert check({"model.dit.lora": lora | {"rank": 8}}).faults == ()


def test_nothing_is_said_of_what_is_faulty_itself_but_of_all_else(here: Path) -> None:
    values = changed(
        {
            "model.source": "model",
            "data.path": 5,
            "optim.name": "adamm",
            "checkpoint.resume": "nowhere",
            "model.dit.lora": {"rank": "many", "target_modules": ["attn.to_qq"]},
        }
    )
    found = examine_values(values, lambda path: f"place of {path}")
    assert {fault.path for fault in found.faults} == {
        "data.path",
        "optim.name",
        "model.dit.lora.rank",
    }
    check = check_files(
        found.repaired, lambda _: "here", use="train", need=True, stand_ins=found.stand_ins
    )
    assert [fault.path for fault in check.faults] == ["model.dit.lora.target_modules[0]"]
