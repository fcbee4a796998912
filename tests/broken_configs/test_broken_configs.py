"""Each broken configuration gets the report that it should, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.errors import Fault
from tests.broken_configs.page import render_page
from tests.broken_configs.running import ROOT, Case, judge_case, read_cases, run_case

CASES = read_cases()


def test_there_are_many_and_no_two_have_one_title() -> None:
    assert len(CASES) >= 60
    assert len({case.title for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_report_names_every_fault_and_only_those(case: Case, tmp_path: Path) -> None:
    verdict = judge_case(case, tmp_path)
    reports = [(verdict.faults, case.faults)]
    if not case.faults:
        reports.append((verdict.warnings, case.warnings))
    for found, expected in reports:
        told = sorted((fault.path, fault.code) for fault in found)
        assert told == sorted((want["path"], want["code"]) for want in expected), found
        for want in expected:
            check_fault(
                next(f for f in found if (f.path, f.code) == (want["path"], want["code"])), want
            )


def check_fault(fault: Fault, want: dict[str, Any]) -> None:
    """Says what set it, what is near, and what to do next."""
    assert fault.where or fault.code == "missing-key", fault
    if "set" in want:
        assert want["set"] in fault.where, fault
    if "nearest" in want:
        assert any(want["nearest"] in near for near in (*fault.nearest, fault.hint)), fault
    assert fault.hint or fault.nearest, fault
    assert not fault.message.endswith("."), fault


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_command_reports_it_on_stderr_alone(case: Case, tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path)
    assert outcome.exit_code == (2 if case.faults else 0)
    assert "Traceback" not in outcome.report
    assert "\x1b" not in outcome.report
    told = len(case.faults or case.warnings)
    kind = "fault" if case.faults else "warning"
    assert f"{told} {kind}{'s' if told > 1 else ''} " in outcome.report
    for want in case.faults + case.warnings:
        assert want["path"] in outcome.report
        assert want.get("set", "") in outcome.report
    if case.faults:
        assert outcome.out == ""


def test_the_page_of_errors_is_fresh() -> None:
    stale = "run `python -m tests.broken_configs.page > docs/errors.md`"
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == render_page(), stale
