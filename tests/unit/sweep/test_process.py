from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from framework.sweep.process import (
    Starter,
    code_environment,
    describe_end,
    end,
    kill_session,
    lock_file,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[3]
FOLLOWER = """
import sys, time
from framework.sweep.process import follow_starter
follow_starter()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
# Starts a follower with Ctrl+C held back, as a sweep does, and says its number.
STARTER = """
import os, signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
environment = {**os.environ, "OCTAVO_STARTED_BY": str(os.getpid())}
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def never() -> bool:
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for a signal")
def test_a_point_ends_when_its_sweep_is_killed() -> None:
    starter = start(STARTER, FOLLOWER)
    follower = psutil.Process(int(first_line(starter)))
    starter.kill()
    starter.communicate()
    gone, alive = psutil.wait_procs([follower], timeout=10)
    assert gone == [follower], alive


def test_a_point_heeds_the_signal_that_its_sweep_holds_back() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = start(FOLLOWER, OCTAVO_STARTED_BY=str(os.getpid()))
        assert first_line(process) == "ready"
        end(process, is_urgent=never)  # type: ignore[arg-type]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.communicate()
    assert process.returncode == 130


def test_a_process_that_a_person_started_follows_nobody() -> None:
    process = start(FOLLOWER)
    assert first_line(process) == "ready"
    kill_session(process)  # type: ignore[arg-type]
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_an_urgent_end_kills_what_doesnt_listen() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = start(deaf)
    first_line(process)
    calls: list[float] = []

    def urgent() -> bool:
        calls.append(time.monotonic())
        return len(calls) > 2

    reason = wait_for(process, reason_to_end=lambda: "stopped", is_urgent=urgent)  # type: ignore[arg-type]
    assert reason == "stopped"
    assert process.returncode == -signal.SIGKILL
    assert len(calls) >= 3
    process.communicate()


def test_an_exception_while_waiting_ends_the_process() -> None:
    process = start("import time; print(1, flush=True); time.sleep(60)")
    first_line(process)

    def requeued() -> str:
        raise SystemExit(-1)

    with pytest.raises(SystemExit, match="-1"):
        wait_for(process, reason_to_end=requeued, is_urgent=never)  # type: ignore[arg-type]
    assert process.returncode == -signal.SIGINT
    process.communicate()


def test_a_point_keeps_its_lock_when_its_starter_closes_it(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / ".lock")
    assert lock is not None
    assert lock_file(tmp_path / ".lock") is None
    point = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()]
    )
    lock.close()
    assert lock_file(tmp_path / ".lock") is None
    point.kill()
    point.communicate()
    again = lock_file(tmp_path / ".lock")
    assert again is not None
    again.close()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-9, "the process was ended by SIGKILL; memory may have run out"),
        (-11, "the process was ended by SIGSEGV"),
        (3, "the process ended with exit code 3 and no account of it"),
    ],
)
def test_an_end_without_an_account_is_described(code: int, text: str) -> None:
    assert describe_end(code) == text


def test_the_starter_is_known_by_more_than_its_number() -> None:
    here = Starter.here()
    assert not here.is_gone()
    assert Starter(here.host, here.pid, here.created - 5).is_gone()
    assert not Starter("another machine", 1, 0.0).is_gone()


def test_workers_find_this_code_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "framework").mkdir()
    (tmp_path / "framework" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    code = "import framework; print(framework.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **code_environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == ROOT / "framework" / "__init__.py"


def test_a_file_of_the_users_isnt_taken_for_pythons_own(tmp_path: Path) -> None:
    for name in ("timeit", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(
        [sys.executable, "-m", "framework.cli", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("octavo ")
