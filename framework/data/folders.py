"""A folder of pictures or clips with a caption file beside each, as people have them for LoRA trainers.

Beside `a.jpg` may lie: `a.txt` or `a.caption` (the first wins), `a.mask.png` or `a-masklabel.png`, and for editing
models `a.control.png`, or `a.control_1.png`, `a.control_2.png`, … in this order.
Sub-folders called `10_name` give repeats: a picture in it stands 10 times in an epoch, and one without a caption file
takes `name` as its caption. More than three digits are no repeats (2024_summer).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from framework.data.found import Found
from framework.data.listing import list_first
from framework.data.media import Media
from framework.data.places import PICTURE_SUFFIXES, VIDEO_SUFFIXES, FrameFolder
from framework.data.sample import Sample
from framework.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")
_MASK_ENDINGS = (".mask.png", "-masklabel.png")
_REPEATS = re.compile(r"([1-9]\d{0,2})_(.+)")
_CONTROL = re.compile(r"(?P<stem>.+)\.control(?:_(?P<number>\d+))?")


@dataclass(frozen=True)
class _Beside:
    """The files of a folder that belong to its pictures: stem -> mask, stem -> control pictures in order."""

    masks: dict[str, Path]
    controls: dict[str, tuple[Path, ...]]

    @property
    def files(self) -> set[Path]:
        return {*self.masks.values(), *(file for files in self.controls.values() for file in files)}


class Companions:
    """What lies beside pictures, each folder asked once."""

    def __init__(self) -> None:
        self._folders: dict[Path, _Beside] = {}

    def mask(self, picture: Path) -> Path | None:
        """The mask of a picture."""
        return self._of(picture.parent).masks.get(picture.stem)

    def controls(self, picture: Path) -> tuple[Path, ...]:
        """The control pictures of a picture."""
        return self._of(picture.parent).controls.get(picture.stem, ())

    def belongs(self, file: Path) -> bool:
        """Whether a file is the mask or control picture of another."""
        return file in self._of(file.parent).files

    def _of(self, folder: Path) -> _Beside:
        if folder not in self._folders:
            self._folders[folder] = _read_beside(folder)
        return self._folders[folder]


def read_folder(folder: Path, media: Media) -> Found:
    """List a folder and its sub-folders, sorted by path; names that begin with a dot are passed over.

    Raises DataError for captions that can't be read. A folder without pictures gives nothing.
    """
    companions = Companions()
    pictures = sorted(
        _walk(folder, media, companions),
        key=lambda place: _path(place).relative_to(folder).as_posix(),
    )
    samples: list[Sample] = []
    missing: list[Path] = []
    for place in pictures:
        path = _path(place)
        repeats, class_name = _repeats(path.relative_to(folder))
        caption = _caption_beside(place)
        if caption is None and class_name is None:
            missing.append(_caption_files(place)[0])
            continue
        samples.append(
            Sample(
                place,
                read_caption(caption) if caption is not None else class_name or "",
                mask=companions.mask(path),
                controls=companions.controls(path) if media.num_controls else (),
                repeats=repeats,
            )
        )
    return Found(samples, _without_captions(missing, len(pictures), folder), len(missing))


def read_caption(file: Path) -> str:
    """Read a caption, stripped. Raises DataError."""
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            "the caption is not UTF-8 text",
            where=str(file),
            found=str(error),
            hint="save it as UTF-8",
        ) from error
    except OSError as error:
        raise DataError(
            "the caption can't be read",
            where=str(file),
            found=error.strerror or type(error).__name__,
        ) from error


def _caption_files(place: Path | FrameFolder) -> list[Path]:
    """The names that a picture's caption file may have, or that of a folder of frames."""
    path = place.folder if isinstance(place, FrameFolder) else place.with_suffix("")
    return [path.with_name(path.name + suffix) for suffix in CAPTION_SUFFIXES]


def _caption_beside(place: Path | FrameFolder) -> Path | None:
    return next((file for file in _caption_files(place) if file.is_file()), None)


def _read_beside(folder: Path) -> _Beside:
    if not folder.is_dir():
        return _Beside({}, {})
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    files = [Path(name) for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES]
    masks: dict[str, Path] = {}
    controls: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        for ending in _MASK_ENDINGS:
            if file.name.lower().endswith(ending):
                masks.setdefault(file.name[: -len(ending)], folder / file)
        if found := _CONTROL.fullmatch(file.stem):
            number = int(found["number"] or 0)
            controls.setdefault(found["stem"], []).append((number, folder / file))
    # Without the picture that they would belong to, they are pictures themselves.
    stems = {file.stem for file in files} | {Path(name).stem for name in names if _is_video(name)}
    return _Beside(
        {stem: file for stem, file in masks.items() if stem in stems},
        {
            stem: tuple(file for _, file in sorted(numbered))
            for stem, numbered in controls.items()
            if stem in stems
        },
    )


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def _without_captions(missing: list[Path], total: int, folder: Path) -> tuple[DataError, ...]:
    if not missing:
        return ()
    error = DataError(
        f"{len(missing)} of {total} pictures have no caption",
        where=str(folder),
        found="no " + list_first([str(file) for file in missing]),
        hint="write each caption to a .txt file of the same name, or list all in metadata.csv",
    )
    return (error,)


def _repeats(relative: Path) -> tuple[int, str | None]:
    """(repeats, caption of pictures without one) as the first folder below the data set says."""
    if len(relative.parts) < 2 or (found := _REPEATS.fullmatch(relative.parts[0])) is None:
        return 1, None
    return int(found[1]), found[2].strip()


def _path(place: Path | FrameFolder) -> Path:
    return place.folder if isinstance(place, FrameFolder) else place


def _walk(folder: Path, media: Media, companions: Companions) -> Iterator[Path | FrameFolder]:
    suffixes = PICTURE_SUFFIXES | VIDEO_SUFFIXES if media.kind == "video" else PICTURE_SUFFIXES
    seen: set[str] = set()  # links to folders are followed, circles are not
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if media.kind == "video":
            clips = [name for name in folders if _is_clip(Path(parent, name))]
            yield from (FrameFolder(Path(parent, name)) for name in clips)
            folders[:] = [name for name in folders if name not in clips]
        for name in files:
            picture = Path(parent, name)
            wanted = picture.suffix.lower() in suffixes and not name.startswith(".")
            if wanted and not companions.belongs(picture):
                yield picture


def _is_clip(folder: Path) -> bool:
    """Whether a folder holds the frames of one clip: it has a caption file itself, and its pictures have none."""
    if _caption_beside(FrameFolder(folder)) is None:
        return False
    pictures = [file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES]
    return bool(pictures) and not any(_caption_beside(file) for file in pictures)
