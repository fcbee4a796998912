"""The hooks that users take: pre-commit runs them here in a user's repository, from a clone of this source tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from .conftest import ROOT, run

HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}


def test_the_hooks_use_the_octavo_that_is_installed() -> None:
    """An environment made by pre-commit would hold torch and all else that training needs."""
    assert set(HOOKS) == {"octavo-validate", "octavo-validate-all"}
    assert {hook["language"] for hook in HOOKS.values()} == {"system"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "code", "phrases"),
    [
        (["recipes/ink.yaml"], 0, ["Passed"]),
        (
            ["recipes/ink.yaml", "recipes/chalk.yaml"],
            1,
            [
                "Failed",
                "- exit code: 2",
                "model.dit.precison: unknown key",
                "Set by: recipes/chalk.yaml:5:5",
                "In: 1 of 2 configurations: recipes/chalk.yaml",
                "2 configurations: 1 valid, 1 with faults",
            ],
        ),
        (["pictures/a.txt"], 0, ["(no files to check)Skipped"]),
    ],
    ids=["good", "bad", "no recipe"],
)
def test_the_files_of_a_commit_are_judged(
    files: list[str],
    code: int,
    phrases: list[str],
    project: Path,
    source: Path,
    environment: dict[str, str],
) -> None:
    command = ["pre-commit", "try-repo", str(source), "octavo-validate", "--files", *files]
    result = run(command, project, environment, check=False)
    text = result.stdout + result.stderr
    assert result.returncode == code, text
    assert [phrase for phrase in phrases if phrase not in text] == [], text


@pytest.mark.slow
def test_a_commit_with_a_bad_recipe_is_refused(
    project: Path, source: Path, environment: dict[str, str]
) -> None:
    revision = run(["git", "rev-parse", "HEAD"], source, environment).stdout.strip()
    hooks = [{"id": name} for name in HOOKS]
    config = {"repos": [{"repo": str(source), "rev": revision, "hooks": hooks}]}
    (project / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    run(["pre-commit", "install"], project, environment)
    chalk = project / "recipes" / "chalk.yaml"
    chalk.write_text(f"{chalk.read_text()}# changed\n")
    run(["git", "add", "--all"], project, environment)
    refused = run(["git", "commit", "-m", "Bad"], project, environment, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("model.dit.precison: unknown key") == 2, "both hooks say it"
    chalk.write_text(chalk.read_text().replace("precison", "precision"))
    run(["git", "add", "--all"], project, environment)
    run(["git", "commit", "-m", "Good"], project, environment)
