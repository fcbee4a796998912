"""What earlier checks found out about pictures, so that a picture is decoded once and not before every run.

A stamp holds for a file of the same path, size, modification and change time; whatever differs is checked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from framework.data.files import write_atomic
from framework.data.images import IMAGE_TRANSFORM_VERSION
from framework.data.parquet import ParquetCell
from framework.data.samples import Sample

# A file written this short a time ago could change again without its time changing (file systems count in
# steps of up to 2 s), so it gets no stamp yet.
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Stamp:
    """The state of the file that was checked, and what the check found.

    size_bytes, mtime_ns, ctime_ns: as the file system says.
    width_px, height_px: as the picture is seen.   content_key: sha256 of the encoded picture.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    width_px: int
    height_px: int
    content_key: str


class StampBook:
    """The stamps of all pictures, one JSON file per folder (or Parquet file) of pictures.

    folder: where the JSON files lie; None keeps nothing. Damaged files count as empty and are rewritten.
    Processes that write at the same time lose stamps of each other at worst, never mix them up.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._pages: dict[Path, dict[str, Stamp]] = {}
        self._changed: set[Path] = set()

    def find(self, sample: Sample) -> Stamp | None:
        """Return the stamp of a picture that hasn't changed since, else None."""
        page, name = _place(sample)
        stamp = self._page(page).get(name)
        if stamp is None:
            return None
        state = read_file_state(sample)
        return stamp if state == (stamp.size_bytes, stamp.mtime_ns, stamp.ctime_ns) else None

    def add(self, sample: Sample, stamp: Stamp) -> None:
        """Note what a check found; `stamp` must hold the file's state from before it was read."""
        if time.time() - stamp.mtime_ns / 1e9 < _SETTLE_SECONDS:
            return
        page, name = _place(sample)
        self._page(page)[name] = stamp
        self._changed.add(page)

    def write(self) -> None:
        """Write the changed pages to disk. Raises OSError."""
        if self._folder is None:
            return
        for page in sorted(self._changed):
            stamps = {**self._read_page(page), **self._pages[page]}
            entries = {name: list(vars(stamp).values()) for name, stamp in stamps.items()}
            content = {"version": _version(), "of": str(page), "stamps": entries}
            write_atomic(self._file(page), json.dumps(content).encode())
        self._changed.clear()

    def _page(self, page: Path) -> dict[str, Stamp]:
        if page not in self._pages:
            self._pages[page] = self._read_page(page)
        return self._pages[page]

    def _file(self, page: Path) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(os.fsencode(page)).hexdigest()[:32]}.json"

    def _read_page(self, page: Path) -> dict[str, Stamp]:
        if self._folder is None:
            return {}
        try:
            content = json.loads(self._file(page).read_bytes())
            if content["version"] != _version() or content["of"] != str(page):
                return {}
            return {name: Stamp(*values) for name, values in content["stamps"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def read_file_state(sample: Sample) -> tuple[int, int, int] | None:
    """Read (size in bytes, mtime, ctime in ns) of the file that holds the picture; None if there is none."""
    picture = sample.picture
    try:
        status = (picture.file if isinstance(picture, ParquetCell) else picture).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _place(sample: Sample) -> tuple[Path, str]:
    picture = sample.picture
    if isinstance(picture, ParquetCell):
        return Path(os.path.abspath(picture.file)), f"{picture.column}/{picture.row}"  # noqa: PTH100
    picture = Path(os.path.abspath(picture))  # noqa: PTH100 (resolve() would ask the disk once per picture)
    return picture.parent, picture.name


def _version() -> int:
    return IMAGE_TRANSFORM_VERSION
