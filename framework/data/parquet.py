"""Parquet files as a data set: pictures as paths, raw bytes, or the struct {bytes, path} of datasets.

pyarrow is imported where it is used: most data sets don't need it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from framework.errors import DataError

# Row groups kept in memory per process; random access over more groups reads them anew. A guess that
# fits files of Hugging Face datasets (100 rows a group).
_NUM_ROW_GROUPS = 4
_lock = threading.Lock()  # threads that need the same row group wait for one read of it


@dataclass(frozen=True)
class ParquetCell:
    """A picture inside a Parquet file.

    row: from 0.   column: a binary column, a struct with a field `bytes`, or a list of such.
    item: which of a list, from 0; None where the column holds single pictures.
    """

    file: Path
    row: int
    column: str
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


def parquet_columns(file: Path) -> list[str]:
    """Read the column names. Raises DataError when the file isn't Parquet."""
    return list(_open(file).schema_arrow.names)


def read_parquet_values(file: Path, column: str) -> list[Any]:
    """Read all values of a column, in order."""
    values: list[Any] = _open(file).read(columns=[column], use_threads=False).column(0).to_pylist()
    return values


def read_parquet_pictures(file: Path, column: str, base: Path) -> list[list[Path | ParquetCell]]:
    """Read where the pictures of each row are, in order: none, one, or as many as a list column holds.

    base: folder that relative paths start at.
    Picture bytes are only read to tell whether there are any, a few rows at a time.
    Raises DataError for a column of another type.
    """
    import pyarrow.types as kinds

    parquet = _open(file)
    kind = parquet.schema_arrow.field(column).type
    is_list = kinds.is_list(kind) or kinds.is_large_list(kind)
    value_kind = kind.value_type if is_list or kinds.is_dictionary(kind) else kind
    if kinds.is_string(value_kind) or kinds.is_large_string(value_kind):
        values = read_parquet_values(file, column)
        lists = [value or [] if is_list else [value] for value in values]
        return [[base / path for path in paths if path] for paths in lists]
    is_struct = kinds.is_struct(value_kind) and any(field.name == "bytes" for field in value_kind)
    if not is_struct and not (kinds.is_binary(value_kind) or kinds.is_large_binary(value_kind)):
        raise DataError(
            f"column {column!r} can't hold pictures",
            where=str(file),
            found=f"type {kind}",
            hint="accepted: paths (string), encoded pictures (binary), a struct {bytes, path}, or lists of them",
        )
    found: list[list[Path | ParquetCell]] = []
    for batch in parquet.iter_batches(batch_size=64, columns=[column], use_threads=False):
        for value in batch.column(0).to_pylist():
            row = len(found)
            items = list(enumerate(value or [])) if is_list else [(None, value)]
            places = [_place(file, row, column, item, value, base) for item, value in items]
            found.append([place for place in places if place is not None])
    return found


def _place(
    file: Path, row: int, column: str, item: int | None, value: Any, base: Path
) -> Path | ParquetCell | None:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, "")
    if data is not None:
        return ParquetCell(file, row, column, item)
    return base / path if path else None


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
        value = value if cell.item is None else value[cell.item]
    except (OSError, IndexError, KeyError, TypeError) as error:
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
