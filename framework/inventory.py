"""What lies in a component's safetensors files: names, shapes, dtypes, offsets. Reads no weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from framework.errors import SourceError

# A larger header is surely not one; the format itself allows no more.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

ELEMENT_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits per element of the safetensors dtypes."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    file: path of the file; its bare name where it has not been fetched.
    dtype: safetensors name, e.g. "BF16", "F8_E4M3".
    start, end: byte offsets in the file.
    """

    key: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start


def read_inventory(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of all safetensors files of a component, sharded or not.

    Returns key -> StoredTensor in the order of the files.
    Raises SourceError: no safetensors file (or only pickles), a shard named by the index is missing, a file is cut
    short, a header is damaged, the index and the shards disagree.
    """
    index = find_index(folder)
    if index is None:
        return _read_single(folder)
    weight_map = read_index(index)
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(set(weight_map.values()))} weight files are missing: {', '.join(missing[:5])}",
            where=str(folder),
            hint="fetch the checkpoint again; an interrupted download goes on where it stopped",
        )
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors.update(read_file_header(folder / name))
    check_index(weight_map, tensors, where=str(index))
    return tensors


def find_index(folder: Path) -> Path | None:
    """Path of the component's `*.safetensors.index.json`, or None."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    # A variant (`model.fp16.safetensors.index.json`) is never taken in place of the plain file.
    return min(found, key=lambda path: len(path.name)) if found else None


def read_index(index: Path) -> dict[str, str]:
    """Read key -> file name from an index file."""
    try:
        return parse_index(index.read_text(encoding="utf-8"), where=str(index))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            "the index of weight files can't be read", where=str(index), found=str(error)
        ) from error


def parse_index(text: str, *, where: str) -> dict[str, str]:
    """Parse an index; file names with a folder in them are refused."""
    try:
        weight_map = json.loads(text)["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            "the index of weight files isn't valid",
            where=where,
            found=str(error),
            hint="fetch the checkpoint again",
        ) from error
    strange = sorted(str(n) for n in names if not isinstance(n, str) or Path(n).name != n)
    if strange:
        raise SourceError(
            f"the index names files outside its folder: {', '.join(strange[:3])}", where=where
        )
    return dict(weight_map)


def check_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor], *, where: str
) -> None:
    """Raise SourceError where the index promises a tensor that its file doesn't hold."""
    lost = [
        k
        for k, name in weight_map.items()
        if k not in tensors or Path(tensors[k].file).name != name
    ]
    if lost:
        raise SourceError(
            f"{len(lost)} tensors are not in the file that the index names for them: {', '.join(lost[:3])}",
            where=where,
            found=f"{len(tensors)} tensors in {len(set(weight_map.values()))} files",
            hint="fetch the checkpoint again",
        )


def read_file_header(path: Path) -> dict[str, StoredTensor]:
    """Read one file's header and compare its offsets with the file's size.

    Layout: 8 bytes length N (little-endian), N bytes JSON, then the data; offsets in the JSON count from there.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise SourceError(
                    "the weight file is a Git LFS pointer, not the weights",
                    where=str(path),
                    hint="run `git lfs pull` in the checkpoint's folder",
                )
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise _damaged(path, "no safetensors header")
            if 8 + length > size:
                raise _truncated(path, f"{size} bytes, header alone needs {8 + length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(
            "the weight file can't be read", where=str(path), found=str(error)
        ) from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    tensors = parse_header(header, file=str(path), data_start=8 + length, where=str(path))
    for tensor in tensors.values():
        if tensor.end > size:
            raise _truncated(path, f"{size} bytes, but {tensor.key} ends at {tensor.end}")
    return tensors


def parse_header(header: Any, *, file: str, data_start: int, where: str) -> dict[str, StoredTensor]:
    """Turn a header's JSON into tensors; shape, dtype and length of each must agree."""
    if not isinstance(header, dict):
        raise _damaged(Path(where), "the header isn't an object")
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(Path(where), f"entry of {key}: {error}") from error
        if dtype not in ELEMENT_BITS:
            raise SourceError(
                f"{key} has the unknown dtype {dtype}", where=where, hint="convert the file to bf16"
            )
        if min((start, *shape)) < 0 or 8 * (end - start) != prod(shape) * ELEMENT_BITS[dtype]:
            raise _damaged(Path(where), f"{key}: {dtype} {list(shape)} in {end - start} bytes")
        tensors[key] = StoredTensor(key, file, shape, dtype, data_start + start, data_start + end)
    return tensors


def _read_single(folder: Path) -> dict[str, StoredTensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLE_SUFFIXES)
        raise SourceError(
            "no safetensors file in the folder",
            where=str(folder),
            found=f"only pickled weights ({', '.join(pickles[:3])}), which can run code and are never read"
            if pickles
            else "",
            hint="convert the weights to safetensors" if pickles else "fetch the checkpoint again",
        )
    return read_file_header(_choose_single(files, folder))


def _choose_single(files: list[Path], folder: Path) -> Path:
    """The one weight file; of several, the one whose name has no variant in it."""
    plain = [path for path in files if path.name.count(".") == 1]
    if len(plain) == 1:
        return plain[0]
    if len(files) == 1:
        return files[0]
    raise SourceError(
        f"{len(files)} safetensors files and no index that says which belong together",
        where=str(folder),
        found=", ".join(path.name for path in files[:5]),
        hint="keep one file, or add the `*.safetensors.index.json` that was published with them",
    )


def _truncated(path: Path, found: str) -> SourceError:
    return SourceError(
        "the weight file is cut short",
        where=str(path),
        found=found,
        hint="delete this file and fetch the checkpoint again",
    )


def _damaged(path: Path, found: str) -> SourceError:
    return SourceError(
        "the weight file's header is damaged",
        where=str(path),
        found=found,
        hint="delete this file and fetch the checkpoint again",
    )
