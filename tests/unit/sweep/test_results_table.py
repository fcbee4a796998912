"""The table for the terminal: what it says, and that it fits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from framework.sweep.results import collect, results_table
from framework.sweep.results_read import RunRecord
from framework.sweep.results_table import duration_text, loss_text, memory_text, time_text
from tests.unit.sweep.folders import write_point, write_sweep


def shown(sweep: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(results_table(collect(sweep), width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    keys = [("fp8", "bf16", "1e-3"), ("bf16", "fp8", "5e-4"), ("bf16", "bf16", "5e-4")]
    changes = [
        {"model.dit.precision": dit, "model.text_encoder.precision": text, "optim.lr": lr}
        for dit, text, lr in keys
    ]
    folder = write_sweep(tmp_path, changes)
    write_point(folder, "p0", summary={"seconds": 3725.0})
    write_point(folder, "p1", losses={0: 1.5, 400: 0.4}, summary={"seconds": 8.24})
    return folder


def test_keys_are_shortened_to_what_tells_them_apart(sweep: Path) -> None:
    head = shown(sweep).splitlines()[1].split()
    assert head[:4] == ["point", "dit.precision", "text_encoder.precision", "lr"]


def test_the_best_is_marked_and_stands_first(sweep: Path) -> None:
    lines = shown(sweep, 140).splitlines()
    assert lines[3].split()[:5] == ["*", "01", "bf16", "fp8", "5e-4"]
    assert "0.4000" in lines[3]
    assert "1 h 02 min" in lines[4]
    assert "* best: lowest validation loss at the end" in shown(sweep, 140)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_nothing_is_cut_where_it_can_fit(sweep: Path, width: int) -> None:
    text = shown(sweep, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "val loss" in text


def test_without_validation_the_way_to_it_is_named(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, [{"optim.lr": "1"}])
    write_point(folder, "p0", losses={})
    assert "set validation.fraction" in shown(folder)


def test_failures_are_told_with_their_reason_literally(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, [{"optim.lr": "1"}, {"optim.lr": "2"}])
    write_point(folder, "p1", state="failed", error="[bold]memory[/bold] is full")
    text = shown(folder)
    assert "01 failed: [bold]memory[/bold] is full" in text
    assert "waiting" in text


def test_time_of_steps_alone_is_marked(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, [{"optim.lr": "1"}])
    write_point(folder, "p0")
    text = shown(folder)
    assert "~3 min 20 s" in text
    assert "time with ~: optimizer steps alone" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (9.96, "10.0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("seconds", [59.5, 59.99, 3599.5])
def test_a_rounded_duration_has_no_sixty(seconds: float) -> None:
    assert "60" not in duration_text(seconds)


@pytest.mark.parametrize(
    ("loss", "text"),
    [(None, "-"), (0.48360258, "0.4836"), (0.000123456, "0.000123"), (float("nan"), "nan")],
)
def test_losses(loss: float | None, text: str) -> None:
    assert loss_text(loss) == text


def test_what_isnt_known_is_a_dash() -> None:
    assert (time_text(RunRecord()), memory_text(RunRecord())) == ("-", "-")
