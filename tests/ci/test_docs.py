"""docs/ci.md: every command on the page prints what the page says, and its files are what they claim to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT
from .page import CODES, PAGE, blocks, output_of, table_of_codes, write_files

STALE = "run `python -m tests.ci.page`"


def without_times(text: str) -> str:
    return re.sub(r"; \d+\.\d s$", "; ... s", text, flags=re.MULTILINE)


@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block.splitlines()[0])
def test_a_command_prints_what_the_page_says(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    write_files(tmp_path)
    line, _, expected = block.partition("\n")
    assert without_times(output_of(line)) == without_times(expected), STALE


def test_the_files_of_the_page_are_used_as_they_stand(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    hooks = {hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    (repository,) = yaml.safe_load(files[".pre-commit-config.yaml"])["repos"]
    assert {hook["id"] for hook in repository["hooks"]} == hooks
    caller = yaml.safe_load(files[".github/workflows/recipes.yml"])["jobs"]["validate"]
    called = caller["uses"].partition("octavo/")[2].partition("@")[0]
    inputs = yaml.safe_load((ROOT / called).read_text())[True]["workflow_call"]["inputs"]
    assert set(caller["with"]) <= set(inputs)


def test_the_page_lists_every_code() -> None:
    listed = CODES.search(PAGE.read_text(encoding="utf-8"))
    assert listed is not None
    assert listed[0] == table_of_codes(), STALE
