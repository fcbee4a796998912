"""What continuous integration starts from: this source tree as it would be checked out, and a user's repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
defaults: [pocket_lora, _self_]
data: {path: pictures}
run: {name: ink}
"""
BAD = """\
defaults: [pocket_lora, _self_]
data: {path: pictures}
model:
  dit:
    precison: fp8
run: {name: chalk}
"""


def run(
    command: Sequence[str], folder: Path, environment: dict[str, str], *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it printed; with `check`, a failure of it fails the test."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a machine on which nobody has set up git, GitHub Actions or pre-commit."""
    home = tmp_path_factory.mktemp("home")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GIT_", "GITHUB_", "PRE_COMMIT", "PYTHON"))
    }
    person = {"NAME": "A. Person", "EMAIL": "person@example.com"}
    return {
        **kept,
        "HOME": str(home),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        **{
            f"GIT_{who}_{key}": value
            for who in ("AUTHOR", "COMMITTER")
            for key, value in person.items()
        },
        "PRE_COMMIT_HOME": str(home / "pre-commit"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A copy of the working tree without what git ignores, as a repository with one commit."""
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "-co", "--exclude-standard"]
    names = run(listing, ROOT, environment).stdout.split("\0")
    folder = tmp_path_factory.mktemp("source") / "octavo"
    for name in filter(None, names):
        if (ROOT / name).is_file():  # a file that was deleted, but not in git yet, is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    make_repository(folder, environment)
    return folder


@pytest.fixture
def project(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A user's repository with one good and one bad recipe."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.txt").write_text("a")
    (folder / "recipes" / "ink.yaml").write_text(GOOD)
    (folder / "recipes" / "chalk.yaml").write_text(BAD)
    make_repository(folder, environment)
    return folder


def make_repository(folder: Path, environment: dict[str, str]) -> None:
    """Put everything in a folder into the first commit of a new repository."""
    run(["git", "init", "--quiet", "--initial-branch=main"], folder, environment)
    run(["git", "add", "--all"], folder, environment)
    run(["git", "commit", "--quiet", "--message", "Start"], folder, environment)
