"""A point's process: started apart from the terminal's signals, ended cleanly, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

_STARTER = "OCTAVO_STARTED_BY"
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
# How long a run may take to end after it was asked; sampling or saving isn't cut before. A guess.
_GRACE_SECONDS = 120.0
_CODE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Starter:
    """The process that runs the sweep, so that points on its machine can tell when it is gone."""

    host: str
    pid: int
    created: float

    @classmethod
    def here(cls) -> Starter:
        """This process."""
        own = psutil.Process()
        return cls(socket.gethostname(), own.pid, own.create_time())

    def is_gone(self) -> bool:
        """Whether it has ended; False on other machines, where nobody can know."""
        if socket.gethostname() != self.host:
            return False
        try:
            return bool(psutil.Process(self.pid).create_time() != self.created)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def start_train(
    arguments: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    output: IO[bytes] | None,
    keep_open: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `octavo train` with this interpreter and this code, in a session of its own.

    A Ctrl+C of the terminal reaches only the sweep, which then asks its points to end, each once.
    environment: added to the present one.   output: None inherits the terminal.   keep_open: descriptors handed down.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "framework.cli", "train", *arguments],
        cwd=cwd,
        env={**os.environ, **code_environment(), **environment, _STARTER: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output if output is None else subprocess.STDOUT,
        start_new_session=True,
        pass_fds=tuple(keep_open),
    )


def code_environment() -> dict[str, str]:
    """Variables with which another interpreter finds this code, also where it isn't installed.

    The current folder stays off the path, so that a folder `framework` of the user's isn't taken for ours.
    """
    installed = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if _CODE_ROOT not in installed and str(_CODE_ROOT) not in paths:
        paths.insert(0, str(_CODE_ROOT))
    found = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    return {**found, "PYTHONSAFEPATH": "1"}


def follow_starter() -> None:
    """In a process that a sweep started: end when the sweep's process is killed, and heed Ctrl+C's signal alone.

    Linux sends SIGINT when the starter dies, which ends a run as Ctrl+C does; elsewhere the process runs to its end.
    Does nothing in a process that a person started.
    """
    starter = os.environ.pop(_STARTER, "")
    if not starter.isdigit():
        return
    # The sweep holds it back, and a shell ignores it for what runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)
        if os.getppid() != int(starter):  # it died before we asked
            sys.exit(130)
    # Slurm's notice that time is up goes to all processes of a job; the one that started this acts on it.
    for name in ("SIGUSR1", "SIGUSR2"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def wait_for(
    process: subprocess.Popen[bytes],
    *,
    reason_to_end: Callable[[], str],
    is_urgent: Callable[[], bool],
) -> str:
    """Wait until the process has ended; ask it to end as soon as there is a reason, and return that reason or "".

    is_urgent: whether to kill it at once. An exception in the meantime ends the process too.
    """
    try:
        while process.poll() is None:
            reason = reason_to_end()
            if reason:
                end(process, is_urgent=is_urgent)
                return reason
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
    except BaseException:
        end(process, is_urgent=is_urgent)
        raise
    return ""


def end(process: subprocess.Popen[bytes], *, is_urgent: Callable[[], bool]) -> None:
    """Ask a process to end as Ctrl+C would; kill it and all that it started when it is urgent or takes too long."""
    latest = time.monotonic() + _GRACE_SECONDS
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        if is_urgent() or time.monotonic() > latest:
            kill_session(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads its session, and its further processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def describe_end(code: int) -> str:
    """Say how a process ended that couldn't say it itself.   code: Popen.returncode."""
    if code >= 0:
        return f"the process ended with exit code {code} and no account of it"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    guess = "; memory may have run out" if name == "SIGKILL" else ""
    return f"the process was ended by {name}{guess}"


def lock_file(path: Path) -> Any:
    """Lock a file for as long as this process or one that was handed the descriptor lives; None if it is taken.

    Not a record lock: a point's own process must keep it when the process that started it is killed.
    """
    file = path.open("a", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # Windows: nothing keeps two processes off one point there
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
