"""WebDataset shards: tar archives in which files of one base name make a sample, read in any order without unpacking.

The archive's headers are read once; a picture is then read by the place of its bytes in the file.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from framework.errors import DataError

_NUM_INDEXED = 4096  # archives whose headers are remembered; a guess


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar archive.

    name: inside the archive.   offset_bytes: where its content begins.   size_bytes: of its content.
    """

    file: Path
    name: str
    offset_bytes: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.file}, {self.name}"


@dataclass(frozen=True)
class ShardSample:
    """The files of one sample by what follows the first dot of their names ("jpg", "txt", "mask.png")."""

    key: str
    members: Mapping[str, TarMember]


def read_shard(file: Path) -> list[ShardSample]:
    """Read which samples an archive holds, in their order. Raises DataError for what isn't an uncompressed tar file."""
    try:
        state = file.stat()
    except OSError as error:
        raise DataError(
            "the shard can't be read", where=str(file), found=error.strerror or ""
        ) from error
    samples: dict[str, dict[str, TarMember]] = {}
    for member in _index(file, state.st_size, state.st_mtime_ns):
        name = PurePosixPath(member.name)
        base, dot, kind = name.name.partition(".")
        if not base or not dot or any(part.startswith(".") for part in name.parts):
            continue  # hidden files, and those without an ending
        samples.setdefault(str(name.parent / base), {})[kind.lower()] = member
    return [ShardSample(key, members) for key, members in samples.items()]


def read_member(member: TarMember) -> bytes:
    """Read a file's content. Raises DataError when the archive has gone or is shorter than it was."""
    try:
        with member.file.open("rb") as file:
            file.seek(member.offset_bytes)
            data = file.read(member.size_bytes)
    except OSError as error:
        raise DataError(
            "the shard can't be read", where=str(member), found=error.strerror or ""
        ) from error
    if len(data) != member.size_bytes:
        raise DataError(
            "the shard is cut short",
            where=str(member),
            found=f"{len(data)} of {member.size_bytes} bytes",
            hint="fetch the archive again",
        )
    return data


def read_member_json(member: TarMember) -> dict[str, object]:
    """Read a sample's `.json`. Raises DataError when it isn't one JSON object."""
    try:
        record = json.loads(read_member(member))
    except ValueError as error:
        raise DataError("not JSON", where=str(member), found=str(error)) from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where=str(member), found=type(record).__name__)
    return record


@lru_cache(maxsize=_NUM_INDEXED)
def _index(file: Path, _size_bytes: int, _mtime_ns: int) -> tuple[TarMember, ...]:
    return tuple(_read_headers(file))


def _read_headers(file: Path) -> Iterator[TarMember]:
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if member.isfile() and not member.issparse():
                    yield TarMember(file, member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            "not a readable tar archive",
            where=str(file),
            found=str(error),
            hint="only uncompressed .tar files can be read in any order; unpack .tar.gz first",
        ) from error
