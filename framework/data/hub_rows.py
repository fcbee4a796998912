"""Data sets of the Hugging Face hub through the `datasets` library, which is imported only where one is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from framework.errors import DataError

_REFERENCE = re.compile(r"hub://(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")


@dataclass(frozen=True)
class HubCell:
    """A picture of a hub data set.

    source: "hub://owner/name@revision:split".   row: from 0.
    item: which of a list, from 0; None where the column holds single pictures.
    """

    source: str
    row: int
    column: str
    item: int | None = None

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


def read_hub_columns(source: str) -> list[str]:
    """The column names; the first call fetches the data set, unless it is in the library's cache.

    Raises DataError without the library, for an unknown data set, and offline where it isn't in the cache.
    """
    return list(_rows(source).column_names)


def read_hub_values(source: str, column: str) -> Sequence[Any]:
    """All values of a column that holds no pictures, in order."""
    return list(_column(source, column)[:][column].to_pylist())


def hub_state(source: str) -> tuple[int, int, int]:
    """What changes when the data set does, in the form of a file's state."""
    return int(str(_rows(source)._fingerprint)[:15], 16), 0, 0


def read_hub_pictures(source: str, column: str) -> list[list[HubCell]]:
    """Where the pictures of each row are, in order: none, one, or as many as a list column holds.

    Raises DataError for a column that holds no pictures (the feature `Image`, or encoded bytes).
    """
    import datasets

    feature = _rows(source).features[column]
    is_list = isinstance(feature, list | datasets.List | datasets.LargeList)
    single = (feature[0] if isinstance(feature, list) else feature.feature) if is_list else feature
    if not isinstance(single, datasets.Image) and getattr(single, "dtype", "") != "binary":
        raise DataError(
            f"column {column!r} can't hold pictures",
            where=source,
            found=f"type {feature}",
            hint="accepted: the feature Image, encoded pictures (binary), or lists of them",
        )
    found: list[list[HubCell]] = []
    for batch in _column(source, column).iter(batch_size=64):
        for value in batch[column]:
            row = len(found)
            if is_list:
                size = len(value) if value.is_valid else 0
                found.append([HubCell(source, row, column, i) for i in range(size)])
            else:
                found.append([HubCell(source, row, column)] if value.is_valid else [])
    return found


def read_hub_cell(cell: HubCell) -> bytes:
    """Read a picture's encoded bytes. Raises DataError when the cell holds none."""
    try:
        value = _column(cell.source, cell.column)[cell.row][cell.column][0].as_py()
        value = value if cell.item is None else value[cell.item]
    except (OSError, IndexError, KeyError, TypeError) as error:
        raise DataError("the picture can't be read", where=str(cell), found=str(error)) from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        data = _read_file(str(value["path"]), cell)
    if not isinstance(data, bytes):
        raise DataError("the cell holds no picture", where=str(cell), found=type(data).__name__)
    return data


def _read_file(path: str, cell: HubCell) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (the library may give any path that it can open)
            return file.read()
    except OSError as error:
        raise DataError("the picture can't be read", where=str(cell), found=str(error)) from error


@lru_cache(maxsize=16)
def _rows(source: str) -> Any:
    found = _REFERENCE.fullmatch(source)
    if found is None:
        raise DataError(
            "not the name of a hub data set",
            where=source,
            hint="write hub://owner/name, hub://owner/name:split or hub://owner/name@revision:split",
        )
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading a hub data set needs the library `datasets`",
            where=source,
            hint='pip install "octavo[datasets]"',
        ) from error
    split = found["split"] or "train"
    try:
        return datasets.load_dataset(found["name"], revision=found["revision"], split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "the data set can't be loaded",
            where=source,
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            hint="check the name, the revision and the split; offline only what was fetched before can be read",
        ) from error


@lru_cache(maxsize=64)
def _column(source: str, column: str) -> Any:
    """One column as Arrow tables, so that pictures are left encoded."""
    return _rows(source).select_columns([column]).with_format("arrow")
