from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.sweep.stopping import is_asked, is_urgent, stopping


def wait_until(condition: Callable[[], bool]) -> None:
    latest = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_note_and_a_second_one_presses(tmp_path: Path, number: int) -> None:
    handler = signal.getsignal(number)
    with stopping(tmp_path, interrupts=False) as stop:
        assert not is_asked(tmp_path)
        os.kill(os.getpid(), number)
        wait_until(lambda: is_asked(tmp_path))
        assert stop.asked
        assert not is_urgent(tmp_path)
        os.kill(os.getpid(), number)
        wait_until(lambda: is_urgent(tmp_path))
    assert not is_asked(tmp_path)
    assert signal.getsignal(number) is handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_note_of_an_earlier_stop_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".stop").write_text("kill")
    with stopping(tmp_path, interrupts=False):
        assert not is_asked(tmp_path)


def test_a_queue_isnt_waited_for_and_finds_the_note_later(tmp_path: Path) -> None:
    def wait_in_queue() -> None:
        with stopping(tmp_path, interrupts=True):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait_in_queue()
    assert time.monotonic() - begun < 5
    wait_until(lambda: is_asked(tmp_path))


def test_what_the_sweep_starts_doesnt_get_control_c(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lives')"
    with stopping(tmp_path, interrupts=False):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"lives\n"


def test_outside_the_main_thread_signals_stay_as_they_are(tmp_path: Path) -> None:
    asked = []

    def sweep() -> None:
        with stopping(tmp_path, interrupts=False) as stop:
            stop.ask()
            asked.append(is_asked(tmp_path))

    thread = threading.Thread(target=sweep)
    thread.start()
    thread.join()
    assert asked == [True]
