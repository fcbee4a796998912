"""Starts real sweeps on the tiny checkpoint, as a person does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.training.runs import change, run_values, write_pictures

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("trainer.max_steps=2", "checkpoint.every_n_steps=1", "validation.every_n_steps=1")


@dataclass(frozen=True)
class Place:
    """A folder with a recipe `tiny`, pictures, and a home of its own."""

    folder: Path

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def sweep(self, number: int = 1, name: str = "tiny") -> Path:
        return self.folder / "outputs" / "sweeps" / name / f"{number:03d}"

    def command(self, *overrides: str) -> list[str]:
        recipes = str(self.folder / "recipes")
        script = str(ROOT / "train.py")
        return [sys.executable, script, "-m", "recipe=tiny", *overrides, "--config-dir", recipes]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(self.home)}

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*overrides),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


def make_place(folder: Path, checkpoint: Path) -> Place:
    """`folder` holds a space and a quote on purpose."""
    folder = folder / "some one's work"
    values = run_values(checkpoint, write_pictures(folder / "pictures"), folder)
    values = change(values, validation={"fraction": 0.4, "every_n_steps": 2})
    values["run"] = {"name": "tiny", "output_dir": str(folder / "outputs")}
    (folder / "recipes").mkdir(parents=True)
    (folder / "home").mkdir()
    (folder / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(values))
    return Place(folder)


def mtimes(folder: Path) -> dict[str, int]:
    """When each file below was last written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def told(result: subprocess.CompletedProcess[str] | tuple[str, str]) -> str:
    """Everything that was printed, for a failing test to show."""
    parts: Sequence[str] = (
        (result.stdout, result.stderr)
        if isinstance(result, subprocess.CompletedProcess)
        else result
    )
    return "\n---- stderr ----\n".join(parts)
