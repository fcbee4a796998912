"""Which pictures and captions a data set holds, read without opening a picture.

Understood are a folder of pictures with a `.txt` caption beside each, a folder with one metadata file
(`metadata.csv`, `.jsonl` or `.parquet`), and such a file by itself. A metadata file wins over captions
beside pictures.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.data.listing import list_first
from framework.data.parquet import ParquetCell, read_cell
from framework.data.tables import Row, read_table
from framework.errors import DataError
from framework.schema import DataConfig

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLE_SUFFIXES = frozenset({".csv", ".jsonl", ".parquet"})

# Formats that Pillow can't read (.heic, .heif, .jxl) stand here too: the check then names them instead
# of passing them over.
PICTURE_SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl",
    ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
))  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One picture and its caption, not read yet.

    picture: a file, or a cell of a Parquet file.   caption: stripped; may be empty.
    listed_in: "metadata.csv:3" where a metadata file names it, "" where a `.txt` lies beside it.
    """

    picture: Path | ParquetCell
    caption: str
    listed_in: str = ""

    @property
    def name(self) -> str:
        """What the picture is called in messages."""
        place = f" ({self.listed_in})" if self.listed_in and isinstance(self.picture, Path) else ""
        return f"{self.picture}{place}"


def read_samples(config: DataConfig) -> list[Sample]:
    """List the samples of `data.path`, in a fixed order: of the file, or sorted by path.

    Sub-folders are searched; files and folders whose names begin with a dot are passed over.
    Raises DataError, before any picture is opened, for: a path that doesn't exist, two metadata files,
    wrong columns, bad lines, missing captions, an empty data set, and (unless `on_bad_sample` is
    `skip`, where the check counts them) pictures that are listed but missing.
    """
    path = Path(config.path).expanduser()
    if not path.exists():
        raise _unknown_path(path)
    if path.is_dir():
        tables = [path / name for name in METADATA_NAMES if (path / name).is_file()]
        if len(tables) > 1:
            raise DataError(
                "more than one metadata file in the folder, which may disagree",
                where=str(path),
                found=", ".join(table.name for table in tables),
                hint="remove all but one, or give one of them as data.path",
            )
        samples = _listed_samples(tables[0]) if tables else _captioned_pictures(path)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        samples = _listed_samples(path)
    else:
        raise DataError(
            "data.path is neither a folder nor a .csv, .jsonl or .parquet file",
            where=str(path),
            hint="give the folder that holds the pictures",
        )
    if config.on_bad_sample == "error":
        _refuse_missing(samples, path)
    return samples


def read_picture_bytes(sample: Sample) -> bytes:
    """Read the encoded picture (PNG, JPEG, …) from disk. Raises DataError when it can't be read."""
    if isinstance(sample.picture, ParquetCell):
        return read_cell(sample.picture)
    try:
        return sample.picture.read_bytes()
    except OSError as error:
        raise DataError(
            "the picture can't be read", where=sample.name, found=_reason(error)
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _unknown_path(path: Path) -> DataError:
    parent = path.parent
    if parent.is_dir():
        names = sorted(entry.name for entry in parent.iterdir())
        nearest = difflib.get_close_matches(path.name, names, n=3)
        found = f"{parent.resolve()} holds {', '.join(nearest) or 'nothing of a similar name'}"
    else:
        found = f"the folder {parent} does not exist either"
    return DataError(
        "data.path does not exist",
        where=str(path),
        found=found,
        hint="correct data.path; a relative path starts at the folder in which the command runs",
    )


def _listed_samples(table: Path) -> list[Sample]:
    rows: Sequence[Row] = read_table(table)
    if not rows:
        raise DataError(
            "the file lists no pictures", where=str(table), hint="add one row per picture"
        )
    return [Sample(row.picture, row.caption, row.listed_in) for row in rows]


def _refuse_missing(samples: Sequence[Sample], source: Path) -> None:
    missing = [s for s in samples if isinstance(s.picture, Path) and not s.picture.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(samples)} listed pictures do not exist",
            where=str(source),
            found=list_first([sample.name for sample in missing]),
            hint="paths are relative to the file that lists them; correct them, or leave these rows out"
            " with data.on_bad_sample=skip",
        )


def _captioned_pictures(folder: Path) -> list[Sample]:
    pictures = sorted(
        _walk_pictures(folder), key=lambda picture: picture.relative_to(folder).as_posix()
    )
    if not pictures:
        tables = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
        found = f"none of {', '.join(METADATA_NAMES)}, and no .png, .jpg, .webp, …"
        hint = "give a folder of pictures with .txt captions, or a .csv, .jsonl or .parquet file"
        if tables:
            found += f"; but {list_first(tables)}"
            hint = f"give the file itself: data.path={folder / tables[0]}"
        raise DataError("no pictures in the folder", where=str(folder), found=found, hint=hint)
    missing = [picture for picture in pictures if not picture.with_suffix(".txt").is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(pictures)} pictures have no caption",
            where=str(folder),
            found="no " + list_first([str(picture.with_suffix(".txt")) for picture in missing]),
            hint="write each caption to a .txt file of the same name, or list all in metadata.csv",
        )
    return [Sample(picture, _read_caption(picture.with_suffix(".txt"))) for picture in pictures]


def _walk_pictures(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # links to folders are followed, circles are not
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            picture = Path(parent, name)
            if not name.startswith(".") and picture.suffix.lower() in PICTURE_SUFFIXES:
                yield picture


def _read_caption(file: Path) -> str:
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
            "the caption can't be read", where=str(file), found=_reason(error)
        ) from error
