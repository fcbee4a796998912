from __future__ import annotations

from pathlib import Path

from framework.training.metrics_csv import MetricsCsv, read_rows


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    logger.log_metrics({"loss": 0.1}, step=1)
    assert path.read_text() == "step,loss\n1,0.1\n"
    logger.log_metrics({"loss": 1 / 3}, step=2)
    assert float(read_rows(path)[1]["loss"]) == 1 / 3


def test_a_new_column_widens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    logger.log_metrics({"val": 2.0}, step=0)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.log_metrics({"val": 3.0}, step=2)
    assert path.read_text() == "step,val,loss\n0,2.0,\n1,,1.0\n2,3.0,\n"


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCsv(path)
    for step in (1, 2, 3):
        logger.log_metrics({"loss": float(step)}, step=step)
    resumed = MetricsCsv(path, resume_step=2)
    resumed.log_metrics({"loss": 9.0}, step=3)
    assert path.read_text() == "step,loss\n1,1.0\n2,2.0\n3,9.0\n"


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,lr\n1,0.5,0.1\n2,0.4")
    assert [row["step"] for row in read_rows(path)] == ["1"]
    path.write_text("step,loss,lr\n1,0.5,0.1\n2,0.4\n")
    assert [row["step"] for row in read_rows(path)] == ["1"]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n")
    MetricsCsv(path)
    assert path.read_text() == "step\n"
