"""Runs the broken configurations of cases.yaml as a person would, and tells what was reported."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from framework.cli.main import main
from framework.judge import Verdict, judge_run

ROOT = Path(__file__).resolve().parents[2]
CASES_FILE = Path(__file__).with_name("cases.yaml")
# The folder that the recipe of most cases trains on, so that only its own fault is reported.
DATA_FOLDER = "data/openmoji-line"


@dataclass(frozen=True)
class Case:
    """One broken configuration. faults, warnings: what must be reported; see the head of cases.yaml."""

    section: str
    title: str
    args: list[str]
    command: str = "validate"
    files: dict[str, str] = field(default_factory=dict)
    data: bool = True
    faults: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.   report: its stderr, with paths of this source tree written relative to it."""

    exit_code: int
    out: str
    report: str


def read_cases() -> list[Case]:
    sections = yaml.safe_load(CASES_FILE.read_text(encoding="utf-8"))
    return [Case(part["section"], **case) for part in sections for case in part["cases"]]


@contextlib.contextmanager
def written(case: Case, folder: Path) -> Iterator[None]:
    """Stand in a folder that holds the case's files and nothing else."""
    for name, text in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    if case.data:
        (folder / DATA_FOLDER).mkdir(parents=True)
        (folder / DATA_FOLDER / "a.png").touch()
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_case(case: Case, folder: Path) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with written(case, folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([case.command, *case.args])
    report = err.getvalue().replace(f"{folder.resolve()}/", "").replace(f"{ROOT}/", "")
    return Outcome(code, out.getvalue(), report)


def judge_case(case: Case, folder: Path) -> Verdict:
    files = "need" if case.command == "train" else "local"
    with written(case, folder):
        return judge_run(case.args, use="train", files=files)  # type: ignore[arg-type]
