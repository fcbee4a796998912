"""Where weights rest that aren't on the device: pinned host memory, or ranges of files.

A store holds one parcel, a run of bytes with the weights of one layer or block, and can bring it to the device any
number of times. Nothing is ever copied back: frozen weights don't change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from framework.errors import SourceError
from framework.storage.pinned import pin_
from framework.storage.reading import read_into
from framework.storage.weights import StoredWeight

# Read into one go; larger parcels are staged in parts of this size on their way from a file to a GPU.
STAGING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Slot:
    """Where one layer's weight lies in a parcel.

    shape, dtype: of the values.   offset: in bytes.   scale_shape, scale_offset: of the float32 scale, if there is one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    scale_shape: tuple[int, ...] | None = None
    scale_offset: int | None = None
    block_shape: tuple[int, int] | None = None

    def view(self, parcel: Tensor) -> StoredWeight:
        """The weight inside a parcel's bytes (uint8, 1-D), sharing them."""
        values = _part(parcel, self.offset, self.shape, self.dtype)
        if self.scale_shape is None or self.scale_offset is None:
            return StoredWeight(values)
        scale = _part(parcel, self.scale_offset, self.scale_shape, torch.float32)
        return StoredWeight(values, scale, self.block_shape)


class Store(Protocol):
    """A parcel at rest."""

    num_bytes: int
    reads_files: bool

    def copy_to(self, target: Tensor) -> None:
        """Fill `target` (uint8, `num_bytes`, on the device); on a GPU by the current stream."""
        ...


class HostStore:
    """A parcel in host memory.

    buffer: uint8, 1-D, on the CPU; pinned where the device is a GPU, so that copies run beside the arithmetic.
    """

    reads_files = False

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.num_bytes = buffer.numel()

    def copy_to(self, target: Tensor) -> None:
        """Copy all bytes; without waiting where the memory is pinned."""
        target.copy_(self.buffer, non_blocking=True)


def host_stores(sizes: Sequence[int], *, pinned: bool) -> list[HostStore]:
    """Make stores of these sizes in one piece of memory: parcels of their own could share a page, which pins once."""
    arena = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    if pinned and arena.numel():
        pin_(arena)
    return [HostStore(part) for part in arena.split(list(sizes))]


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file and where in the parcel they belong."""

    path: str
    start: int
    num_bytes: int
    offset: int


class DiskStore:
    """A parcel that is read from files each time it is used."""

    reads_files = True

    def __init__(self, num_bytes: int, ranges: Sequence[FileRange]) -> None:
        self.num_bytes = num_bytes
        self.ranges = _joined(ranges)

    def copy_to(self, target: Tensor) -> None:
        """Read all ranges; on a GPU through a pinned buffer, and done when this returns.

        Raises SourceError for a file that is gone or was cut short.
        """
        if target.device.type == "cpu":
            for part in self.ranges:
                _read(part, target[part.offset : part.offset + part.num_bytes])
            return
        staging = self._staging_buffer(pinned=target.device.type == "cuda")
        for part in self.ranges:
            for done in range(0, part.num_bytes, len(staging)):
                count = min(len(staging), part.num_bytes - done)
                piece = FileRange(part.path, part.start + done, count, part.offset + done)
                _read(piece, staging[:count])
                target[piece.offset : piece.offset + count].copy_(staging[:count])

    def _staging_buffer(self, *, pinned: bool) -> Tensor:
        largest = max((part.num_bytes for part in self.ranges), default=0)
        size = min(STAGING_BYTES, max(1, largest))
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


class EmptyStore:
    """A parcel without content, for counting memory: what is fetched has the size of the real one.

    reads_files: as of the store that it stands for.
    """

    def __init__(self, num_bytes: int, *, reads_files: bool) -> None:
        self.num_bytes = num_bytes
        self.reads_files = reads_files

    def copy_to(self, target: Tensor) -> None:
        """Leave the target as it is."""


def fill_slot(store: HostStore, slot: Slot, weight: StoredWeight) -> None:
    """Write one layer's weight to where it rests."""
    place = slot.view(store.buffer)
    place.values.copy_(weight.values)
    if place.dequant_scale is not None:
        assert weight.dequant_scale is not None
        place.dequant_scale.copy_(weight.dequant_scale.reshape(place.dequant_scale.shape))


def views(parcel: Tensor, slots: Mapping[str, Slot]) -> dict[str, StoredWeight]:
    """Layer name -> its weight inside the parcel's bytes."""
    return {name: slot.view(parcel) for name, slot in slots.items()}


def _part(parcel: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = prod(shape) * dtype.itemsize
    return parcel.narrow(0, offset, num_bytes).view(dtype).view(shape)


def _joined(ranges: Sequence[FileRange]) -> tuple[FileRange, ...]:
    """Ranges that follow each other both in the file and in the parcel become one read."""
    joined: list[FileRange] = []
    for part in sorted(ranges, key=lambda r: (r.path, r.start)):
        last = joined[-1] if joined else None
        gap = part.start - last.start if last else -1
        if (
            last
            and last.path == part.path
            and gap == last.num_bytes
            and part.offset == last.offset + gap
        ):
            joined[-1] = FileRange(last.path, last.start, gap + part.num_bytes, last.offset)
        elif part.num_bytes:
            joined.append(part)
    return tuple(joined)


def _read(part: FileRange, target: Tensor) -> None:
    try:
        with FileIO(part.path) as file:
            done = read_into(file, part.start, target.numpy().data)
    except OSError as error:
        raise SourceError(
            "a weight file that is read while the model runs can't be read",
            where=part.path,
            found=str(error),
            hint="with offload=disk the files must stay where they are until the run is over",
        ) from error
    if done < part.num_bytes:
        raise SourceError(
            "a weight file that is read while the model runs was cut short",
            where=part.path,
            found=f"{part.num_bytes - done} of {part.num_bytes} bytes are missing",
            hint="with offload=disk the files must stay as they are until the run is over",
        )
