"""Metadata files that list pictures and captions: CSV, JSON and JSON lines here, Parquet beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from framework.data.folders import Companions
from framework.data.found import Found
from framework.data.listing import count_of, list_first
from framework.data.media import Media
from framework.data.parquet import parquet_columns, read_parquet_pictures, read_parquet_values
from framework.data.places import FrameFolder, Place
from framework.data.sample import Sample
from framework.errors import DataError

PICTURE_COLUMNS = ("image", "video", "file_name", "path")
CAPTION_COLUMNS = ("prompt", "text", "caption")
MASK_COLUMN = "mask"
CONTROL_COLUMN = "edit_image"
SEED_COLUMN = "seed"
_PAIRED = {
    "image": "prompt",
    "video": "prompt",
    "file_name": "text",
}  # decides where a file has several caption columns
_ACCEPTED = (
    f"a picture column ({', '.join(PICTURE_COLUMNS)})"
    f" and a caption column ({', '.join(CAPTION_COLUMNS)})"
)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read; None for what it doesn't have, or what isn't wanted."""

    picture: str
    caption: str
    mask: str | None
    controls: str | None
    seed: str | None = None


def read_table(file: Path, media: Media, *, base_dir: Path | None = None) -> Found:
    """Read every row of a `.csv`, `.json`, `.jsonl` or `.parquet` file.

    Relative paths start at `base_dir`, or at the file's own folder.
    Columns: a picture column (image, video, file_name, path) and a caption column (prompt, text, caption), and where
    there are such, mask, edit_image (a path or a list of them) and seed (a whole number).
    Where there are several, the first picture column named here is taken (for clips, `video` before the others),
    `image` and `video` go with `prompt`, `file_name` with `text`; others are not read.
    All bad rows of a file are one error (the first 10 by line, and a count).
    Raises DataError for what isn't such a file.
    """
    base = base_dir if base_dir is not None else file.parent
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        found = _read_parquet(file, media, base)
    else:
        read = {".csv": _read_csv, ".json": _read_json}.get(suffix, _read_json_lines)
        found = _rows(read(file), file, media, base)
    if not found.samples and not found.errors:
        raise DataError(
            "the file lists no pictures", where=str(file), hint="add one row per picture"
        )
    return found


def choose_columns(columns: Sequence[str], where: str, media: Media) -> Columns:
    """Pick the columns that are read; raises DataError for none, or an open choice.

    where: file or data set, for messages.
    """
    order = sorted(PICTURE_COLUMNS, key=lambda name: name != media.kind)
    pictures = [name for name in order if name in columns]
    captions = [name for name in CAPTION_COLUMNS if name in columns]
    found = ", ".join(columns) or "no columns"
    if not pictures or not captions:
        lacking = " and ".join(
            name for name, present in (("picture", pictures), ("caption", captions)) if not present
        )
        raise DataError(
            f"no {lacking} column",
            where=where,
            found=f"columns {found}",
            hint=f"name the columns image,prompt or file_name,text; accepted is {_ACCEPTED}",
        )
    caption = captions[0] if len(captions) == 1 else _PAIRED.get(pictures[0], "")
    if caption not in captions:
        raise DataError(
            f"more than one column could be the caption: {', '.join(captions)}",
            where=where,
            found=f"columns {found}",
            hint="keep one of them, or rename the columns to image,prompt or file_name,text",
        )
    return Columns(
        pictures[0],
        caption,
        MASK_COLUMN if MASK_COLUMN in columns else None,
        CONTROL_COLUMN if CONTROL_COLUMN in columns and media.num_controls else None,
        SEED_COLUMN if SEED_COLUMN in columns else None,
    )


def bad_rows(faults: Sequence[str], noun: str, where: str, *, hint: str) -> tuple[DataError, ...]:
    """One error for all bad rows of a table; none where none is bad."""
    if not faults:
        return ()
    found = list_first(faults, separator="; ")
    return (DataError(count_of(len(faults), noun), where=where, found=found, hint=hint),)


def _read_parquet(file: Path, media: Media, base: Path) -> Found:
    columns = choose_columns(parquet_columns(file), str(file), media)
    pictures = read_parquet_pictures(file, columns.picture, base)
    extras: list[Sequence[Sequence[Place]]] = [
        read_parquet_pictures(file, name, base) if name is not None else [()] * len(pictures)
        for name in (columns.mask, columns.controls)
    ]
    masks, controls = extras
    seeds: Sequence[object] = (
        read_parquet_values(file, columns.seed) if columns.seed else [None] * len(pictures)
    )
    samples: list[Sample] = []
    faults: list[str] = []
    captions = read_parquet_values(file, columns.caption)
    rows = zip(pictures, captions, masks, controls, seeds, strict=True)
    for row, (places, caption, mask, control, seed) in enumerate(rows):
        if not places:
            faults.append(f"row {row}: no picture in {columns.picture!r}")
        elif not isinstance(caption, str):
            faults.append(f"row {row}: no caption in {columns.caption!r}")
        else:
            listed_in = f"{file.name}, row {row}"
            first = mask[0] if mask else None
            found = Sample(places[0], caption.strip(), listed_in, first, tuple(control))
            samples.append(replace(found, noise_seed=read_seed(seed)))
    hint = "rows count from 0; correct or remove them"
    return Found(samples, errors=bad_rows(faults, "bad row", str(file), hint=hint))


