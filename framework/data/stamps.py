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
from framework.data.hub_rows import HubCell, hub_state
from framework.data.images import IMAGE_TRANSFORM_VERSION
from framework.data.parquet import ParquetCell
from framework.data.places import FrameFolder, Place
from framework.data.shards import TarMember
from framework.errors import DataError

# A file written this short a time ago could change again without its time changing (file systems count in
# steps of up to 2 s), so it gets no stamp yet.
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Stamp:
    """The state of the file that was checked, and what the check found.

    size_bytes, mtime_ns, ctime_ns: as the file system says.
    width_px, height_px: as the picture is seen.   content_key: sha256 of the encoded picture.
    num_frames: in the file, for a clip.   seconds: how long a clip lasts; 0 where its frames have no times.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    width_px: int
    height_px: int
    content_key: str
    num_frames: int = 1
    seconds: float = 0.0


class StampBook:
    """The stamps of all pictures, one JSON file per folder (or Parquet file) of pictures.

    folder: where the JSON files lie; None keeps nothing. Damaged files count as empty and are rewritten.
    Processes that write at the same time lose stamps of each other at worst, never mix them up.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._pages: dict[Path, dict[str, Stamp]] = {}
        self._changed: set[Path] = set()

    def find(self, place: Place, *, as_clip: bool = False) -> Stamp | None:
        """Return the stamp of a picture that hasn't changed since, else None.

        as_clip: the stamp of all its frames, not of the first one alone.
        """
        page, name = _page_and_name(place, as_clip)
        stamp = self._page(page).get(name)
        if stamp is None:
            return None
        state = read_file_state(place)
        return stamp if state == (stamp.size_bytes, stamp.mtime_ns, stamp.ctime_ns) else None

    def add(self, place: Place, stamp: Stamp, *, as_clip: bool = False) -> None:
        """Note what a check found; `stamp` must hold the file's state from before it was read."""
        if time.time() - stamp.mtime_ns / 1e9 < _SETTLE_SECONDS:
            return
        page, name = _page_and_name(place, as_clip)
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


def read_file_state(place: Place) -> tuple[int, int, int] | None:
    """Read (size in bytes, mtime, ctime in ns) of the file that holds the picture; None if there is none.

    For a folder of frames: the sum of the sizes, and the latest times.
    """
    try:
        if isinstance(place, HubCell):
            return hub_state(place.source)
        if isinstance(place, FrameFolder):
            states = [frame.stat() for frame in place.frames()]
        else:
            states = [(place if isinstance(place, Path) else place.file).stat()]
    except (OSError, DataError):
        return None
    return (
        sum(state.st_size for state in states),
        max(state.st_mtime_ns for state in states),
        max(state.st_ctime_ns for state in states),
    )


def _page_and_name(place: Place, as_clip: bool) -> tuple[Path, str]:
    page, name = _inside(place)
    return page, f"{name}#clip" if as_clip else name


def _inside(place: Place) -> tuple[Path, str]:
    """The folder or file that holds a picture, and its name there."""
    if isinstance(place, HubCell):
        return Path(place.source), _cell_name(place)
    if isinstance(place, ParquetCell):
        return _absolute(place.file), _cell_name(place)
    if isinstance(place, TarMember):
        return _absolute(place.file), f"{place.offset_bytes}/{place.name}"
    picture = _absolute(place.folder if isinstance(place, FrameFolder) else place)
    return picture.parent, picture.name


def _cell_name(cell: ParquetCell | HubCell) -> str:
    name = f"{cell.column}/{cell.row}"
    return name if cell.item is None else f"{name}/{cell.item}"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would ask the disk once per picture)


def _version() -> int:
    return IMAGE_TRANSFORM_VERSION
