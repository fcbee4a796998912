"""What is read from a sweep's folder, in whatever state it is, and how its points are ranked."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from framework.errors import RunError
from framework.sweep.results import collect, collect_runs, write_results
from framework.sweep.results_read import read_metrics, read_run
from framework.sweep.results_rows import PointResult, differing_basis
from tests.unit.sweep.folders import CONFIG, write_point, write_run, write_sweep

LR = "optim.lr"


def changed(path: str, value: Any) -> dict[str, Any]:
    """The run's configuration with one other value."""
    config = copy.deepcopy(CONFIG)
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return config


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Five points: good, better, pruned, failed, never started."""
    folder = write_sweep(
        tmp_path / "sweeps" / "pocket" / "001",
        [{LR: "1e-3"}, {LR: "1e-4"}, {LR: "1e-5"}, {LR: "1"}, {LR: "2"}],
    )
    write_point(folder, "p0", summary={"seconds": 70.0, "peak_memory_bytes": 3 * 2**30})
    write_point(folder, "p1", losses={0: 1.5, 200: 0.4, 400: 0.45})
    write_point(folder, "p2", state="pruned", losses={0: 1.5, 200: 0.1})
    shutil.rmtree(write_point(folder, "p3", state="failed", error="memory is full") / "001")
    return folder


def write_point_state(folder: Path, name: str, state: str) -> None:
    (folder / "points" / name / "point.json").write_text(json.dumps({"state": state}))


def states(rows: list[PointResult]) -> list[tuple[int, str]]:
    return [(row.index, row.state) for row in rows]


def test_finished_points_stand_first_by_their_last_loss_and_the_rest_follows(sweep: Path) -> None:
    rows = collect(sweep)
    assert states(rows) == [
        (1, "finished"),
        (0, "finished"),
        (2, "pruned"),
        (3, "failed"),
        (4, "waiting"),
    ]
    assert [row.index for row in rows if row.is_best] == [1]
    assert (rows[0].run.validation_loss, rows[0].run.best_validation) == (0.45, (200, 0.4))
    assert rows[3].reason == "memory is full"


def test_what_is_missing_stays_unknown(sweep: Path) -> None:
    waiting = collect(sweep)[-1].run
    known = (waiting.validation_loss, waiting.seconds, waiting.peak_memory_bytes, waiting.steps)
    assert known == (None, None, None, None)
    assert waiting.folder is None


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "run.json", "plan.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00", b"a: [\n", b"[1]\n", b'"x'])
def test_no_broken_file_stops_the_table(sweep: Path, name: str, content: bytes | None) -> None:
    file = sweep / "points" / "p0" / "001" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    rows = collect(sweep)
    assert len(rows) == 5
    write_results(sweep, rows)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"points": 3}'])
def test_a_folder_without_a_sweep_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunError, match="no sweep lies in this folder"):
        collect(tmp_path)


def test_a_run_that_finished_unnoticed_counts_as_finished(sweep: Path) -> None:
    write_point_state(sweep, "p0", "started")
    assert (0, "finished") in states(collect(sweep))


def test_the_newest_run_of_a_point_counts_and_an_older_summary_doesnt(sweep: Path) -> None:
    write_run(
        sweep / "points" / "p0" / "002",
        losses={0: 1.5, 200: 0.9},
        state={"state": "running", "step": 200},
    )
    write_point_state(sweep, "p0", "started")
    row = next(row for row in collect(sweep) if row.index == 0)
    assert row.run.validation_loss == 0.9
    assert row.run.peak_memory_bytes == 2**30 + 200
    assert (row.run.seconds, row.run.time_covers) == (100.0, "steps")


def test_the_time_of_a_pruned_point_is_that_of_its_run(sweep: Path) -> None:
    told = {"state": "stopped", "seconds": 12.5}  # as a run that was ended from outside tells it
    (sweep / "points" / "p2" / "summary.json").write_text(json.dumps(told))
    row = next(row for row in collect(sweep) if row.index == 2)
    assert (row.state, row.run.seconds, row.run.time_covers) == ("pruned", 12.5, "run")


@pytest.mark.parametrize(
    ("state", "summary", "seconds", "covers"),
    [
        ({"seconds": 99.5}, {"seconds": 20.0}, 99.5, "run"),
        ({}, {"seconds": 20.0}, 20.0, "run"),
        ({"started": "later"}, {"seconds": 20.0}, 200.0, "steps"),
        ({}, None, 200.0, "steps"),
    ],
    ids=["all sessions", "one session", "gone on with", "no summary"],
)
def test_time_is_of_all_sessions_or_says_what_it_covers(
    tmp_path: Path,
    state: dict[str, Any],
    summary: dict[str, Any] | None,
    seconds: float,
    covers: str,
) -> None:
    run = read_run(write_run(tmp_path / "001", state=state), summary=summary)
    assert (run.seconds, run.time_covers) == (seconds, covers)


def test_a_resumed_run_without_a_record_of_steps_tells_its_last_session(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "001", losses={}, state={"started": "later"})
    run = read_run(folder, summary={"seconds": 20.0})
    assert (run.seconds, run.time_covers) == (20.0, "last session")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,val/loss\n10,0.5\n20,0.")
    assert read_metrics(file) == [{"step": "10", "val/loss": "0.5"}]


@pytest.mark.parametrize("line", ["20", "20,0.4,9", "x,0.4", ",0.4"])
def test_a_row_that_makes_no_sense_is_left_out(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text(f"step,val/loss\n10,0.5\n{line}\n")
    assert [row["step"] for row in read_metrics(file)] == ["10"]


def test_a_loss_that_is_no_number_never_wins(sweep: Path) -> None:
    write_point(sweep, "p1", losses={0: 1.5, 400: float("nan")})
    rows = collect(sweep)
    assert [row.index for row in rows if row.is_best] == [0]
    assert states(rows)[:2] == [(0, "finished"), (1, "finished")]
    paths = write_results(sweep, rows)
    told = json.loads(paths[1].read_text())["points"]
    assert told[1]["validation_loss"] is None
    assert ",nan," in paths[0].read_text()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("validation.fraction", 0.2),
        ("validation.sigmas", [0.1]),
        ("data.path", "data/other"),
        ("objective.loss", "huber"),
        ("model.source", "other/model"),
        ("model.vae.precision", "fp8"),
    ],
)
def test_losses_on_other_pictures_are_split_into_groups(sweep: Path, path: str, value: Any) -> None:
    write_point(sweep, "p4", losses={0: 1.5, 400: 0.2}, config=changed(path, value))
    rows = collect(sweep)
    assert [(row.index, row.group) for row in rows[:3]] == [(1, "A"), (0, "A"), (4, "B")]
    assert [row.index for row in rows if row.is_best] == [1, 4]
    assert path in differing_basis(rows)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("validation.every_n_steps", 100),
        ("optim.lr", 0.5),
        ("model.dit.precision", "bf16"),
        ("objective.huber_delta", 0.5),
    ],
)
def test_what_doesnt_move_the_yardstick_leaves_losses_comparable(
    sweep: Path, path: str, value: Any
) -> None:
    write_point(sweep, "p4", losses={0: 1.5, 400: 0.2}, config=changed(path, value))
    rows = collect(sweep)
    assert {row.group for row in rows} == {"A", ""}
    assert [row.index for row in rows if row.is_best] == [4]
    assert differing_basis(rows) == ()


def test_runs_are_compared_by_what_their_configurations_differ_in(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "001")
    other = changed("optim.lr", 5e-4) | {"run": {"name": "b"}, "sample": {"prompts": []}}
    two = write_run(tmp_path / "b" / "001", config=other, losses={0: 1.5, 400: 0.3})
    rows = collect_runs([one, two])
    assert [(row.name, row.changes) for row in rows] == [
        ("b/001", {"optim.lr": "0.0005"}),
        ("a/001", {"optim.lr": "0.001"}),
    ]


def test_the_csv_has_one_row_per_point_with_units_in_its_heads(sweep: Path) -> None:
    path = write_results(sweep)[0]
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["optim.lr"] for row in rows] == ["1e-4", "1e-3", "1e-5", "1", "2"]
    second = rows[1]
    assert (second["time_s"], second["time_covers"]) == ("70.0", "run")
    assert (second["peak_memory_GiB"], second["memory_of"]) == ("3.0", "device")
    assert second["run_folder"] == "points/p0/001"
    assert (rows[3]["state"], rows[3]["reason"]) == ("failed", "memory is full")
    assert rows[4]["validation_loss"] == ""


def test_the_json_is_stable_and_holds_the_curves(sweep: Path) -> None:
    first = write_results(sweep)[1].read_text()
    assert write_results(sweep)[1].read_text() == first
    content = json.loads(first)
    assert content["version"] == 1
    assert content["keys"] == ["optim.lr"]
    best = content["points"][0]
    assert best["best"] is True
    assert best["validation_curve"] == [[0, 1.5], [200, 0.4], [400, 0.45]]
    assert best["overrides"] == ["recipe=pocket", "optim.lr=1e-4"]


def test_results_of_runs_go_where_they_are_wanted(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "deep"
    paths = write_results(sweep, out=out)
    assert {path.parent for path in paths} == {out}
    assert "../../sweeps/pocket/001/points/p0/001" in paths[0].read_text()
    assert not (sweep / "results.csv").exists()
