"""Lets runs that start at the same moment encode the same data once: one encodes, the others wait and find it done."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.strategies import Strategy

# How long the first process tries before it shows the others of its run that it is still there.
_TRY_SECONDS = 10.0
_POLL_SECONDS = 0.2

log = logging.getLogger("octavo")


@contextmanager
def encoding_alone(
    cache: Path, encoders: Sequence[str], *, strategy: Strategy, is_first: bool
) -> Iterator[None]:
    """Hold the right to encode with these encoders into this cache; must be entered by every process of a run.

    cache: folder of encoded data.   encoders: identities as in `EncodedCache`'s keys.
    The first process takes one lock per encoder, always in the same order, so that no two runs wait for each other; the
    others follow it. A process that is killed gives its locks back. Where the folder can't hold a lock, the work is
    done without: it may then be done twice, never wrongly, since entries are whole or absent.
    """
    files = sorted({cache / "locks" / f"{_short(encoder)}.lock" for encoder in encoders})
    with ExitStack() as stack:
        timeout = 0.0
        while True:
            held = _take(files, stack, timeout) if is_first else True
            if strategy.broadcast(held, src=0):
                break
            if is_first and timeout == 0:
                log.info("waiting for another run that encodes the same data")
            timeout = _TRY_SECONDS
        yield


def _take(files: list[Path], stack: ExitStack, timeout: float) -> bool:
    """Take the locks that are left, removing each from `files`; False where one isn't free in time (seconds)."""
    while files:
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(files[0])
            lock.acquire(timeout=timeout, poll_interval=_POLL_SECONDS)
        except Timeout:
            return False
        except (OSError, NotImplementedError):
            return True
        stack.callback(lock.release)
        del files[0]
    return True


def _short(encoder: str) -> str:
    return hashlib.sha256(encoder.encode()).hexdigest()[:32]
