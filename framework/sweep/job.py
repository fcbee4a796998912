"""One point of a sweep as a job: starts `octavo train` in a process of its own, watches it, and notes how it ended.

Runs wherever a launcher puts it: in this process, in a worker of joblib or Ray, in a Slurm job. All that it needs
travels with it or lies in the sweep's folder; all that it has to say it writes there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from framework.compose import replace_overrides
from framework.sweep.folder import (
    DONE_STATES,
    LOCK_FILE,
    LOG_FILE,
    SUMMARY_FILE,
    PointRecord,
    SweepFolder,
    numbered_folders,
    read_json,
)
from framework.sweep.jobs import OutcomeState, PointJob, PointState
from framework.sweep.process import Starter, describe_end, lock_file, start_train, wait_for
from framework.sweep.results_read import read_metrics
from framework.sweep.stopping import is_asked, is_urgent

_POLL_SECONDS = 0.2
# Looking at a run's metrics or at another process is cheap, but not free on a network folder.
_WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class JobSettings:
    """What all jobs of a launch have in common.

    cwd: where the sweep was started; relative paths in a configuration mean this folder.
    config_dir: the user's folder of recipes.
    on_terminal: points print to this process's terminal; else to log.txt.
    starter: process whose end ends the points; None where they live on without it, e.g. in Slurm's queue.
    gpus: groups of GPUs, "0" or "2,3", that points running at once are dealt.
    shared_gpus: GPUs that every point sees where none are dealt; "" leaves it to the launcher.
    threads: for each point's arithmetic on the processor; None leaves it as it is.
    by_rank: several processes of Slurm run this same job, each its share of one point.
    """

    cwd: Path
    config_dir: Path | None = None
    on_terminal: bool = False
    starter: Starter | None = None
    gpus: tuple[str, ...] = ()
    shared_gpus: str = ""
    threads: int | None = None
    by_rank: bool = False


@dataclass(frozen=True)
class RunPoint:
    """The task that launchers call with `point=<place in jobs>`. Never raises for what happens in a point.

    on_change: told when a point starts and ends; only for launchers that stay in this process.
    """

    sweep: Path
    jobs: tuple[PointJob, ...]
    settings: JobSettings
    on_change: Callable[[PointRecord], None] | None = field(default=None, compare=False)

    def __call__(self, config: Any) -> str:
        """Run the point; config.point is its place in `jobs`. Returns how it stands now."""
        starter = self.settings.starter
        elsewhere = starter is None or starter.pid != os.getpid()
        if elsewhere and threading.current_thread() is threading.main_thread():
            # Ctrl+C reaches joblib's workers too; the sweep's process says what is to be done.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with ExitStack() as stack:
            runner = _Runner(SweepFolder(self.sweep), self.jobs[int(config.point)], self.settings)
            state = runner.run(stack, self.on_change or (lambda record: None))
        if elsewhere and starter is not None and starter.is_gone():
            os._exit(
                1
            )  # a worker of a launcher that was killed: nobody is left to give it more to do
        return state


class _Runner:
    def __init__(self, sweep: SweepFolder, job: PointJob, settings: JobSettings) -> None:
        self._sweep = sweep
        self._job = job
        self._point = job.point
        self._settings = settings
        self._folder = sweep.point_folder(job.point)
        self._rank = int(os.environ.get("SLURM_PROCID", "0")) if settings.by_rank else 0
        self._watched = 0.0

    def run(self, stack: ExitStack, on_change: Callable[[PointRecord], None]) -> str:
        """Wait for the point's lock and a free GPU, run it, and note how it stands."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = None
        if self._rank == 0:
            lock = self._wait_for_lock(stack, [self._folder / LOCK_FILE])
            if lock is None:
                return "stopped"
        if self._sweep.read_point(self._point).state in DONE_STATES:
            return "finished"
        gpus = self._take_gpus(stack)
        if gpus is None or self._stop_asked():
            return "stopped"
        if self._rank == 0:
            self._sweep.begin_point(self._point)
            on_change(self._sweep.read_point(self._point))
        state, error = self._train(stack, gpus, lock)
        if self._rank == 0:
            self._sweep.end_point(self._point, state, error=error)
            on_change(self._sweep.read_point(self._point))
        return state

    # ---- what must be free first -----------------------------------------------------------------

    def _wait_for_lock(self, stack: ExitStack, files: list[Path]) -> IO[str] | None:
        """Lock the first of `files` that gets free; None when the sweep is stopped in the meantime."""
        while not self._stop_asked():
            for file in files:
                lock = lock_file(file)
                if lock is not None:
                    held: IO[str] = stack.enter_context(lock)
                    return held
            time.sleep(_POLL_SECONDS)
        return None

    def _take_gpus(self, stack: ExitStack) -> Mapping[str, str] | None:
        """The variable that shows a point its own GPUs; None when the sweep is stopped in the meantime."""
        groups = self._settings.gpus
        if not groups:
            shared = self._settings.shared_gpus
            return {"CUDA_VISIBLE_DEVICES": shared} if shared else {}
        files = [self._sweep.path / f".gpus-{group.replace(',', '-')}.lock" for group in groups]
        lock = self._wait_for_lock(stack, files)
        if lock is None:
            return None
        return {"CUDA_VISIBLE_DEVICES": groups[files.index(Path(lock.name))]}

    # ---- the point's process ---------------------------------------------------------------------

    def _train(
        self, stack: ExitStack, gpus: Mapping[str, str], lock: IO[str] | None
    ) -> tuple[PointState, str]:
        process = start_train(
            self.arguments(),
            cwd=self._settings.cwd,
            environment={**gpus, **self._threads()},
            output=self._open_log(stack),
            keep_open=[lock.fileno()] if lock is not None else [],
        )
        with _kept_as_started(self._sweep, self._job, enabled=self._rank == 0):
            reason = wait_for(
                process,
                reason_to_end=self._reason_to_end,
                is_urgent=lambda: is_urgent(self._sweep.path),
            )
        summary = read_json(self._folder / SUMMARY_FILE)
        told = summary.get("state")
        if told == "finished" and process.returncode == 0:
            return "finished", ""
        if reason == "pruned":
            return "pruned", ""
        if reason or told == "stopped":
            return "started", ""
        if told == "failed":
            return "failed", _reported_error(summary)
        return "failed", describe_end(process.returncode)

    def arguments(self) -> list[str]:
        """What follows `octavo train` for this point."""
        output = str(self._sweep.points_folder.absolute())
        changes = {"run.output_dir": output, "run.name": self._point.name}
        if (
            self._has_checkpoint()
        ):  # also where the point itself began from another run's checkpoint
            changes["checkpoint.resume"] = "auto"
        arguments = replace_overrides(self._point.overrides, changes)
        if self._settings.config_dir is not None:
            arguments += ["--config-dir", str(self._settings.config_dir)]
        return [*arguments, "--summary", str(self._folder / SUMMARY_FILE)]

    def _has_checkpoint(self) -> bool:
        runs = numbered_folders(self._folder)
        return bool(runs) and any((runs[-1] / "checkpoints").glob("*.ckpt"))

    def _threads(self) -> Mapping[str, str]:
        if self._settings.threads is None or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(self._settings.threads)}

    def _open_log(self, stack: ExitStack) -> IO[bytes] | None:
        """Where the process prints: the terminal (None), or a file that keeps what earlier starts printed."""
        if self._settings.on_terminal:
            return None
        name = LOG_FILE if self._rank == 0 else f"log-{self._rank}.txt"
        log = stack.enter_context((self._folder / name).open("ab"))
        if log.tell():
            now = datetime.now(UTC).isoformat(timespec="seconds")
            log.write(f"\n---- started again at {now} ----\n".encode())
            log.flush()
        return log

    # ---- why it should end -----------------------------------------------------------------------

    def _reason_to_end(self) -> str:
        if self._stop_asked():
            return "stopped"
        now = time.monotonic()
        if now - self._watched < _WATCH_SECONDS:
            return ""
        self._watched = now
        starter = self._settings.starter
        if starter is not None and starter.is_gone():
            return "stopped"
        return "pruned" if self._rank == 0 and self._should_prune() else ""

    def _should_prune(self) -> bool:
        spec, runs = self._job.pruning, numbered_folders(self._folder)
        if spec is None or not runs:
            return False
        from framework.sweep.search import should_prune

        return bool(should_prune(spec, read_metrics(runs[-1] / "metrics.csv")))

    def _stop_asked(self) -> bool:
        return is_asked(self._sweep.path)


@contextlib.contextmanager
def _kept_as_started(sweep: SweepFolder, job: PointJob, *, enabled: bool) -> Iterator[None]:
    """A job that is ended from outside, e.g. by Slurm, leaves a point that can be gone on with."""
    try:
        yield
    except BaseException:
        if enabled:
            sweep.end_point(job.point, "started")
        raise


def outcome_state(record: PointRecord) -> OutcomeState:
    """What a launch came to for a point."""
    if record.state == "started" or record.state == "waiting":
        return "stopped"
    return record.state


def _reported_error(summary: Mapping[str, Any]) -> str:
    """The error of a run in one sentence."""
    error = summary.get("error")
    error = error if isinstance(error, Mapping) else {}
    message, found = str(error.get("message") or "no reason was given"), error.get("found")
    faults = error.get("faults") or []
    if faults:
        message = f"{faults[0].get('path', '')}: {faults[0].get('message', '')}".lstrip(": ")
        found = f"and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{message} ({found})" if found else message
