"""`octavo plan` with and without activations, and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.cli.main import main


@pytest.fixture
def arguments(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    return [
        "plan",
        "recipe=pocket_lora",
        f"model.source={tiny_checkpoint}",
        f"data.path={tmp_path / 'none'}",
        "model.device=cpu",
        "data.batch_size=2",
    ]


def test_activations_are_traced(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chart = tmp_path / "memory.svg"
    assert main([*arguments, "--json", "--chart", str(chart)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["traced_with"] == {
        "batch_size": 2,
        "size_px": [64, 64],
        "sample_size_px": [64, 64],
        "text_tokens": 256,
    }
    train = plan["phases"]["train"]
    assert train["device"]["activations"] > 0
    assert train["device_bytes"] == sum(train["device"].values())
    assert plan["peak"]["device_bytes"] >= train["device_bytes"]
    assert "activations" in chart.read_text()
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "traced for pictures of 2 x 64x64 px" in " ".join(table.split())
    assert "?" not in table


def test_without_activations_the_table_says_so(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--no-activations"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "activations come on top" in table
    assert "?" in table


def test_a_chart_of_another_kind_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--no-activations", "--chart", str(tmp_path / "plan.pdf")]) == 2
    assert "neither a .png nor a .svg file" in capsys.readouterr().err


def test_where_torch_is_missing_weights_are_counted_alone(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "framework.runtime.forecast", None)
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["traced_with"] is None
    assert "activations are not counted" in captured.err
