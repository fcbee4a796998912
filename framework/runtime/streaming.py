"""Reads tensors one at a time into one reused buffer, so that loading costs the largest tensor and no more.

A memory map would count the file's pages as the process's own (measured: twice the peak).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import zip_longest

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


def read_tensors(
    stored: Iterable[StoredTensor], *, kept: Collection[str] = ()
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield each tensor with its values, in the order in which they lie in the files.

    kept: keys of tensors that get memory of their own. Any other is a view of a shared buffer: it holds until the next
    one is asked for; copy what is to stay.
    Memory: the bytes of the largest tensor that isn't kept.
    Raises SourceError for a file that is gone or shorter than its header says.
    """
    ordered = sorted(stored, key=lambda tensor: (tensor.file, tensor.start))
    shared = [tensor.num_bytes for tensor in ordered if tensor.key not in kept]
    buffer = _bytes(max(shared, default=0))
    with _Files() as files, ThreadPoolExecutor(1, "read weights") as reader:
        # Memory of its own can be filled ahead, beside what is done with the tensor before it.
        ahead: Future[Tensor] | None = None
        for tensor, following in zip_longest(ordered, ordered[1:]):
            if ahead is not None:
                target = ahead.result()
            else:
                target = _bytes(tensor.num_bytes) if tensor.key in kept else buffer
                files.read(tensor, target)
            ahead = None
            if following is not None and following.key in kept:
                ahead = reader.submit(files.read, following, _bytes(following.num_bytes))
            yield tensor, _as_tensor(target, tensor)


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor with memory of its own.   Raises SourceError as `read_tensors` does."""
    return next(iter(read_tensors((stored,), kept=(stored.key,))))[1]


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


class _Files:
    """Reads tensors from files, of which the one in use stays open. One thread at a time."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._file: FileIO | None = None

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, tensor: StoredTensor, target: Tensor) -> Tensor:
        """Fill the first bytes of `target` (uint8, 1-D, on the CPU) with the tensor's; returns `target`."""
        window = target.numpy().data[: tensor.num_bytes]
        try:
            file = self._open(tensor.file)
            file.seek(tensor.start)
            done = 0
            # One system call may give less than was asked for.
            while done < len(window) and (count := file.readinto(window[done:])):
                done += count
        except OSError as error:
            raise SourceError(
                "the weight file can't be read", where=tensor.file, found=str(error)
            ) from error
        if done < len(window):
            raise SourceError(
                "the weight file is cut short",
                where=tensor.file,
                found=f"{tensor.key} ends {len(window) - done} bytes early",
                hint="delete this file and fetch the checkpoint again",
            )
        return target

    def _open(self, path: str) -> FileIO:
        if self._file is None or self._path != path:
            self.__exit__()
            self._file, self._path = FileIO(path), path
        return self._file


def _as_tensor(buffer: Tensor, tensor: StoredTensor) -> Tensor:
    return buffer[: tensor.num_bytes].view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
