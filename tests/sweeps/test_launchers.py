"""Real sweeps with each launcher that can run on one machine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from framework.sweep.folder import SweepFolder
from tests.sweeps.sweeping import SHORT, Place, make_place, mtimes, told

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path) -> Place:
    return make_place(tmp_path, tiny_checkpoint)


def states(sweep: Path) -> list[str]:
    return [record.state for record in SweepFolder(sweep).read_points()]


def run_state(sweep: Path, point: str, run: str = "001") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((sweep / "points" / point / run / "run.json").read_text())
    return content


def test_joblib_runs_two_points_and_one_that_fails_is_tried_again(place: Place) -> None:
    broken = place.folder / "broken"
    shutil.copytree(place.pictures, broken)
    (broken / "3.png").write_bytes(b"no picture")
    command = (
        *SHORT[:2],
        f"data.path='{_escaped(place.pictures)}','{_escaped(broken)}'",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    )
    first = place.run(*command)
    assert first.returncode == 1, told(first)
    sweep = place.sweep()
    assert states(sweep) == ["finished", "failed"]
    good, bad = sorted((sweep / "points").iterdir())
    assert "Error: 1 of 2 points didn't finish" in first.stderr
    assert "3.png" in first.stderr
    assert f"{bad.relative_to(place.folder)}/log.txt" in first.stderr
    assert "3.png" in (bad / "log.txt").read_text()
    assert "Traceback" not in told(first) + (bad / "log.txt").read_text()
    with (sweep / "results.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["finished", "failed"]
    before = mtimes(good)

    shutil.copy(place.pictures / "3.png", broken / "3.png")
    second = place.run(*command)
    assert second.returncode == 0, told(second)
    assert "Going on with outputs/sweeps/tiny/001: 2 points, 1 done, 1 failed before" in (
        second.stderr
    )
    assert states(sweep) == ["finished", "finished"]
    assert mtimes(good) == before
    assert json.loads((sweep / "sweep.json").read_text())["state"] == "finished"
    assert "octavo generate" in second.stdout
    assert "--lora" in second.stdout


def test_a_killed_sweep_goes_on_where_it_was(place: Place) -> None:
    command = ("checkpoint.every_n_steps=5", "trainer.max_steps=2,120")
    process = place.start(*command)
    sweep = place.sweep()
    checkpoints = sweep / "points" / "01-max-steps-120" / "001" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("*.ckpt")), process)
    process.kill()
    output = process.communicate()
    assert "Point 2 of 2: trainer.max_steps=120" in output[1], told(output)
    assert states(sweep) == ["finished", "started"]
    before = mtimes(sweep / "points" / "00-max-steps-2")

    again = place.run(*command)
    assert again.returncode == 0, told(again)
    assert states(sweep) == ["finished", "finished"]
    assert mtimes(sweep / "points" / "00-max-steps-2") == before
    assert [path.name for path in sweep.parent.iterdir()] == ["001"]
    assert not (sweep / "points" / "01-max-steps-120" / "002").exists()
    assert "Point 2 of 2 (again): trainer.max_steps=120" in again.stderr
    assert "going on from" in again.stderr
    assert run_state(sweep, "01-max-steps-120")["step"] == 120


def test_submitit_local_runs_two_points(place: Place) -> None:
    result = place.run(*SHORT, "model.dit.precision=fp8,bf16", "hydra/launcher=submitit_local")
    assert result.returncode == 0, told(result)
    sweep = place.sweep()
    assert states(sweep) == ["finished", "finished"]
    assert any((sweep / "submitit").iterdir())
    assert "Point 1 of 2 started: model.dit.precision=fp8" in result.stderr
    assert "Point 2 of 2 finished (" in result.stderr
    assert "Traceback" not in told(result)


def test_ray_stops_by_control_c_and_goes_on(place: Place) -> None:
    command = ("checkpoint.every_n_steps=5", "trainer.max_steps=60", "optim.lr=1e-3,1e-4")
    process = place.start(*command, "hydra/launcher=ray")
    sweep = place.sweep()
    # A run without a checkpoint has nothing to go on from, and starts a new folder.
    wait_until(
        lambda: (
            len({path.parts[-4] for path in sweep.glob("points/*/001/checkpoints/*.ckpt")}) == 2
        ),
        process,
    )
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    output = process.communicate(timeout=60)
    assert process.returncode == 130, told(output)
    assert "started" in states(sweep)
    assert set(states(sweep)) <= {"started", "finished"}
    assert "Traceback" not in told(output)

    again = place.run(*command, "hydra/launcher=ray")
    assert again.returncode == 0, told(again)
    assert states(sweep) == ["finished", "finished"]
    assert {path.name for path in sweep.glob("points/*/*") if path.is_dir()} == {"001"}
    assert not (place.home / ".ray").exists()


def wait_until(condition: Any, process: Any, seconds: float = 120) -> None:
    latest = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, told(process.communicate())
        assert time.monotonic() < latest, "too slow"
        time.sleep(0.02)


def _escaped(path: Path) -> str:
    return str(path).replace("'", "\\'")
