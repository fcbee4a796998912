"""A point as a job, with a small stand-in for `octavo train` that needs no torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framework.sweep import job as job_module
from framework.sweep import process as process_module
from framework.sweep import search
from framework.sweep.folder import PointRecord, SweepFolder, read_json
from framework.sweep.job import JobSettings, RunPoint
from framework.sweep.jobs import Point, PointJob, PruningSpec
from framework.sweep.process import Starter, lock_file

POINT = Point(0, "00-lr-1", ("recipe=a", "run.name=mine", "optim.lr=1"), {"optim.lr": "1"})
START = (
    "import json, os, sys, time, signal; from pathlib import Path; summary = Path(sys.argv[1])\n"
)
FINISH = START + "summary.write_text(json.dumps({'state': 'finished', 'val_loss': 0.5}))"
FAIL = START + (
    "summary.write_text(json.dumps({'state': 'failed', 'error': "
    "{'message': 'no such folder', 'found': 'nothing', 'faults': []}})); sys.exit(2)"
)
# Ends as a run does that Ctrl+C stops; the run folder says that it has begun.
RUN = START + (
    "run = summary.parent / '001'; run.mkdir(exist_ok=True)\n"
    "(run / 'metrics.csv').write_text('step,val/loss\\n1,0.5\\n')\n"
    "try:\n    time.sleep(60)\n"
    "except KeyboardInterrupt:\n"
    "    summary.write_text(json.dumps({'state': 'stopped'})); sys.exit(130)"
)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder.claim(tmp_path / "sweeps" / "a", key="k")
    folder.describe(key="k", command=["octavo"], launcher="basic")
    folder.add_points([POINT])
    return folder


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A job in a process of its own ignores Ctrl+C; here it is this process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was started, each {"arguments", "environment"}; `code` of the first entry is what is run."""
    calls: list[dict[str, Any]] = []

    def start(
        arguments: Sequence[str], *, environment: Mapping[str, str], output: Any, **rest: Any
    ) -> subprocess.Popen[bytes]:
        calls.append({"arguments": list(arguments), "environment": dict(environment)})
        summary = arguments[arguments.index("--summary") + 1]
        return subprocess.Popen(
            [sys.executable, "-c", job_module.CODE, summary],  # type: ignore[attr-defined]
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    monkeypatch.setattr(job_module, "start_train", start)
    monkeypatch.setattr(job_module, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(process_module, "_POLL_SECONDS", 0.02)
    return calls


def run(
    folder: SweepFolder,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    pruning: PruningSpec | None = None,
    on_change: Callable[[PointRecord], None] | None = None,
    **settings: Any,
) -> PointRecord:
    monkeypatch.setattr(job_module, "CODE", code, raising=False)
    ours = JobSettings(cwd=Path.cwd(), **{"starter": Starter.here(), **settings})
    task = RunPoint(folder.path, (PointJob(POINT, pruning),), ours, on_change)
    task(SimpleNamespace(point=0))
    return folder.read_point(POINT)


def test_a_point_that_ends_well_is_finished(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    record = run(folder, FINISH, monkeypatch, on_change=lambda record: seen.append(record.state))
    assert (record.state, record.summary["val_loss"]) == ("finished", 0.5)
    assert seen == ["started", "finished"]
    run(folder, FINISH, monkeypatch)
    assert len(started) == 1, "a finished point isn't run again"


def test_a_point_gets_its_own_name_and_folder(
    folder: SweepFolder,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run(folder, FINISH, monkeypatch, config_dir=tmp_path)
    point = folder.points_folder / POINT.name
    assert started[0]["arguments"] == [
        "recipe=a",
        "optim.lr=1",
        f"run.output_dir={folder.points_folder}",
        "run.name=00-lr-1",
        "--config-dir",
        str(tmp_path),
        "--summary",
        str(point / "summary.json"),
    ]


def test_a_point_with_a_checkpoint_goes_on_from_it(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = folder.point_folder(POINT) / "001" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-00000002.ckpt").touch()
    run(folder, FINISH, monkeypatch)
    assert "checkpoint.resume=auto" in started[0]["arguments"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (FAIL, "no such folder (nothing)"),
        ("import os; os.kill(os.getpid(), 9)", "the process was ended by SIGKILL; memory may"),
        ("import sys; sys.exit(7)", "the process ended with exit code 7 and no account of it"),
    ],
    ids=["told", "killed", "silent"],
)
def test_a_point_that_fails_says_why(
    folder: SweepFolder,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    error: str,
) -> None:
    record = run(folder, code, monkeypatch)
    assert record.state == "failed"
    assert record.error.startswith(error)
    again = run(folder, FINISH, monkeypatch)
    assert (again.state, again.error, again.attempts) == ("finished", "", 2)


def test_several_faults_are_told_by_the_first(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = {"path": "optim.lr", "message": "must be greater than 0"}
    summary = {"state": "failed", "error": {"message": "2 faults", "faults": [fault, fault]}}
    code = START + f"summary.write_text({json.dumps(json.dumps(summary))}); sys.exit(2)"
    record = run(folder, code, monkeypatch)
    assert record.error == "optim.lr: must be greater than 0 (and 1 more)"


def test_a_stop_of_the_sweep_stops_the_point(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        while not (folder.point_folder(POINT) / "001" / "metrics.csv").exists():
            time.sleep(0.01)
        (folder.path / ".stop").write_text("stop")

    thread = threading.Thread(target=stop)
    thread.start()
    record = run(folder, RUN, monkeypatch)
    thread.join()
    assert (record.state, record.summary["state"]) == ("started", "stopped")
    run(folder, RUN, monkeypatch)
    assert len(started) == 1, "nothing starts while the sweep is stopped"


def test_a_point_that_stops_by_itself_can_be_gone_on_with(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = START + "summary.write_text(json.dumps({'state': 'stopped'})); sys.exit(1)"
    assert run(folder, code, monkeypatch).state == "started"


def test_a_point_ends_when_its_sweep_is_gone(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Starter.here()
    gone = Starter(here.host, here.pid, here.created - 1)
    code = START + "time.sleep(60)"
    begun = time.monotonic()
    assert run(folder, code, monkeypatch, starter=gone).state == "started"
    assert time.monotonic() - begun < 20


def test_pruning_stops_a_point(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def should_prune(spec: PruningSpec, rows: Sequence[Mapping[str, str]]) -> bool:
        asked.append((spec.trial, rows))
        return bool(rows)

    monkeypatch.setattr(search, "should_prune", should_prune)
    spec = PruningSpec("study.log", "s", trial=4)
    record = run(folder, RUN, monkeypatch, pruning=spec)
    assert record.state == "pruned"
    assert asked[-1] == (4, [{"step": "1", "val/loss": "0.5"}])


def test_a_point_waits_while_another_process_runs_it(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = folder.point_folder(POINT)
    point.mkdir(parents=True)
    lock = lock_file(point / ".lock")
    assert lock is not None

    def finish_elsewhere() -> None:
        time.sleep(0.5)
        folder.begin_point(POINT)
        folder.end_point(POINT, "finished")
        lock.close()

    thread = threading.Thread(target=finish_elsewhere)
    thread.start()
    assert run(folder, FINISH, monkeypatch).state == "finished"
    thread.join()
    assert started == []


def test_points_at_once_get_gpus_of_their_own(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lock_file(folder.path / ".gpus-0-1.lock")
    assert first is not None
    run(folder, FINISH, monkeypatch, gpus=("0,1", "2,3"))
    first.close()
    assert started[0]["environment"]["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_shared_gpus_and_threads_are_told(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run(folder, FINISH, monkeypatch, shared_gpus="0,1", threads=3)
    assert started[0]["environment"] == {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "3"}


def test_what_a_point_prints_is_kept_over_its_starts(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, "print('first'); import sys; sys.exit(1)", monkeypatch)
    run(folder, "print('second'); import sys; sys.exit(1)", monkeypatch)
    lines = (folder.point_folder(POINT) / "log.txt").read_text().splitlines()
    assert [lines[0], lines[-1]] == ["first", "second"]
    assert any(line.startswith("---- started again at ") for line in lines)


def test_further_processes_of_slurm_leave_the_notes_to_the_first(
    folder: SweepFolder, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    code = "print('of the second process')"
    assert run(folder, code, monkeypatch, by_rank=True, starter=None).state == "waiting"
    point = folder.point_folder(POINT)
    assert (point / "log-1.txt").read_text() == "of the second process\n"
    assert read_json(point / "point.json") == {}
    assert len(started) == 1
