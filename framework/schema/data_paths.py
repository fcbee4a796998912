"""What a `data.path` may name, told from its text alone."""

from __future__ import annotations

import re

HUB_SCHEME = "hub://"
TABLE_SUFFIXES = frozenset({".csv", ".json", ".jsonl", ".parquet"})
SHARD_SUFFIX = ".tar"
DATA_ALLOWED = (
    "a folder of pictures, a .csv, .json, .jsonl or .parquet file, .tar shards, or hub://owner/name"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def expand_pattern(pattern: str) -> list[str]:
    """Expand `{000..012}` (numbers keep their width) and `{a,b}` in a path; a path without them stays alone."""
    if found := _RANGE.search(pattern):
        first, last = found.groups()
        width = len(first) if first.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        values = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    elif found := _CHOICE.search(pattern):
        values = found.group(1).split(",")
    else:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [path for value in values for path in expand_pattern(f"{head}{value}{tail}")]
