"""`octavo plan --error`: tables for a person, JSON for a program, and refusal before torch is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.cli.main import main

POCKET = ["recipe=pocket_lora", "model.device=cpu"]
FP8 = [*POCKET, "model.dit.precision=fp8", "model.vae.precision=fp8", "model.vae.fp8.layers=[conv]"]
Capture = pytest.CaptureFixture[str]


def test_tables_and_a_line_for_each_component(capsys: Capture, tmp_path: Path) -> None:
    assert main(["plan", "--error", *FP8, f"data.cache_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for text in ("dit in FP8: the layers", "vae in FP8: the layers", "weight error"):
        assert text in printed
    assert "share of output error" in printed
    assert "on a seeded input" in " ".join(printed.split())
    assert printed.count("transformer_blocks.") == 11  # ten in the table, the worst in the line


def test_json_with_a_budget(capsys: Capture, tmp_path: Path) -> None:
    budget = "model.dit.fp8.error_budget=0.02"
    command = ["plan", "--error", "--json", *FP8, budget, f"data.cache_dir={tmp_path}"]
    assert main(command) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["version"] == 1
    assert content["input"] == {
        "picture_px": [256, 256],
        "text_tokens": 64,
        "sigma": 0.5,
        "seed": 0,
    }
    dit = content["components"]["dit"]
    assert dit["budget"] == 0.02
    assert dit["output_error"] <= 0.02 < dit["output_error_before"]
    assert set(dit["kept"]) < {layer["layer"] for layer in dit["layers"]}
    assert content["components"]["vae"]["output_error"] is None
    assert main([argument for argument in command if argument != "--json"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "high precision" in printed
    assert "of what would rest in FP8" in printed


def test_without_fp8_there_is_nothing_to_measure(capsys: Capture) -> None:
    assert main(["plan", "--error", *POCKET]) == 2
    printed = capsys.readouterr().err
    assert "no component is stored in FP8" in printed
    assert "model.dit.precision=fp8" in printed


@pytest.mark.parametrize("option", [["--layers", "dit"], ["--fit", "8GiB"], ["--chart", "a.png"]])
def test_what_the_report_does_not_read_is_refused(capsys: Capture, option: list[str]) -> None:
    assert main(["plan", "--error", *FP8, *option]) == 2
    assert "a report of its own" in capsys.readouterr().err


def test_a_plan_says_that_it_does_not_know_the_budgets_layers(capsys: Capture) -> None:
    plan = ["plan", *POCKET, "model.dit.precision=fp8", "--no-activations"]
    assert main([*plan, "model.dit.fp8.error_budget=0.02"]) == 0
    printed = capsys.readouterr()
    assert "error_budget keeps in high precision come on top" in " ".join(printed.err.split())
    assert main(plan) == 0
    assert "error_budget" not in capsys.readouterr().err
