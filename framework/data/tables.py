"""Metadata files that list pictures and captions: CSV and JSON lines here, Parquet beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.data.listing import count_of, list_first
from framework.data.parquet import ParquetCell, parquet_columns, read_parquet_rows
from framework.errors import DataError

PICTURE_COLUMNS = ("image", "file_name", "path")
CAPTION_COLUMNS = ("prompt", "text", "caption")
_PAIRED = {
    "image": "prompt",
    "file_name": "text",
}  # decides where a file has several caption columns
_ACCEPTED = (
    f"a picture column ({', '.join(PICTURE_COLUMNS)})"
    f" and a caption column ({', '.join(CAPTION_COLUMNS)})"
)


@dataclass(frozen=True)
class Row:
    """One line of a metadata file: where the picture is, its caption (stripped), "metadata.csv:3"."""

    picture: Path | ParquetCell
    caption: str
    listed_in: str


def read_table(file: Path) -> list[Row]:
    """Read every row of a `.csv`, `.jsonl` or `.parquet` file.

    Relative picture paths are taken from the file's folder.
    Columns: a picture column (image, file_name, path) and a caption column (prompt, text, caption).
    Where there are several, the first picture column named here is taken, `image` goes with `prompt`
    and `file_name` with `text`; others are not read.
    Raises DataError: all bad rows of a file in one report (the first 10 by line, and a count).
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        picture, caption = choose_columns(parquet_columns(file), file)
        return [
            Row(cell, text, f"{file.name}, row {number}")
            for number, cell, text in read_parquet_rows(file, picture=picture, caption=caption)
        ]
    lines = _read_csv(file) if suffix == ".csv" else _read_json_lines(file)
    return _rows(lines, file)


def choose_columns(columns: Sequence[str], file: Path) -> tuple[str, str]:
    """Pick the picture and the caption column; raises DataError for none, or an open choice."""
    pictures = [name for name in PICTURE_COLUMNS if name in columns]
    captions = [name for name in CAPTION_COLUMNS if name in columns]
    found = ", ".join(columns) or "no columns"
    if not pictures or not captions:
        lacking = " and ".join(
            name for name, present in (("picture", pictures), ("caption", captions)) if not present
        )
        raise DataError(
            f"no {lacking} column",
            where=str(file),
            found=f"columns {found}",
            hint=f"name the columns image,prompt or file_name,text; accepted is {_ACCEPTED}",
        )
    picture = pictures[0]
    if len(captions) == 1:
        return picture, captions[0]
    if _PAIRED.get(picture) in captions:
        return picture, _PAIRED[picture]
    raise DataError(
        f"more than one column could be the caption: {', '.join(captions)}",
        where=str(file),
        found=f"columns {found}",
        hint="keep one of them, or rename the columns to image,prompt or file_name,text",
    )


def _rows(lines: Iterator[tuple[int, Mapping[str, object] | str]], file: Path) -> list[Row]:
    """Turn numbered records (or the reason why one is bad) into rows; one report for all."""
    rows: list[Row] = []
    faults: list[str] = []
    names: tuple[str, str] | None = None
    for number, record in lines:
        if isinstance(record, str):
            faults.append(f"line {number}: {record}")
            continue
        if names is None:
            names = choose_columns(list(record), file)
        picture, caption = record.get(names[0]), record.get(names[1])
        if not isinstance(picture, str) or not picture.strip():
            faults.append(f"line {number}: no picture in {names[0]!r}")
        elif not isinstance(caption, str):
            faults.append(f"line {number}: no caption in {names[1]!r}")
        else:
            rows.append(
                Row(file.parent / picture.strip(), caption.strip(), f"{file.name}:{number}")
            )
    if faults:
        raise DataError(
            count_of(len(faults), "bad line"),
            where=str(file),
            found=list_first(faults, separator="; "),
            hint="correct these lines",
        )
    return rows


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "the file is not UTF-8 text", where=str(file), found=str(error), hint="save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError("the file can't be read", where=str(file), found=str(error)) from error


def _read_csv(file: Path) -> Iterator[tuple[int, Mapping[str, object] | str]]:
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
                choose_columns(header, file)
            elif len(values) != len(header):
                reason = f"{len(values)} values for {len(header)} columns"
                yield number, f"{reason} (a value with a comma needs quotes)"
            else:
                yield number, dict(zip(header, values, strict=True))
    except csv.Error as error:
        yield first_line, f"not CSV: {error}"
    if header is None:
        choose_columns([], file)


def _read_json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    # Not splitlines(): that would also break at U+2028, which JSON allows inside a string.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, record if isinstance(record, dict) else "not a JSON object"