_Record = tuple[str, Mapping[str, object] | str]  # where it stands, and the row or why it is bad


def _rows(records: Iterator[_Record], file: Path, media: Media, base: Path) -> Found:
    """Turn records (or the reason why one is bad) into samples."""
    samples: list[Sample] = []
    faults: list[str] = []
    columns: Columns | None = None
    companions = Companions()
    for place, record in records:
        if isinstance(record, str):
            faults.append(f"{place}: {record}")
            continue
        if columns is None:
            columns = choose_columns(list(record), str(file), media)
        number = place.split(" ")[-1]
        listed_in = f"{file.name}:{number}" if place.startswith("line") else f"{file.name}, {place}"
        try:
            sample = _sample(record, columns, base, media)
        except ValueError as fault:
            faults.append(f"{place}: {fault}")
            continue
        mask = sample.mask
        if columns.mask is None and isinstance(sample.picture, Path):
            mask = companions.mask(sample.picture)
        samples.append(replace(sample, listed_in=listed_in, mask=mask))
    return Found(
        samples, errors=bad_rows(faults, "bad line", str(file), hint="correct these lines")
    )


def _sample(record: Mapping[str, object], columns: Columns, base: Path, media: Media) -> Sample:
    """Raises ValueError that says what is bad about the row."""
    picture, caption = record.get(columns.picture), record.get(columns.caption)
    if not isinstance(picture, str) or not picture.strip():
        raise ValueError(f"no picture in {columns.picture!r}")
    if not isinstance(caption, str):
        raise ValueError(f"no caption in {columns.caption!r}")
    mask = _paths(record, columns.mask)
    if len(mask) > 1:
        raise ValueError(f"{len(mask)} masks in {columns.mask!r}")
    place: Place = base / picture.strip()
    if media.kind == "video" and not Path(picture.strip()).suffix and (base / picture).is_dir():
        place = FrameFolder(base / picture.strip())
    return Sample(
        place,
        caption.strip(),
        mask=base / mask[0] if mask else None,
        controls=tuple(base / path for path in _paths(record, columns.controls)),
        noise_seed=None if columns.seed is None else read_seed(record.get(columns.seed)),
    )


def read_seed(value: object) -> int | None:
    """A cell's whole number; None for anything else, which only matters to who needs seeds."""
    try:
        return int(value) if isinstance(value, int | str) and int(value) >= 0 else None
    except ValueError:
        return None


def _paths(record: Mapping[str, object], column: str | None) -> list[str]:
    """The paths in a cell: none, one, a list, or (in CSV) a list written as JSON."""
    value = record.get(column) if column is not None else None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{column!r} is no JSON list: {error}") from error
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path.strip() for path in values):
        raise ValueError(f"no path in {column!r}")
    return [str(path).strip() for path in values]


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "the file is not UTF-8 text", where=str(file), found=str(error), hint="save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError("the file can't be read", where=str(file), found=str(error)) from error


def _read_csv(file: Path) -> Iterator[_Record]:
    # strict: a stray quote would otherwise swallow the lines behind it without a word.
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for values in reader:
            number, first_line = first_line, reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = [name.strip() for name in values]
                choose_columns(header, str(file), Media())
            elif len(values) != len(header):
                reason = f"{len(values)} values for {len(header)} columns"
                yield f"line {number}", f"{reason} (a value with a comma needs quotes)"
            else:
                yield f"line {number}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        yield f"line {first_line}", f"not CSV: {error}"
    if header is None:
        choose_columns([], str(file), Media())


def _read_json_lines(file: Path) -> Iterator[_Record]:
    # Not splitlines(): that would also break at U+2028, which JSON allows inside a string.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield f"line {number}", f"not JSON: {error}"
            continue
        yield f"line {number}", record if isinstance(record, dict) else "not a JSON object"


def _read_json(file: Path) -> Iterator[_Record]:
    try:
        records = json.loads(_read_text(file))
    except ValueError as error:
        raise DataError("not JSON", where=str(file), found=str(error)) from error
    if not isinstance(records, list):
        raise DataError(
            "not a list of rows",
            where=str(file),
            found=f"a JSON {'object' if isinstance(records, dict) else type(records).__name__}",
            hint='write [{"image": "a.png", "prompt": "..."}, ...]',
        )
    for row, record in enumerate(records):
        yield f"row {row}", record if isinstance(record, dict) else "not a JSON object"
