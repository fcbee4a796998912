"""A person's folder with recipes of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from framework.compose import compose_run
from framework.errors import Fault

Write = Callable[[str, str], Path]


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with ./recipes."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_recipe(user_folder: Path) -> Write:
    """Write recipes/<name>.yaml in that folder."""

    def write(name: str, text: str) -> Path:
        path = user_folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def faults_of() -> Callable[..., tuple[Fault, ...]]:
    """Every fault of a command line."""
    return lambda *overrides, config_dir=None: compose_run(overrides, config_dir=config_dir).faults
