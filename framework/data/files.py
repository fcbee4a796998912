"""Writing a file so that a reader sees all of it or nothing."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomic(file: Path, data: bytes) -> None:
    """Write to a temporary name in the same folder, then rename over the target; makes the folder.

    Not synced to disk: after a power cut a file may be cut short, which its readers notice. Raises OSError.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
