"""Runs a sweep: claims its folder, starts what isn't done, and leaves a comparison."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import OctavoError, RunError
from framework.schema.sweep import (
    BasicLauncher,
    LauncherSettings,
    OptunaSweeper,
    RayLauncher,
    SubmititLocalLauncher,
    SubmititSlurmLauncher,
)
from framework.sweep.check import CheckedSweep
from framework.sweep.folder import DONE_STATES, PointRecord, SweepFolder
from framework.sweep.job import JobSettings, RunPoint, outcome_state
from framework.sweep.jobs import JobOutcome, PointJob
from framework.sweep.launchers import cancel_queued, launch
from framework.sweep.machines import ray_gpus
from framework.sweep.process import Starter
from framework.sweep.stopping import Stop, stopping

if TYPE_CHECKING:
    from framework.compose import SweepRequest

_WATCH_SECONDS = 0.5

OnChange = Callable[[PointRecord], None]


@dataclass(frozen=True)
class SweepEnd:
    """How a sweep ended.   folder: of the sweep.   records: all its points.   was_stopped: by Ctrl+C or SIGTERM."""

    folder: Path
    records: tuple[PointRecord, ...]
    was_stopped: bool


def run_points(
    request: SweepRequest,
    sweep: CheckedSweep,
    folder: SweepFolder,
    *,
    config_dir: Path | None,
    on_change: OnChange,
) -> SweepEnd:
    """Run every point that isn't done; a point that fails doesn't keep the others from running.

    folder: claimed by this process.   on_change: told when a point starts or ends.
    """
    settings = _job_settings(sweep, config_dir)
    leaves_queue = isinstance(sweep.settings.launcher, SubmititSlurmLauncher)
    with stopping(folder.path, interrupts=leaves_queue) as stop:
        starter = _Starter(sweep, folder, settings, stop, on_change)
        try:
            if sweep.points:
                folder.add_points(sweep.points)
                records = [folder.read_point(point) for point in sweep.points]
                todo = [PointJob(r.point) for r in records if r.state not in DONE_STATES]
                if todo:
                    starter.launch(todo)
            else:
                from framework.sweep.search import run_search

                sweeper = sweep.settings.sweeper
                assert isinstance(sweeper, OptunaSweeper)
                run_search(request, sweeper, folder, starter.launch, config_dir=config_dir)
        except KeyboardInterrupt:
            if leaves_queue:
                cancel_queued(folder.path)
            return SweepEnd(folder.path, tuple(folder.read_points()), was_stopped=True)
    records = folder.read_points()
    if not sweep.points or all(record.state in DONE_STATES for record in records):
        folder.finish()
    return SweepEnd(folder.path, tuple(records), was_stopped=False)


def _job_settings(sweep: CheckedSweep, config_dir: Path | None) -> JobSettings:
    launcher = sweep.settings.launcher
    on_cluster = isinstance(launcher, SubmititSlurmLauncher) or (
        isinstance(launcher, RayLauncher) and launcher.address is not None
    )
    threads = None
    if isinstance(launcher, SubmititLocalLauncher):  # joblib and Ray see to it themselves
        threads = max(1, (os.cpu_count() or 1) // launcher.n_jobs)
    return JobSettings(
        cwd=Path.cwd(),
        config_dir=config_dir.absolute() if config_dir is not None else None,
        on_terminal=isinstance(launcher, BasicLauncher),
        starter=None if on_cluster else Starter.here(),
        gpus=sweep.gpus,
        shared_gpus=sweep.shared_gpus,
        threads=threads,
        by_rank=isinstance(launcher, SubmititSlurmLauncher),
    )


class _Starter:
    """Hands points to the launcher, tells how they change, and gathers how they ended."""

    def __init__(
        self,
        sweep: CheckedSweep,
        folder: SweepFolder,
        settings: JobSettings,
        stop: Stop,
        on_change: OnChange,
    ) -> None:
        self._sweep = sweep
        self._folder = folder
        self._settings = settings
        self._stop = stop
        self._on_change = on_change

    def launch(self, jobs: Sequence[PointJob]) -> list[JobOutcome]:
        """Run these points; see `framework.sweep.jobs.Launch`."""
        if self._stop.asked:
            raise KeyboardInterrupt
        points = [job.point for job in jobs]
        before = [self._folder.read_point(point).attempts for point in points]
        here = self._settings.on_terminal
        task = RunPoint(
            self._folder.path, tuple(jobs), self._settings, self._on_change if here else None
        )
        lost = ""
        with _watched(self._folder, jobs, None if here else self._on_change):
            try:
                launch(
                    self._launcher(),
                    task,
                    len(jobs),
                    folder=self._folder.path,
                    needs=self._sweep.needs,
                )
            except OctavoError:
                raise
            except Exception as error:  # noqa: BLE001 (a launcher raises what its backend raises)
                lost = _one_line(error)
        records = [self._folder.read_point(point) for point in points]
        if self._stop.asked:
            raise KeyboardInterrupt
        if lost and [record.attempts for record in records] == before:
            name = self._sweep.settings.launcher.name
            raise RunError(
                f"the launcher {name!r} couldn't start a point",
                found=lost,
                hint="try hydra/launcher=basic to see whether the points themselves run",
            )
        return [_outcome(record, lost) for record in records]

    def _launcher(self) -> LauncherSettings:
        launcher = self._sweep.settings.launcher
        if isinstance(launcher, RayLauncher):
            return launcher.model_copy(update={"num_gpus": ray_gpus(launcher, self._sweep.needs)})
        return launcher


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _outcome(record: PointRecord, lost: str) -> JobOutcome:
    state, error = outcome_state(record), record.error
    if state == "stopped" and lost:
        state, error = "failed", f"the launcher lost it ({lost})"
    return JobOutcome(record.point, state, record.folder, summary=record.summary, error=error)


@contextmanager
def _watched(
    folder: SweepFolder, jobs: Sequence[PointJob], on_change: OnChange | None
) -> Iterator[None]:
    """Tell how points change that run in other processes, from what these write."""
    if on_change is None:
        yield
        return
    known: dict[str, Any] = {}
    done = threading.Event()

    def look() -> None:
        for job in jobs:
            record = folder.read_point(job.point, as_told=True)
            now = (record.state, record.attempts)
            if known.get(job.point.name) != now:
                known[job.point.name] = now
                on_change(record)

    def watch() -> None:
        while not done.wait(_WATCH_SECONDS):
            look()

    for job in jobs:
        record = folder.read_point(job.point, as_told=True)
        known[job.point.name] = (record.state, record.attempts)
    thread = threading.Thread(target=watch, name="sweep-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()
