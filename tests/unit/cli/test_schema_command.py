"""`octavo schema`: schemas and pages on stdout, or all schemas in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framework.cli.main import main
from framework.schema.json_schema import json_schema, schema_names

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", schema_names())
def test_a_schema_is_printed(name: str, capsys: Capture) -> None:
    assert main(["schema", "--of", name]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json_schema(name)
    assert captured.err == ""


def test_without_a_name_it_is_that_of_a_whole_run(capsys: Capture) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "data", "run"]


def test_the_page_of_keys_or_of_one_section(capsys: Capture) -> None:
    assert main(["schema", "--format", "markdown"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("# Configuration keys\n")
    assert "| `optim.lr` | number, > 0, < 10 | `1e-4` | `5e-5` | Peak learning rate. |" in whole
    assert "## `hydra.launcher` with `hydra/launcher=joblib`" in whole
    assert main(["schema", "--of", "optim", "--format", "markdown"]) == 0
    part = capsys.readouterr().out
    assert part.startswith("## `optim`\n")
    assert part.strip() in whole
    assert "`data.path`" not in part
    assert main(["schema", "--of", "hydra/sweeper", "--format", "markdown"]) == 0
    assert capsys.readouterr().out.strip() in whole


def test_every_schema_is_written_into_a_folder(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "new" / "schemas"
    assert main(["schema", "--write", str(folder)]) == 0
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}
    assert written == {f"{name}.json" for name in schema_names()}
    assert capsys.readouterr().out == f"{len(written)} schemas in {folder}\n"


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["--of", "modle"], ["no schema called 'modle'", "Nearest: model", "Next: "]),
        (["--write", __file__], ["the schemas can't be written", f"--write {__file__}", "Next: "]),
    ],
)
def test_what_cannot_be_done_is_reported(
    arguments: list[str], phrases: list[str], capsys: Capture
) -> None:
    assert main(["schema", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [phrase for phrase in phrases if phrase not in captured.err] == [], captured.err
