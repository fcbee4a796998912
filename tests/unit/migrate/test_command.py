"""`octavo migrate` as a person runs it: what goes to stdout, what to stderr, exit codes, files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from framework.cli.main import main
from tests.unit.migrate.judging import COMMAND

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_recipe_alone_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "diffsynth", f"{COMMAND} --lernrate 1"]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["run"]["name"] == "Qwen-Image_lora"
    for title in ("No counterpart", "Changed in meaning", "To be checked", "Needs no setting"):
        assert title in printed.err or title == "Needs no setting"
    assert "--lernrate" in printed.err
    assert "Traceback" not in printed.err


def test_words_without_quotes_are_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.strip('"') for word in COMMAND.split()]
    assert main(["migrate", "diffsynth", *words]) == 0
    assert "rank: 32" in capsys.readouterr().out


@pytest.mark.parametrize("option", [[], ["--file"]])
def test_a_script_is_read_and_its_recipe_written(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.sh").write_text(COMMAND.replace(" --", " \\\n  --"))
    assert main(["migrate", "diffsynth", *option, "train.sh", "--out", "recipes/mine.yaml"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "recipes/mine.yaml" in printed.err
    before = Path("recipes/mine.yaml").read_text()
    assert main(["migrate", "diffsynth", "train.sh", "--out", "recipes/mine.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("recipes/mine.yaml").read_text() == before
    assert [path.name for path in Path("recipes").iterdir()] == ["mine.yaml"]
    assert main(["validate", "recipes/mine.yaml"]) == 0


def test_several_recipes_are_several_documents_or_files(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{COMMAND}\n{COMMAND} --lora_rank 4"
    assert main(["migrate", "diffsynth", text]) == 0
    assert [each["run"]["name"] for each in yaml.safe_load_all(capsys.readouterr().out)] == [
        "Qwen-Image_lora_1",
        "Qwen-Image_lora_2",
    ]
    assert main(["migrate", "diffsynth", text, "--out", "a.yaml"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["a_1.yaml", "a_2.yaml"]


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["diffsynth"], "there is nothing to migrate"),
        (["diffsynth", "nowhere.sh"], "can't be read"),
        (["diffsynth", "python train.py --lora_rank 4"], "names no model"),
        (["kohya", "x.toml"], "can't be read"),
        (["difsynth", "x"], "is not one of"),
        (["diffsynth", COMMAND, "--out", "train.sh/a.yaml"], "can't be written"),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], phrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("train.sh").touch()
    assert main(["migrate", *arguments]) == 2
    printed = capsys.readouterr()
    assert phrase in printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err


def test_torch_stays_unloaded() -> None:
    code = (
        "import sys; from framework.cli.main import main; code = main(['migrate', 'diffsynth', sys.argv[1]]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, COMMAND],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_what_must_still_be_given_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe without pictures is made all the same, and Octavo's own check says what it lacks."""
    command = COMMAND.replace(
        "--dataset_base_path data/set --dataset_metadata_path data/set/metadata.csv", ""
    )
    assert main(["migrate", "diffsynth", command]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["data"]["path"] == "???"
    assert "Octavo's own check of the recipe" in printed.err
    assert "data.path=..." in printed.err.partition("Octavo's own check")[2]
