"""Writes safetensors files tensor by tensor in any order, so that none need be in memory as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from framework.errors import SourceError
from framework.inventory import ELEMENT_BITS, StoredTensor
from framework.runtime.streaming import TORCH_DTYPES

_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor to write.   dtype: safetensors name.   file: name of the file that it goes to."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return prod(self.shape) * ELEMENT_BITS[self.dtype] // 8


class ShardWriter:
    """Open files with their headers written and room for the data. A context; all files are synced at its end.

    entries: key -> what is to be written; every one must be.
    """

    def __init__(self, folder: Path, entries: Iterable[Entry]) -> None:
        """Nothing is opened yet."""
        self.entries = {entry.key: entry for entry in entries}
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._starts: dict[str, int] = {}
        self._left = set(self.entries)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in sorted({entry.file for entry in self.entries.values()}):
            self._open(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        assert kind is not None or not self._left, f"not written: {sorted(self._left)[:5]}"

    def write(self, entry: Entry, values: Tensor) -> None:
        """Put a tensor in its place, in the entry's number format; FP8 codes may be given as bytes."""
        dtype = TORCH_DTYPES.get(entry.dtype)
        plain = values.detach().cpu()
        if plain.dtype != torch.uint8 and dtype is not None:
            plain = plain.to(dtype)
        file = self._files[entry.file]
        file.seek(self._starts[entry.key])
        file.write(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._left.discard(entry.key)

    def copy(self, entry: Entry, stored: StoredTensor) -> None:
        """Put a tensor of another file in its place, byte for byte.   Raises SourceError where that is cut short."""
        target = self._files[entry.file]
        target.seek(self._starts[entry.key])
        left = stored.num_bytes
        with Path(stored.file).open("rb") as source:
            source.seek(stored.start)
            while left:
                chunk = source.read(min(left, _COPY_BYTES))
                if not chunk:
                    raise SourceError(f"{stored.key} is cut short", where=stored.file)
                left -= target.write(chunk)
        self._left.discard(entry.key)

    def places(self) -> dict[str, tuple[str, int]]:
        """Key -> file and bytes, for an index."""
        return {key: (entry.file, entry.num_bytes) for key, entry in self.entries.items()}

    def _open(self, name: str) -> None:
        # Wide elements first, so that every tensor begins at a multiple of its element's size.
        inside = sorted(
            (entry for entry in self.entries.values() if entry.file == name),
            key=lambda entry: -ELEMENT_BITS[entry.dtype],
        )
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in inside:
            header[entry.key] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [end, end + entry.num_bytes],
            }
            self._starts[entry.key] = end
            end += entry.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        file = (self._folder / name).open("wb")
        self._files[name] = file
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
        for entry in inside:
            self._starts[entry.key] += begin
