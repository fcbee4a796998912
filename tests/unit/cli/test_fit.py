"""`octavo plan --fit` on the tiny checkpoint: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.cli.main import main

ROOM = "1GiB"


@pytest.fixture
def recipe(tiny_checkpoint: Path) -> list[str]:
    return ["plan", "recipe=pocket_lora", f"model.source={tiny_checkpoint}", "data.batch_size=2"]


def test_what_fits_is_told_with_the_plan(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recipe, "--fit", ROOM, "--host", "2GiB"]) == 0
    out = capsys.readouterr().out
    assert "Settings for 1.0 GiB, of which tensors may take 393 MiB, and 2.0 GiB of host" in out
    assert "It fits as configured." in out
    assert "Memory by phase" in out


def test_the_chosen_settings_are_printed_as_overrides_that_give_the_same_plan(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, where the whole size counts: a little less than the step takes as configured.

    Only checkpointing is left to be chosen, so that few plans are traced.
    """
    parts = ("dit", "text_encoder", "vae")
    recipe = [*recipe, "model.device=cpu", "model.text_encoder.precision=bf16"]
    recipe += ["model.dit.precision=bf16"]
    recipe += [f"model.{part}.offload=none" for part in parts]
    assert main([*recipe, "--fit", ROOM, "--json"]) == 0
    (trial,) = json.loads(capsys.readouterr().out)["fit"]["trials"]
    train = trial["phases"]["train"]
    size = f"{(train['device_bytes'] + train['host_bytes'] - 1000) / 2**20:.6f}MiB"
    assert main([*recipe, "--fit", size, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    fit = summary["fit"]
    assert fit["fits"] is True
    assert fit["overrides"] == [f"{k}={str(v).lower()}" for k, v in fit["chosen"].items()]
    assert not any(each["fits"] for each in fit["trials"][:-1])
    assert fit["trials"][-1]["settings"] == fit["chosen"]
    assert fit["chosen"] == {"model.dit.gradient_checkpointing": True}
    peak = summary["phases"]["train"]
    assert peak["device_bytes"] + peak["host_bytes"] <= fit["usable_bytes"]
    assert main([*recipe, *fit["overrides"], "--fit", size, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["chosen"] == {}


def test_layers_and_chart_are_those_of_the_chosen_settings(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chart = tmp_path / "memory.svg"
    assert main([*recipe, "--fit", ROOM, "--layers", "dit", "--chart", str(chart)]) == 0
    out = capsys.readouterr().out
    assert "Layers of dit" in out
    assert "Settings for" not in out
    assert chart.stat().st_size > 0


def test_where_nothing_fits_the_table_comes_before_the_error(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*recipe, "model.device=cpu", "model.fit=0.01MiB"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert "Nothing fits." in out
    assert "Closest: model." in out
    assert "What would help: " in out
    assert "nothing fits 10.2 KiB of device memory" in err
    assert main([*command, "--json"]) == 2
    summary = json.loads(capsys.readouterr().out)
    assert set(summary) == {"fit"}
    assert summary["fit"]["fits"] is False
    assert summary["fit"]["shortfall"]["phase"] in ("train", "sample", "load", "encode", "save")


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        (["--fit", "24"], ["--fit: '24' isn't an amount of memory", "Nearest: 24GiB"]),
        (["--fit", "24GiB", "--host", "x"], ["--host: 'x' isn't an amount of memory"]),
        (["--host", "24GiB"], ["--fit isn't given", "--fit 24GiB"]),
        (["--fit", "24GiB", "--no-activations"], ["can't be chosen without activations"]),
        (["model.fit=lots"], ["an amount of memory such as 24GiB or 512MiB"]),
    ],
)
def test_what_is_no_size_is_refused(
    recipe: list[str], options: list[str], phrases: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recipe, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for phrase in phrases:
        assert phrase in err
