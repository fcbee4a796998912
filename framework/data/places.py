"""Where an encoded picture or clip lies: a file, a cell of a table, a member of a tar archive, a folder of frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from framework.data.hub_rows import HubCell, read_hub_cell
from framework.data.parquet import ParquetCell, read_cell
from framework.data.shards import TarMember, read_member
from framework.errors import DataError

# Formats that Pillow can't read (.heic, .heif, .jxl) stand here too: the check then names them instead
# of passing them over.
PICTURE_SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl",
    ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip
VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))
# Pictures that may hold several frames; a still one is a clip of one frame.
ANIMATION_SUFFIXES = frozenset((".apng", ".gif", ".webp"))


@dataclass(frozen=True)
class FrameFolder:
    """A clip as one picture per frame, in the order of their names."""

    folder: Path

    def frames(self) -> list[Path]:
        """The pictures of the folder. Raises DataError when there is none, or no folder."""
        try:
            frames = sorted(
                file
                for file in self.folder.iterdir()
                if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")
            )
        except OSError as error:
            raise unreadable(str(self), error) from error
        if not frames:
            raise DataError("no frames in the folder", where=str(self), found="no pictures")
        return frames

    def __str__(self) -> str:
        return str(self.folder)


Place = Path | ParquetCell | TarMember | HubCell | FrameFolder


def read_place_bytes(place: Place, *, name: str = "") -> bytes:
    """Read an encoded picture or clip. name: what messages call it.

    The bytes of a folder of frames are those of its files, one after the other.
    Raises DataError when it can't be read.
    """
    if isinstance(place, ParquetCell):
        return read_cell(place)
    if isinstance(place, TarMember):
        return read_member(place)
    if isinstance(place, HubCell):
        return read_hub_cell(place)
    try:
        if isinstance(place, FrameFolder):
            return b"".join(frame.read_bytes() for frame in place.frames())
        return place.read_bytes()
    except OSError as error:
        raise unreadable(name or str(place), error) from error


def suffix_of(place: Place) -> str:
    """The lower-case ending that tells the format, e.g. ".mp4"; "" where there is none."""
    if isinstance(place, Path):
        return place.suffix.lower()
    return Path(place.name).suffix.lower() if isinstance(place, TarMember) else ""


def is_clip(place: Place) -> bool:
    """Whether it may hold several frames, by its name alone."""
    suffixes = VIDEO_SUFFIXES | ANIMATION_SUFFIXES
    return isinstance(place, FrameFolder) or suffix_of(place) in suffixes


def exists(place: Place) -> bool:
    """Whether a file or a folder of frames is there; what lies inside another file always is."""
    if isinstance(place, FrameFolder):
        return place.folder.is_dir()
    return place.is_file() if isinstance(place, Path) else True


def unreadable(name: str, error: OSError) -> DataError:
    """What is raised for a file that the system refuses to read."""
    return DataError(
        "the picture can't be read", where=name, found=error.strerror or type(error).__name__
    )
