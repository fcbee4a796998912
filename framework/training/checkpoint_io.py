"""How checkpoints reach the disk: atomically, and read back as plain data."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from framework.atomic import atomic_write
from framework.errors import RunError

_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})\.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Writes a temporary file beside the target, syncs it and renames it; reads with `weights_only`.

    Lightning's own writer builds the file in memory, goes through TMPDIR (a copy where that is another
    disk) and doesn't sync. Reading never unpickles code, so a checkpoint from elsewhere can't run any.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`; the old file stays whole until the new one is."""
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to host memory; RunError where the file is missing, cut or no checkpoint."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file; one that is gone already is fine."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to host memory as plain data; RunError where it can't be used."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError("the checkpoint doesn't exist", where=str(path)) from error
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise RunError(
            "the checkpoint can't be read",
            where=str(path),
            found=str(error).partition("\n")[0],
            hint="resume from another one with checkpoint.resume=PATH",
        ) from error
    if not isinstance(checkpoint, dict):
        raise RunError("this is no checkpoint of a run", where=str(path))
    return checkpoint


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says; ValueError for other names."""
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} isn't named like a checkpoint")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest step first; empty where the folder doesn't exist."""
    found = []
    for path in folder.glob("*.ckpt"):
        match = _CHECKPOINT_NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints."""
    for path in list_checkpoints(folder)[:-keep_last]:
        path.unlink(missing_ok=True)
