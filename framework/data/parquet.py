"""Parquet files as a data set: pictures as paths, raw bytes, or the struct {bytes, path} of datasets.

pyarrow is imported where it is used: most data sets don't need it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from framework.data.listing import count_of, list_first
from framework.errors import DataError

# Row groups kept in memory per process; random access over more groups reads them anew. A guess that
# fits files of Hugging Face datasets (100 rows a group).
_NUM_ROW_GROUPS = 4
_lock = threading.Lock()  # threads that need the same row group wait for one read of it


@dataclass(frozen=True)
class ParquetCell:
    """A picture inside a Parquet file.

    row: from 0.   column: a binary column, or a struct with a field `bytes`.
    """

    file: Path
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


def parquet_columns(file: Path) -> list[str]:
    """Read the column names. Raises DataError when the file isn't Parquet."""
    return list(_open(file).schema_arrow.names)


def read_parquet_rows(
    file: Path, *, picture: str, caption: str
) -> Iterator[tuple[int, Path | ParquetCell, str]]:
    """Read (row, where the picture is, caption) for every row, in order.

    Picture bytes are only read to tell whether there are any, a few rows at a time.
    Raises DataError for columns of another type and, in one report, for rows that lack something.
    """
    parquet = _open(file)
    captions = parquet.read(columns=[caption], use_threads=False).column(0).to_pylist()
    pictures = _pictures(parquet, file, picture)
    faults: list[str] = []
    rows: list[tuple[int, Path | ParquetCell, str]] = []
    for row, (place, text) in enumerate(zip(pictures, captions, strict=True)):
        if place is None:
            faults.append(f"row {row}: no picture in {picture!r}")
        elif not isinstance(text, str):
            faults.append(f"row {row}: no caption in {caption!r}")
        else:
            rows.append((row, place, text.strip()))
    if faults:
        raise DataError(
            count_of(len(faults), "bad row"),
            where=str(file),
            found=list_first(faults, separator="; "),
            hint="rows count from 0; correct or remove them",
        )
    yield from rows


def read_cell(cell: ParquetCell) -> bytes:
    """Read the picture's bytes. Raises DataError when the file can't be read or holds no picture there."""
    try:
        stamp = cell.file.stat().st_mtime_ns
        with _lock:
            starts = _row_group_starts(cell.file, stamp)
            group = bisect_right(starts, cell.row) - 1
            value = _row_group(cell.file, stamp, group, cell.column)[
                cell.row - starts[group]
            ].as_py()
    except (OSError, IndexError, KeyError) as error:
        raise DataError("the picture can't be read", where=str(cell), found=str(error)) from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DataError("the cell holds no picture", where=str(cell), found=type(data).__name__)
    return data


def _open(file: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("not a readable Parquet file", where=str(file), found=str(error)) from error


@lru_cache(maxsize=64)
def _row_group_starts(file: Path, _mtime_ns: int) -> list[int]:
    metadata = _open(file).metadata
    starts = [0]
    for group in range(metadata.num_row_groups - 1):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts


@lru_cache(maxsize=_NUM_ROW_GROUPS)
def _row_group(file: Path, _mtime_ns: int, group: int, column: str) -> Any:
    # No pyarrow threads: this also runs in worker processes made by fork.
    return _open(file).read_row_group(group, columns=[column], use_threads=False).column(0)


def _pictures(parquet: Any, file: Path, column: str) -> Iterator[Path | ParquetCell | None]:
    import pyarrow.types as kinds

    kind = parquet.schema_arrow.field(column).type
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        for path in parquet.read(columns=[column], use_threads=False).column(0).to_pylist():
            yield file.parent / path if path else None
        return
    is_struct = kinds.is_struct(kind) and any(field.name == "bytes" for field in kind)
    if not is_struct and not (kinds.is_binary(kind) or kinds.is_large_binary(kind)):
        raise DataError(
            f"column {column!r} can't hold pictures",
            where=str(file),
            found=f"type {kind}",
            hint="accepted: paths (string), encoded pictures (binary), a struct {bytes, path}",
        )
    row = 0
    for batch in parquet.iter_batches(batch_size=64, columns=[column], use_threads=False):
        array = batch.column(0)
        present = (array.field("bytes") if is_struct else array).is_valid().to_pylist()
        has_path = is_struct and any(field.name == "path" for field in kind)
        paths = array.field("path").to_pylist() if has_path else [None] * len(present)
        for is_present, path in zip(present, paths, strict=True):
            yield (
                ParquetCell(file, row, column)
                if is_present
                else file.parent / path
                if path
                else None
            )
            row += 1
