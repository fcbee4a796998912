"""A run says what FP8 costs, and goes on with the layers that its error budget kept."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from framework.runtime import error_budget
from framework.runtime.encoding_report import EncodingReport, read_reports
from framework.training.encoding_log import ERROR_FILE
from tests.training.runs import change, fit_values
from tests.training.test_resume import Stopped, final_state, stop_after


def dit_report(run_dir: Path) -> EncodingReport:
    return {report.component: report for report in read_reports(run_dir / ERROR_FILE)}["dit"]


def fp8_tensors(run_dir: Path) -> int:
    groups = json.loads((run_dir / "plan.json").read_text())["components"]["dit"]["groups"]
    return int(groups["fp8"]["tensors"])


def test_a_run_with_fp8_says_what_it_costs(
    values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    values = change(values, model__dit__precision="fp8", model__text_encoder__precision="fp8")
    with caplog.at_level(logging.INFO, logger="octavo"):
        result = fit_values(values)
    reports = read_reports(result.run_dir / ERROR_FILE)
    assert [report.component for report in reports] == ["text_encoder", "dit"]
    lines = [message for message in caplog.messages if "in FP8, relative errors" in message]
    assert lines == [report.summary for report in reports]
    error = reports[1].output_error
    assert error is not None
    assert 0.001 < error < 0.1


def test_a_run_without_fp8_says_nothing(values: dict[str, Any]) -> None:
    result = fit_values(values)
    assert not (result.run_dir / ERROR_FILE).exists()


def test_measuring_changes_nothing_of_what_is_trained(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = change(values, model__dit__precision="fp8", optim__ema={"decay": 0.9})
    measured = fit_values(values)
    monkeypatch.setattr("framework.training.encoding_log.EncodingLog.on_fit_start", lambda *_: None)
    silent = fit_values(change(values, run__output_dir=str(tmp_path / "silent")))
    first, second = final_state(measured.run_dir), final_state(silent.run_dir)
    assert all(second["state_dict"][n].equal(t) for n, t in first["state_dict"].items())


def test_a_run_with_a_budget_goes_on_with_the_layers_it_kept(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = change(values, model__dit__precision="fp8")
    plain = fit_values(change(values, run__name="plain"))
    before = dit_report(plain.run_dir).output_error
    assert before is not None
    values = change(values, model__dit__fp8={"error_budget": before / 2})
    whole = fit_values(change(values, run__output_dir=str(tmp_path / "whole")))
    report = dit_report(whole.run_dir)
    assert report.output_error is not None
    assert report.output_error <= before / 2
    assert report.kept
    assert fp8_tensors(whole.run_dir) == fp8_tensors(plain.run_dir) - len(report.kept)

    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped, match="after step 2"):
            fit_values(values)
    # Its own folder is enough, whatever became of what other runs measured.
    shutil.rmtree(tmp_path / "cache" / "encoding_error")

    def refuse(*args: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(error_budget, "OutputProbe", refuse)
    result = fit_values(values)
    assert result.run_dir.name == "001"
    assert dit_report(result.run_dir) == report
    first, second = final_state(whole.run_dir), final_state(result.run_dir)
    assert first["global_step"] == second["global_step"] == 4
    assert all(second["state_dict"][n].equal(t) for n, t in first["state_dict"].items())
