"""Where a run writes, and which earlier run it goes on from.

    <output_dir>/<run.name>/<NNN>/
        config.yaml   run.json   plan.json   plan.txt   metrics.csv   tensorboard/
        checkpoints/step-00000100.ckpt   samples/step-000000/00.png   samples.png
        lora.safetensors   lora_kohya.safetensors   lora_comfyui.safetensors   lora_peft/   model/<subfolder>/

The decision is made from what is on the disk before any process writes, so that all processes of a run
come to the same one; the folder is made afterwards by the first process alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from framework import __version__
from framework.atomic import remove_partial_files, write_text
from framework.errors import RunError
from framework.schema import RunConfig
from framework.training.checkpoint_io import list_checkpoints, step_of

CONFIG_FILE = "config.yaml"
STATE_FILE = "run.json"
CHECKPOINT_FOLDER = "checkpoints"
LOCK_FILE = ".lock"
# Keys that may differ between a stopped run and the command that goes on with it.
FREE_KEYS = (
    ("checkpoint", "resume"),
    ("run", "output_dir"),
    ("trainer", "log_every_n_steps"),
    ("trainer", "global_batch_size"),
    ("logger",),
    ("export",),
)
_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class RunStart:
    """What a run begins with.

    parent: folder of all runs of this name.
    folder: the unfinished run that is gone on with; None for a new folder.
    checkpoint: the file whose state is taken over; None for a start from the model's own weights.
    """

    parent: Path
    folder: Path | None
    checkpoint: Path | None

    @property
    def resume_step(self) -> int | None:
        """The step that an unfinished run is gone on with from; None for a new folder."""
        if self.folder is None or self.checkpoint is None:
            return None
        return step_of(self.checkpoint)


def find_start(config: RunConfig) -> RunStart:
    """Decide by `checkpoint.resume` how the run begins; writes nothing.

    `auto` goes on with the newest unfinished run of the same configuration that has a checkpoint and that
    no other process holds. `never` starts anew. A path starts a new folder from a run's newest checkpoint
    or from a .ckpt file; RunError where there is none.
    """
    parent = Path(config.run.output_dir).expanduser().absolute() / config.run.name
    resume = config.checkpoint.resume
    if resume == "never":
        return RunStart(parent, None, None)
    if resume != "auto":
        return RunStart(parent, None, _checkpoint_at(Path(resume).expanduser()))
    key = config_key(config)
    for folder in reversed(numbered_folders(parent)):
        state = read_state(folder)
        if state.get("key") != key:
            continue
        if state.get("state") == "finished":
            break
        checkpoints = list_checkpoints(folder / CHECKPOINT_FOLDER)
        if checkpoints and not is_locked(folder):
            return RunStart(parent, folder, checkpoints[-1])
    return RunStart(parent, None, None)


def _checkpoint_at(path: Path) -> Path:
    hint = "give checkpoint.resume a run folder or a .ckpt file, or one of auto, never"
    if path.is_file():
        return path.absolute()
    if not path.is_dir():
        raise RunError(
            "checkpoint.resume names nothing that exists", where=str(path.absolute()), hint=hint
        )
    checkpoints = list_checkpoints(path / CHECKPOINT_FOLDER) or list_checkpoints(path)
    if not checkpoints:
        raise RunError(
            "checkpoint.resume names a folder without checkpoints",
            where=str(path.absolute()),
            hint=hint,
        )
    return checkpoints[-1].absolute()


def check_same_sources(start: RunStart, commits: Mapping[str, str | None]) -> None:
    """Refuse to go on with a run whose checkpoint on the hub has moved since. commits: by component."""
    if start.folder is None:
        return
    sources = read_state(start.folder).get("sources", {})
    for name, commit in commits.items():
        before = sources.get(name, {}).get("commit", commit)
        if before != commit:
            raise RunError(
                f"the weights of {name} on the hub have changed since this run began",
                where=str(start.folder),
                found=f"commit {commit}, not {before}",
                hint=f"set model.revision={before} to go on, or checkpoint.resume=never",
            )


def config_key(config: RunConfig) -> str:
    """Hash of all settings that decide what a run computes; equal keys may go on with each other."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for *parents, last in FREE_KEYS:
        section = values
        for name in parents:
            section = section[name]
        section.pop(last)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def numbered_folders(parent: Path) -> list[Path]:
    """Run folders in `parent`, oldest number first."""
    if not parent.is_dir():
        return []
    folders = [path for path in parent.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name))


def read_state(folder: Path) -> dict[str, Any]:
    """Content of a run's run.json; empty where there is none or it isn't ours."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


class RunFolder:
    """A run's folder, claimed by one process that holds its lock until `release`.

    Used by the first process alone; the others only learn `path`.
    """

    def __init__(self, path: Path, lock: TextIO) -> None:
        self.path = path
        self._lock: TextIO | None = lock

    @classmethod
    def claim(cls, start: RunStart) -> RunFolder:
        """Take the folder to go on with, or make the next free number.

        Two processes never get the same folder. RunError where another process took the unfinished run.
        """
        if start.folder is not None:
            lock = _lock(start.folder)
            if lock is None:
                raise RunError(
                    "another process has just gone on with this run",
                    where=str(start.folder),
                    hint="wait for it, or start anew with checkpoint.resume=never",
                )
            remove_partial_files(start.folder)
            remove_partial_files(start.folder / CHECKPOINT_FOLDER)
            return cls(start.folder, lock)
        try:
            start.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                "the run's folder can't be made",
                where=str(start.parent),
                found=str(error),
                hint="choose another run.output_dir",
            ) from error
        existing = numbered_folders(start.parent)
        number = int(existing[-1].name) if existing else 0
        while True:
            number += 1
            folder = start.parent / f"{number:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            lock = _lock(folder)
            if lock is not None:
                return cls(folder, lock)

    def release(self) -> None:
        """Give the lock back; a killed process gives it back too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_state(self, **changes: Any) -> None:
        """Merge `changes` into run.json."""
        state = read_state(self.path) | changes
        write_text(self.path / STATE_FILE, json.dumps(state, indent=2, sort_keys=True) + "\n")

    def begin(
        self, config: RunConfig, *, config_yaml: str, sources: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Write config.yaml and run.json: state, key, id, versions and where the weights came from.

        The id is the run's alone on all machines, and stays when the run is gone on with.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = read_state(self.path)
        created = before.get("created", now)
        write_text(self.path / CONFIG_FILE, config_yaml)
        versions = {name: version(name) for name in _PACKAGES}
        self.write_state(
            state="running",
            key=config_key(config),
            id=before.get("id", uuid4().hex),
            created=created,
            started=now,
            versions={"octavo": __version__, "python": platform.python_version(), **versions},
            sources={name: dict(source) for name, source in sources.items()},
        )


def _lock(folder: Path) -> TextIO | None:
    """Lock a run folder; None where another process holds it.

    A record lock, because it isn't inherited by the data loader's worker processes: they outlive a killed
    parent for some seconds and would hold the run.
    """
    file = (folder / LOCK_FILE).open("a", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # Windows: one process per run folder isn't enforced there
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def is_locked(folder: Path) -> bool:
    """Whether another process works in this run folder."""
    if not (folder / LOCK_FILE).is_file():
        return False
    lock = _lock(folder)
    if lock is None:
        return True
    lock.close()
    return False
