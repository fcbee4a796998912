from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from framework.training.encode_lock import encoding_alone

HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from framework.training.encode_lock import encoding_alone
strategy = SimpleNamespace(broadcast=lambda value, src: value)
with encoding_alone(Path(sys.argv[1]), ["vae"], strategy=strategy, is_first=True):
    print("held", flush=True)
    time.sleep(60)
"""


class OneProcess:
    """The part of a strategy that the lock asks."""

    def broadcast(self, value: bool, src: int = 0) -> bool:
        return value


def alone(folder: Path, *encoders: str) -> Any:
    strategy: Any = OneProcess()
    return encoding_alone(folder, encoders, strategy=strategy, is_first=True)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "octavo")
    return caplog


def test_runs_with_other_encoders_dont_wait(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with alone(tmp_path, "vae"), alone(tmp_path, "text"):
        assert not log.messages


def test_runs_that_share_one_encoder_wait_and_say_so(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    order = []

    def second() -> None:
        with alone(tmp_path, "text", "vae"):
            order.append("second")

    with alone(tmp_path, "vae", "other"):
        thread = threading.Thread(target=second)
        thread.start()
        while not log.messages:
            time.sleep(0.01)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
    assert log.messages == ["waiting for another run that encodes the same data"]


def test_a_killed_run_gives_its_locks_back(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    begun = time.monotonic()
    with alone(tmp_path, "vae"):
        assert time.monotonic() - begun < 5


def test_an_exception_gives_the_locks_back(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="full"), alone(tmp_path, "vae"):
        raise RuntimeError("full")
    with alone(tmp_path, "vae"):
        assert not log.messages


def test_a_folder_that_cant_hold_a_lock_is_used_without(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file in the way")
    with alone(tmp_path, "vae"):
        pass


def test_the_other_processes_follow_the_first(tmp_path: Path) -> None:
    told = iter([False, True])
    strategy: Any = OneProcess()
    strategy.broadcast = lambda value, src: next(told)
    with encoding_alone(tmp_path, ["vae"], strategy=strategy, is_first=False):
        assert not (tmp_path / "locks").exists()
    assert next(told, None) is None
