"""Holds what a configuration names as training data against this disk; nothing is opened, nothing is fetched."""

from __future__ import annotations

from pathlib import Path

from framework.judge.places import Findings, nearest_entries
from framework.schema.data_paths import (
    DATA_ALLOWED,
    HUB_SCHEME,
    SHARD_SUFFIX,
    TABLE_SUFFIXES,
    expand_pattern,
)
from framework.schema.run import RunConfig


def check_data(config: RunConfig, findings: Findings) -> None:
    """Judge `data.path`, or the path of each of `data.sources`."""
    data = config.data
    if data.path is not None:
        _check_path("data.path", data.path, config, findings)
    for number, source in enumerate(data.sources):
        _check_path(f"data.sources[{number}].path", source.path, config, findings)


def _check_path(key: str, typed: str, config: RunConfig, findings: Findings) -> None:
    path = Path(typed).expanduser()
    if typed.startswith(HUB_SCHEME):
        return  # only the hub, or its library's cache, can tell
    if not path.exists():
        shards = expand_pattern(typed) if path.suffix.lower() == SHARD_SUFFIX else []
        lacking = [name for name in shards if not Path(name).expanduser().is_file()]
        if len(shards) > 1 and not lacking:
            return
        findings.missing(
            key,
            f'"{lacking[0] if len(shards) > 1 else typed}" does not exist',
            hint="Correct it; a relative path starts at the folder in which the command runs.",
            value=typed,
            nearest=nearest_entries(typed, (Path.cwd(),)),
            allowed=DATA_ALLOWED,
        )
    elif path.is_file() and path.suffix.lower() not in TABLE_SUFFIXES | {SHARD_SUFFIX}:
        findings.refuse(
            key,
            f'"{typed}" is neither a folder nor a .csv, .json, .jsonl, .parquet or .tar file',
            hint="Give the folder of the pictures, or a file that lists them.",
            value=typed,
        )
    elif path.is_dir() and not any(True for _ in path.iterdir()):
        findings.missing(
            key,
            f'the folder "{typed}" is empty',
            hint="Put pictures with .txt captions or a metadata file there, or give another folder.",
            value=typed,
            allowed=DATA_ALLOWED,
        )
    elif path.is_dir() and _lies_in(config.run.output_dir, path):
        findings.warn(
            "run.output_dir",
            f'"{config.run.output_dir}" lies inside {key}, so that the samples of a run become training pictures',
            hint="Write runs elsewhere, e.g. run.output_dir=outputs.",
        )


def _lies_in(inner: str, folder: Path) -> bool:
    path = Path(inner).expanduser().absolute().resolve()
    return path.is_relative_to(folder.absolute().resolve())
