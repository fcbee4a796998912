"""Reads tensors one at a time into one reused buffer, so that loading costs the largest tensor and no more.

A memory map would count the file's pages as the process's own (measured: twice the peak).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from framework.errors import SourceError
from framework.inventory import StoredTensor

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_tensors(stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield each tensor with its values, in the order in which they lie in the files.

    The tensor is a view of the shared buffer: it holds until the next one is asked for. Copy what is to stay.
    Memory: the bytes of the largest tensor.
    Raises SourceError for a file that is gone or shorter than its header says.
    """
    ordered = sorted(stored, key=lambda tensor: (tensor.file, tensor.start))
    if not ordered:
        return
    buffer = torch.empty(max(tensor.num_bytes for tensor in ordered), dtype=torch.uint8)
    window = buffer.numpy().data
    position = 0
    while position < len(ordered):
        path = ordered[position].file
        try:
            with Path(path).open("rb", buffering=0) as file:
                while position < len(ordered) and ordered[position].file == path:
                    tensor = ordered[position]
                    file.seek(tensor.start)
                    _fill(file.readinto, window[: tensor.num_bytes], tensor)
                    yield tensor, _as_tensor(buffer, tensor)
                    position += 1
        except OSError as error:
            raise SourceError(
                "the weight file can't be read", where=path, found=str(error)
            ) from error


def _fill(readinto: object, window: memoryview, tensor: StoredTensor) -> None:
    """Read until the window is full; one system call may give less than was asked for."""
    assert callable(readinto)
    done = 0
    while done < len(window):
        count = readinto(window[done:])
        if not count:
            raise SourceError(
                "the weight file is cut short",
                where=tensor.file,
                found=f"{tensor.key} ends {len(window) - done} bytes early",
                hint="delete this file and fetch the checkpoint again",
            )
        done += count


def _as_tensor(buffer: Tensor, tensor: StoredTensor) -> Tensor:
    return buffer[: tensor.num_bytes].view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
