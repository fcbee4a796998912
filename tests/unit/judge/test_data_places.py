"""What a configuration names as data, held against the disk; and the rules about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from framework.judge.data_places import check_data
from framework.judge.places import Findings
from framework.schema import RunConfig, data_rules
from framework.schema.findings import Judged


def config(data: dict[str, Any], output_dir: str = "outputs") -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"family": "qwen_image", "source": "nowhere"},
            "data": data,
            "run": {"name": "x", "output_dir": output_dir},
        }
    )


def found(data: dict[str, Any], output_dir: str = "outputs") -> Findings:
    findings = Findings(lambda path: "", need=True)
    check_data(config(data, output_dir), findings)
    return findings


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("pictures/a.png", "a.tar", "0.tar", "1.tar", "list.json", "list.md"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "path",
    ["pictures", "a.tar", "{0..1}.tar", "{a,0,1}.tar", "list.json", "hub://owner/name@main:train"],
)
def test_what_may_be_there(here: Path, path: str) -> None:
    findings = found({"path": path})
    assert (findings.faults, findings.warnings) == ([], [])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("picture", '"picture" does not exist'),
        ("b.tar", '"b.tar" does not exist'),
        ("{0..3}.tar", '"2.tar" does not exist'),
        ("list.md", "neither a folder nor a .csv"),
        ("empty", 'the folder "empty" is empty'),
    ],
)
def test_what_is_refused(here: Path, path: str, message: str) -> None:
    (fault,) = found({"path": path}).faults
    assert message in fault.message
    assert fault.path == "data.path"
    (fault,) = found({"sources": [{"path": "pictures"}, {"path": path}]}).faults
    assert fault.path == "data.sources[1].path"


def test_runs_inside_the_data(here: Path) -> None:
    findings = found({"sources": [{"path": "pictures"}]}, "pictures/runs")
    assert [warning.path for warning in findings.warnings] == ["run.output_dir"]
    assert "data.sources[0].path" in findings.warnings[0].message


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"path": "a"}, None),
        ({"sources": [{"path": "a"}, {"path": "b"}]}, None),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]}, None),
        ({"path": "a", "sources": [{"path": "b"}]}, "data.sources"),
        ({"path": None}, "data.path"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "data.sources[1].weight"),
        ({"sources": [{"path": "a"}], "base_dir": "b"}, "data.base_dir"),
    ],
)
def test_rules(data: dict[str, Any], path: str | None) -> None:
    judged = Judged(config(data), {"data": data}, lambda path: "")
    assert [finding.fault.path for finding in data_rules.check_data(judged)] == (
        [path] if path else []
    )
