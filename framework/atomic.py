"""Files that are either old or new, never half written, whenever the process or the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing and rename it to `path` when the block ends well.

    The temporary file lies in the same folder, because a rename over file systems is a copy that can be
    cut. File and folder are synced, so a power cut after the return doesn't lose the file either.
    When the block raises, the old file is untouched and the temporary one removed; a killed process
    leaves `<name>.<pid>.partial` behind, which `remove_partial_files` clears.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def sync_path(path: Path) -> None:
    """Make a file, or a rename in a folder, survive a power cut; nothing to do where folders can't be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Remove what killed processes left behind in `folder`; call it while holding the run's lock."""
    for file in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        file.unlink(missing_ok=True)
