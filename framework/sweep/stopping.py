"""Turns Ctrl+C and SIGTERM into a stop of all points, wherever they run."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = ".stop"
STOP, KILL = "stop", "kill"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody asked the sweep to stop."""

    def __init__(self, file: Path) -> None:
        self.asked = False
        self._file = file

    def ask(self) -> None:
        """Let every job end its point; asked again, kill it."""
        self._file.write_text(KILL if self.asked else STOP)
        self.asked = True


def is_asked(folder: Path) -> bool:
    """Whether the sweep in `folder` is to stop; asked by its jobs."""
    return (folder / STOP_FILE).exists()


def is_urgent(folder: Path) -> bool:
    """Whether points are to be killed rather than asked to end."""
    try:
        return (folder / STOP_FILE).read_text() == KILL
    except OSError:
        return False


@contextmanager
def stopping(folder: Path, *, interrupts: bool) -> Iterator[Stop]:
    """Catch both signals while the block runs, and leave a file in the sweep's folder that its jobs look for.

    So the launcher ends in its usual way, on any machine. A thread of its own acts on the signals, because some
    launchers wait in foreign code where Python doesn't come to act on them. Ctrl+C is held back in this thread and in
    what it starts: a terminal sends it to all of them, and only the sweep is to answer.
    interrupts: also raise KeyboardInterrupt in the block, for launchers whose queue nobody wants to wait for.
    """
    file = folder / STOP_FILE
    file.unlink(missing_ok=True)
    stop = Stop(file)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt

    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while numbers := os.read(reading, 16):
            for _ in filter(_SIGNALS.__contains__, numbers):
                stop.ask()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    outer = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="sweep-signals", daemon=True)
    thread.start()
    held_back = set() if interrupts else {signal.SIGINT}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        os.close(writing)
        thread.join()
        os.close(reading)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if not interrupts:  # else jobs that are still queued must find it when they start
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
