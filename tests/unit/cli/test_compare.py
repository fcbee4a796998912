"""`octavo compare`: what it takes, what it writes, and what it says of folders that it can't compare."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from framework.cli.main import main
from tests.unit.sweep.folders import CONFIG, write_point, write_run, write_sweep

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = write_sweep(
        tmp_path / "sweeps" / "pocket" / "001", [{"optim.lr": "1e-3"}, {"optim.lr": "1e-4"}]
    )
    write_point(folder, "p0")
    return folder


def test_a_sweep_is_compared_while_it_runs(
    sweep: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep.parent)
    assert main(["compare", "001"]) == 0
    captured = capsys.readouterr()
    assert "waiting" in captured.out
    assert "  Page   001/results.html\n" in captured.out
    assert captured.err == ""
    assert {"results.csv", "results.json", "results.html"} <= {p.name for p in sweep.iterdir()}


def test_a_search_says_what_was_best_and_what_mattered(sweep: Path, capsys: Capture) -> None:
    shares = {"optim.lr": 0.25, "model.dit.lora.rank": 0.75}
    found = {"best_overrides": "optim.lr=1e-3", "importances": shares}
    (sweep / "search.json").write_text(json.dumps(found))
    assert main(["compare", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "Best settings: optim.lr=1e-3\n" in out
    told = "What the loss depended on: model.dit.lora.rank 75%, optim.lr 25%"
    assert told in out
    assert told in (sweep / "results.html").read_text()


def test_runs_are_compared_without_writing_anything(tmp_path: Path, capsys: Capture) -> None:
    one = write_run(tmp_path / "a" / "001")
    two = write_run(tmp_path / "b" / "001", config=CONFIG | {"optim": {"lr": 5e-4}})
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", str(one), str(two), str(one)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("a/001") == 1
    assert "0.0005" in captured.out
    assert "Give --out FOLDER" in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_are_written_where_it_is_asked(tmp_path: Path, sweep: Path, capsys: Capture) -> None:
    run = write_run(tmp_path / "a" / "001")
    assert main(["compare", str(run), str(sweep), "--out", str(tmp_path / "out")]) == 0
    assert "p0/001" in (tmp_path / "out" / "results.csv").read_text()
    assert not (sweep / "results.csv").exists()


@pytest.mark.parametrize(
    ("below", "phrases"),
    [
        ("nowhere", ["nowhere: there is no such folder", "sweeps/<run.name>/001"]),
        ("file", ["file: is a file, not a folder"]),
        ("empty", ["is neither a sweep's folder (sweep.json) nor a run's (run.json)"]),
        ("sweeps/pocket", ["neither", "Its newest sweep: octavo compare", "sweeps/pocket/001"]),
        ("sweeps/pocket/007", ["no such folder", "Its newest sweep: octavo compare"]),
        ("runs", ["neither", "Its runs: octavo compare", "runs/*"]),
    ],
)
def test_what_can_not_be_compared_is_explained(
    sweep: Path, tmp_path: Path, below: str, phrases: list[str], capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "runs" / "001")
    assert main(["compare", str(tmp_path / below)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [phrase for phrase in phrases if phrase not in captured.err] == [], captured.err


def test_every_wrong_folder_is_told_at_once(tmp_path: Path, capsys: Capture) -> None:
    assert main(["compare", str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    assert capsys.readouterr().err.count("Error: ") == 2


def test_comparing_loads_neither_torch_nor_hydra(sweep: Path) -> None:
    code = (
        "import sys; from framework.cli.main import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ','.join({'torch', 'lightning', 'hydra'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "compare", str(sweep)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
