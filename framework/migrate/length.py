"""How long a run is: rows of a data set, and epochs as optimizer steps."""

from __future__ import annotations

import csv
import json
from math import ceil
from pathlib import Path

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".jxl", ".avif")
_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".wmv", ".flv", ".gif")


def count_rows(file: Path) -> int | None:
    """Rows of a .json (one list or an object by picture), .jsonl or .csv file; None where it can't be read."""
    try:
        if file.suffix.lower() == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            return len(content) if isinstance(content, list | dict) else None
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix.lower() == ".jsonl":
                return sum(1 for line in stream if line.strip())
            return max(0, sum(1 for row in csv.reader(stream) if row) - 1)
    except (OSError, ValueError, csv.Error):
        return None


def count_pictures(folder: Path) -> int | None:
    """Pictures and clips that lie directly in a folder; None where there is no such folder."""
    try:
        return sum(1 for file in folder.iterdir() if file.suffix.lower() in (*_PICTURES, *_VIDEOS))
    except OSError:
        return None


def steps_per_epoch(items: int, *, batch_size: int, processes: int, accumulation: int) -> int:
    """Optimizer steps of one epoch; the last batch and the last group of an epoch may be smaller.

    items: pictures of an epoch, repeats included. The last group of batches makes a step of its own.
    """
    batches = ceil(ceil(items / batch_size) / processes)
    return ceil(batches / accumulation)


def first_value(file: Path, column: str) -> str | None:
    """The value of a column in the first row of a .json, .jsonl or .csv file; None where there is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            row = json.loads(text)[0]
        elif file.suffix.lower() == ".jsonl":
            row = json.loads(text.partition("\n")[0])
        else:
            row = next(csv.DictReader(text.splitlines()))
        return str(row[column])
    except (OSError, ValueError, LookupError, TypeError, StopIteration, csv.Error):
        return None
