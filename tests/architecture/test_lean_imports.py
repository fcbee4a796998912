"""Judging a configuration is cheap: a fresh process refuses in under 1.5 s without torch and writes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "lightning", "diffusers", "transformers", "peft", "accelerate")
MAX_REFUSAL_SECONDS = 1.5

# Runs train.py as a person would, then says on stderr what was loaded and how much processor time it took.
PROBE = """
import atexit, resource, runpy, sys
def report():
    used = resource.getrusage(resource.RUSAGE_SELF)
    heavy = [name for name in {heavy!r} if name in sys.modules]
    sys.stderr.write(f"\\nPROBE {{used.ru_utime + used.ru_stime:.3f}} {{','.join(heavy) or '-'}}\\n")
atexit.register(report)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def run_python(code: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("overrides", "phrase"),
    [
        (["model.dit.precision=fp8", "model.dit.trainable=full"], "rounded away"),
        (["model.dit.precison=fp8"], "Nearest: model.dit.precision"),
        (["model.dit.trainable=none"], "nothing trains"),
        (["recipe=nowhere"], "no recipe called 'nowhere'"),
        (["oops"], "isn't of the form key=value"),
    ],
)
def test_a_refusal_is_quick_and_leaves_no_trace(
    tmp_path: Path, overrides: list[str], phrase: str
) -> None:
    code = PROBE.format(heavy=HEAVY, script=str(ROOT / "train.py"))
    result = run_python(code, "recipe=pocket_lora", *overrides, folder=tmp_path)
    report, _, probe = result.stderr.partition("\nPROBE ")
    seconds, heavy = probe.split()
    assert result.returncode == 2, result.stderr
    assert phrase in report
    assert "Traceback" not in report
    assert result.stdout == ""
    assert heavy == "-"
    assert list(tmp_path.iterdir()) == []
    assert float(seconds) < MAX_REFUSAL_SECONDS


@pytest.mark.parametrize(
    "module",
    [
        "framework.errors",
        "framework.schema",
        "framework.schema.validate",
        "framework.compose",
        "framework.migrate",
        "framework.inventory",
        "framework.hub",
        "framework.plan.build",
        "framework.plan.chart",
        "framework.plan.table",
        "framework.cli.main",
    ],
)
def test_the_lower_layers_leave_torch_unloaded(module: str) -> None:
    result = run_python(
        f"import sys, {module}; sys.exit(','.join(n for n in {HEAVY!r} if n in sys.modules) or 0)"
    )
    assert result.returncode == 0, result.stderr


def test_planning_leaves_torch_unloaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from framework.cli.main import main; code = main(sys.argv[1:]);"
        f"sys.exit(code or ','.join(n for n in {HEAVY!r} if n in sys.modules) or 0)"
    )
    source = f"model.source={tiny_checkpoint}"
    result = run_python(
        code, "plan", "recipe=pocket_lora", source, "--json", "--no-activations", folder=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("{")
    assert list(tmp_path.iterdir()) == []
