"""The workflow that users take: its steps are run here as GitHub Actions runs them, in a user's repository."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from .conftest import ROOT, run

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/validate-configs.yml").read_text())
TRIGGERS = WORKFLOW[True]  # YAML 1.1 reads the key `on` as true
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["validate"]["steps"]
INSTALL, VALIDATE, SARIF = "Install what judging needs", "Validate", "Write SARIF"
HEAVY = ("torch", "lightning", "diffusers", "transformers", "peft", "accelerate", "numpy")
Validate = Callable[..., CompletedProcess[str]]


def step(name: str) -> dict[str, Any]:
    return next(step for step in STEPS if step.get("name") == name)


def test_the_steps_are_those_that_are_tested_here() -> None:
    assert [s["name"] for s in STEPS if "run" in s] == [INSTALL, VALIDATE, SARIF]
    assert set(TRIGGERS["workflow_call"]["inputs"]) == {
        "targets",
        "working-directory",
        "python-version",
        "sarif",
    }
    for name in (VALIDATE, SARIF):
        assert set(step(name)["env"]) == {"OCTAVO_TARGETS"}
        assert "${{" not in step(name)["run"], "an input in a script could run anything"
    assert WORKFLOW["jobs"]["validate"]["defaults"]["run"]["shell"] == "bash"


def test_octavo_is_fetched_at_the_commit_of_the_workflow() -> None:
    fetch = step("Fetch Octavo at the commit of this workflow")["with"]
    assert fetch == {
        "repository": "${{ job.workflow_repository }}",
        "ref": "${{ job.workflow_sha }}",
        "path": ".octavo-source",
    }


def test_the_light_requirements_have_the_ranges_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        full = set(tomllib.load(file)["project"]["dependencies"])
    lines = (ROOT / "requirements" / "validate.txt").read_text().splitlines()
    light = {line for line in lines if line and not line.startswith("#")}
    assert light <= full
    assert not [line for line in light if re.split(r"[<>=]", line)[0] in HEAVY]


@pytest.fixture(scope="module")
def installed(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], source: Path
) -> dict[str, str]:
    """Run the step that installs Octavo, and return the variables that the later steps see."""
    workspace = tmp_path_factory.mktemp("workspace")
    shutil.copytree(source, workspace / ".octavo-source")
    temporary = tmp_path_factory.mktemp("runner")
    variables = {
        **environment,
        "GITHUB_ACTIONS": "true",
        "RUNNER_TEMP": str(temporary),
        "GITHUB_PATH": str(temporary / "path"),
        "GITHUB_STEP_SUMMARY": str(temporary / "summary.md"),
    }
    as_bash(step(INSTALL)["run"], workspace, variables)
    folders = Path(variables["GITHUB_PATH"]).read_text().split()
    return {**variables, "PATH": ":".join([*folders, "/usr/bin", "/bin"])}


def as_bash(
    script: str, folder: Path, variables: dict[str, str], *, check: bool = True
) -> CompletedProcess[str]:
    """Run a script as the runner does where `shell: bash` is asked for."""
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return run(command, folder, variables, check=check)


@pytest.fixture
def validate(installed: dict[str, str], project: Path) -> Validate:
    """Runs a step in the user's repository."""

    def run_step(name: str, targets: str = "--config-dir recipes") -> CompletedProcess[str]:
        variables = {**installed, "GITHUB_WORKSPACE": str(project), "OCTAVO_TARGETS": targets}
        Path(installed["GITHUB_STEP_SUMMARY"]).unlink(missing_ok=True)
        return as_bash(step(name)["run"], project, variables, check=False)

    return run_step


@pytest.mark.slow
def test_nothing_that_training_needs_is_installed(installed: dict[str, str], project: Path) -> None:
    for name in HEAVY:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is not None)"
        run(["python", "-c", code], project, installed)


@pytest.mark.slow
def test_a_bad_recipe_fails_with_an_annotation_at_its_line(
    validate: Validate, installed: dict[str, str]
) -> None:
    result = validate(VALIDATE)
    assert result.returncode == 2, result.stderr
    assert result.stderr == ""
    annotations = [line for line in result.stdout.splitlines() if line.startswith("::error")]
    (line,) = annotations
    start = "::error file=recipes/chalk.yaml,line=5,col=5,title=model.dit.precison::unknown key"
    assert line.startswith(start)
    assert "Nearest: model.dit.precision" in line
    summary = Path(installed["GITHUB_STEP_SUMMARY"]).read_text()
    assert "| `recipe=chalk` | ❌ 1 fault |" in summary


@pytest.mark.slow
def test_good_recipes_pass(validate: Validate, project: Path) -> None:
    (project / "recipes" / "chalk.yaml").unlink()
    shutil.rmtree(project / "pictures")  # a machine that only checks has no data
    result = validate(VALIDATE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(r"1 configuration: 1 valid; \d+\.\d s\n", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "code", "count"),
    [
        ("recipe=ink model.dit.precision=fp8,bf16", 0, 2),
        ("recipe=glob(i*) optim.lr=1e-4", 0, 1),
        ("recipes/ink.yaml recipes/chalk.yaml", 2, 2),
        ("--config-dir recipes --strict", 2, 2),
    ],
)
def test_the_targets_may_be_anything_that_validate_takes(
    validate: Validate, targets: str, code: int, count: int
) -> None:
    result = validate(VALIDATE, targets)
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{count} configuration")


@pytest.mark.slow
def test_keys_are_explained_and_schemas_written_without_torch_too(
    installed: dict[str, str], project: Path
) -> None:
    said = as_bash("octavo explain optim.lr recipe=ink", project, installed).stdout
    assert "  Now: 2e-3, set by " in said
    schema = as_bash("octavo schema --of recipe", project, installed).stdout
    assert schema == (ROOT / "schemas" / "recipe.json").read_text("utf-8")
    code = "import framework, pathlib; print(pathlib.Path(framework.__file__).parent)"
    package = Path(run(["python", "-c", code], project, installed).stdout.strip())
    packed = {path.relative_to(package / "schemas") for path in package.glob("schemas/**/*.json")}
    assert packed == {path.relative_to(ROOT / "schemas") for path in ROOT.glob("schemas/**/*.json")}


@pytest.mark.slow
def test_sarif_is_written_for_good_and_bad_recipes(
    validate: Validate, installed: dict[str, str], project: Path
) -> None:
    file = Path(installed["RUNNER_TEMP"], "octavo.sarif")
    assert validate(SARIF).returncode == 0, "the step before has failed the job already"
    (result,) = json.loads(file.read_text())["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "recipes/chalk.yaml"
    assert place["region"] == {"startLine": 5, "startColumn": 5}
    assert validate(SARIF, "recipe=ink").returncode == 0
    assert json.loads(file.read_text())["runs"][0]["results"] == []


@pytest.mark.slow
def test_a_crash_is_not_taken_for_a_report(validate: Validate, installed: dict[str, str]) -> None:
    broken = {**installed, "PATH": "/usr/bin:/bin", "OCTAVO_TARGETS": "recipe=ink"}
    result = as_bash(step(SARIF)["run"], Path(installed["RUNNER_TEMP"]), broken, check=False)
    assert result.returncode != 0
