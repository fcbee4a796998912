"""A sweep's folder: which points it has, how each of them stands, and who may work in it.

    <output_dir>/sweeps/<name>/<NNN>/
        sweep.json                          the command, its points and whether all is done
        points/<point name>/<NNN>/          run folders, as `octavo train` writes them
        points/<point name>/point.json      how the point stands
        points/<point name>/summary.json    what its run reported    log.txt   what it printed
        results.csv   results.html   results.json

Every file is whole or absent, and a killed process gives its lock back, so that the same command can always go on.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from framework.atomic import remove_partial_files, write_text
from framework.errors import RunError
from framework.schema.run import RunConfig
from framework.sweep.jobs import Point, PointState

SWEEPS_FOLDER = "sweeps"
SWEEP_FILE = "sweep.json"
POINTS_FOLDER = "points"
POINT_FILE = "point.json"
SUMMARY_FILE = "summary.json"
LOG_FILE = "log.txt"
LOCK_FILE = ".lock"
DONE_STATES: tuple[PointState, ...] = ("finished", "pruned")
_RUN_FILE = "run.json"
_VERSION = 1
_MAX_NAME = 80
# What doesn't change what a run computes may differ between a stopped sweep and the command that goes on with it.
_FREE_KEYS = (
    ("run", "name"),
    ("run", "output_dir"),
    ("checkpoint", "resume"),
    ("trainer", "log_every_n_steps"),
    ("logger",),
)


@dataclass(frozen=True)
class PointRecord:
    """How a point stands.

    folder: `<sweep>/points/<name>`.   summary: what its last run reported; empty while it runs and where it was killed.
    error: one sentence, "" unless `failed`.   attempts: how often it was started.
    """

    point: Point
    state: PointState
    folder: Path
    summary: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    attempts: int = 0


class SweepFolder:
    """A sweep's folder. Only the process that has claimed it may add points or call it finished."""

    def __init__(self, path: Path, lock: FileLock | None = None) -> None:
        """path: of the folder; to read it needs no claim."""
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, parent: Path, *, key: str, anew: bool = False) -> SweepFolder:
        """Take the newest unfinished sweep of this key that nobody works in, or make the next number.

        parent: `<output_dir>/sweeps/<name>`.   anew: never go on with an earlier one.
        Two processes never get the same folder. RunError where the folder can't be made.
        """
        for path in [] if anew else reversed(numbered_folders(parent)):
            content = read_json(path / SWEEP_FILE)
            if content.get("key") != key:
                continue
            if content.get("state") == "finished":
                break
            lock = _try_lock(path)
            if lock is None:
                continue
            if read_json(path / SWEEP_FILE).get("state") == "finished":  # in this very moment
                lock.release()
                break
            remove_partial_files(path)
            return cls(path, lock)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                existing = numbered_folders(parent)
                path = parent / f"{int(existing[-1].name) + 1 if existing else 1:03d}"
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                lock = _try_lock(path)
                if lock is not None:
                    return cls(path, lock)
        except OSError as error:
            raise RunError(
                "the sweep's folder can't be made",
                where=str(parent),
                found=str(error),
                hint="choose another run.output_dir",
            ) from error

    def release(self) -> None:
        """Give the claim back; a killed process gives it back too."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # ---- the sweep -------------------------------------------------------------------------------

    def read(self) -> dict[str, Any]:
        """Content of sweep.json; empty where there is none yet."""
        return read_json(self.path / SWEEP_FILE)

    def describe(
        self, *, key: str, command: Sequence[str], launcher: str, config_dir: Path | None = None
    ) -> None:
        """Write or renew what the sweep is; its points and its first day stay."""
        before = self.read()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(
            {
                "version": _VERSION,
                "state": "running",
                "key": key,
                "command": list(command),
                "cwd": str(Path.cwd()),
                "config_dir": str(config_dir) if config_dir is not None else None,
                "launcher": launcher,
                "created": before.get("created", now),
                "points": before.get("points", []),
            }
        )

    def points(self) -> list[Point]:
        """Every point, in order."""
        return [
            Point(entry["index"], entry["name"], tuple(entry["overrides"]), entry["changes"])
            for entry in self.read().get("points", [])
        ]

    def add_points(self, points: Iterable[Point]) -> None:
        """Put further points at the end; one whose number is there already is left as it is."""
        content = self.read()
        known = {entry["index"] for entry in content["points"]}
        content["points"] += [
            {
                "index": point.index,
                "name": point.name,
                "overrides": list(point.overrides),
                "changes": dict(point.changes),
            }
            for point in points
            if point.index not in known
        ]
        self._write(content)

    def finish(self) -> None:
        """Say that nothing is left to do; the same command starts a new sweep from now on."""
        self._write(self.read() | {"state": "finished"})

    def _write(self, content: Mapping[str, Any]) -> None:
        write_text(self.path / SWEEP_FILE, json.dumps(content, indent=2) + "\n")

    # ---- its points ------------------------------------------------------------------------------

    @property
    def points_folder(self) -> Path:
        """Where the points' folders lie; it is their `run.output_dir`."""
        return self.path / POINTS_FOLDER

    def point_folder(self, point: Point) -> Path:
        """Folder of one point, whether it exists or not."""
        return self.points_folder / point.name

    def read_points(self) -> list[PointRecord]:
        """How every point stands, in order."""
        return [self.read_point(point) for point in self.points()]

    def read_point(self, point: Point, *, as_told: bool = False) -> PointRecord:
        """How one point stands; `waiting` where it was never started.

        as_told: believe what its process noted last, also where the run's own last file says more.
        """
        folder = self.point_folder(point)
        told = read_json(folder / POINT_FILE)
        state: PointState = told.get("state", "waiting")
        if state == "started" and not as_told and _has_finished_run(folder):
            state = "finished"  # killed between the run's last file and this note
        return PointRecord(
            point,
            state=state,
            folder=folder,
            summary=read_json(folder / SUMMARY_FILE),
            error=told.get("error", ""),
            attempts=told.get("attempts", 0),
        )

    def begin_point(self, point: Point) -> None:
        """Note that a point starts, and forget what an earlier start of it reported."""
        file = self.point_folder(point) / POINT_FILE
        attempts = read_json(file).get("attempts", 0) + 1
        (file.parent / SUMMARY_FILE).unlink(missing_ok=True)
        self._write_point(file, state="started", attempts=attempts, host=socket.gethostname())

    def end_point(self, point: Point, state: PointState, *, error: str = "") -> None:
        """Note how a point stands after its process has ended."""
        file = self.point_folder(point) / POINT_FILE
        self._write_point(file, **read_json(file) | {"state": state, "error": error})

    def _write_point(self, file: Path, **content: Any) -> None:
        """Only the process that runs the point may, while it holds the point's lock."""
        content["changed"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(file, json.dumps(content, indent=2) + "\n")


def numbered_folders(parent: Path) -> list[Path]:
    """Folders in `parent` that are called by a number, lowest first."""
    if not parent.is_dir():
        return []
    folders = [path for path in parent.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def _has_finished_run(point_folder: Path) -> bool:
    runs = numbered_folders(point_folder)
    return bool(runs) and read_json(runs[-1] / _RUN_FILE).get("state") == "finished"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none or it isn't ours."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sweep_key(configs: Sequence[RunConfig], *more: object) -> str:
    """Hash of everything that decides what the sweep's runs compute; equal keys may go on with each other.

    configs: of all points, in order.   more: what else decides, e.g. a search's ranges; JSON values.
    """
    values = []
    for config in configs:
        content = config.model_dump(mode="json")
        for *parents, last in _FREE_KEYS:
            section = content
            for name in parents:
                section = section[name]
            section.pop(last)
        values.append(content)
    return hashlib.sha256(json.dumps([values, more], sort_keys=True).encode()).hexdigest()


def sweep_name(configs: Sequence[RunConfig]) -> str:
    """Name of a sweep: that of its runs; the names joined where several recipes are swept."""
    return "+".join(dict.fromkeys(config.run.name for config in configs))[:_MAX_NAME]


def point_name(index: int, changes: Mapping[str, str], *, count: int) -> str:
    """Name of a point's folder and run, e.g. "03-precision-fp8-lr-1e-4"; unique, because the number stands in it.

    changes: by dotted key.   count: of all points; decides how many digits the number has.
    """
    short = short_keys(list(changes))
    words = [f"{index:0{max(2, len(str(count - 1)))}d}"]
    words += [f"{short[key]}-{value}" for key, value in changes.items()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words).replace("_", "-"))
    return re.sub(r"-{2,}", "-", name)[:_MAX_NAME].rstrip("-.")


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of each key that tell it from the others: "lr", or "dit.lr" beside "vae.lr"."""
    short = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in keys if other != key]
        free = (tail for tail in tails if not any(o.endswith(f".{tail}") for o in others))
        short[key] = next(free, key)
    return short


def _try_lock(folder: Path) -> FileLock | None:
    """Lock a sweep's folder; None where another process holds it."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock
