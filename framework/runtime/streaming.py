"""Reads weights one at a time, or a few rows at a time, so that loading costs no more memory than what is to stay.

A memory map would count the file's pages as the process's own (measured: twice the peak).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO

import torch
from torch import Tensor

from framework.errors import SourceError
from framework.inventory import StoredTensor
from framework.storage.reading import read_into

PART_BYTES = 2 * 2**20
"""Parts of this size stay in the processor's cache until they are used."""

# Threads that read parts with memory of their own while others are in use. Not so the other parts: where they are
# encoded, the processors are busy.
_READERS = 2

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Part:
    """Some rows (along dimension 0) of a tensor in a file.

    rows: first one and their number, of a tensor that lies in order; None for the whole.
    keeps: whether it gets memory of its own.
    """

    tensor: StoredTensor
    rows: tuple[int, int] | None = None
    keeps: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return self.tensor.shape if self.rows is None else (self.rows[1], *self.tensor.shape[1:])

    @property
    def start(self) -> int:
        """Byte offset in the file."""
        return self.tensor.start + (0 if self.rows is None else self.rows[0] * self._row_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.num_bytes if self.rows is None else self.rows[1] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.tensor.num_bytes // self.tensor.shape[0]


def read_parts(parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
    """Yield each part with its values, in the order given.

    What is kept has memory of its own, and is read ahead, up to the next part that isn't. Any other is a view of one
    shared buffer: it holds until the next one is asked for; copy what is to stay.
    Memory: the bytes of the largest part that isn't kept.
    Raises SourceError for a file that is gone or shorter than its header says.
    """
    buffer = _bytes(max((part.num_bytes for part in parts if not part.keeps), default=0))
    waiting: deque[Future[Tensor]] = deque()
    with _Files() as files, ThreadPoolExecutor(_READERS, "read weights") as reader:
        try:
            for index, part in enumerate(parts):
                found = None if part.keeps else files.read(part, buffer)
                first = index if part.keeps else index + 1
                while (ahead := first + len(waiting)) < len(parts) and parts[ahead].keeps:
                    later = parts[ahead]
                    waiting.append(reader.submit(files.read, later, _bytes(later.num_bytes)))
                yield part, waiting.popleft().result() if found is None else found
        finally:
            reader.shutdown(cancel_futures=True)


def read_tensors(stored: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield each tensor with its values, in the order in which they lie in the files.

    The tensor is a view of a shared buffer, as of `read_parts`: it holds until the next one is asked for.
    """
    ordered = sorted(stored, key=lambda tensor: (tensor.file, tensor.start))
    for part, values in read_parts([Part(tensor) for tensor in ordered]):
        yield part.tensor, values


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor with memory of its own.   Raises SourceError as `read_parts` does."""
    with _Files() as files:
        return files.read(Part(stored), _bytes(stored.num_bytes))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


class _Files:
    """Reads parts of files, from several threads, each of which keeps the file open that it reads."""

    def __init__(self) -> None:
        self._open: list[tuple[str, FileIO]] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for _path, file in self._open:
            file.close()

    def read(self, part: Part, memory: Tensor) -> Tensor:
        """Fill the first bytes of `memory` (uint8, 1-D, on the CPU) with a part; returns it in its shape and format."""
        window = memory.numpy().data[: part.num_bytes]
        tensor = part.tensor
        try:
            path, file = self._take(tensor.file)
            try:
                done = self._fill(file, part, window)
            finally:
                self._open.append((path, file))
        except OSError as error:
            raise SourceError(
                "the weight file can't be read", where=tensor.file, found=str(error)
            ) from error
        if done < len(window):
            raise SourceError(
                "the weight file is cut short",
                where=tensor.file,
                found=f"{tensor.key} ends {tensor.end - part.start - done} bytes early",
                hint="delete this file and fetch the checkpoint again",
            )
        values = memory[: part.num_bytes].view(TORCH_DTYPES[tensor.dtype])
        if tensor.order == "transposed":
            return values.view(part.shape[::-1]).t().contiguous()
        return values.view(part.shape)

    @staticmethod
    def _fill(file: FileIO, part: Part, window: memoryview) -> int:
        """Read a part; one whose halves are in the other order in the file, half by half. Returns the bytes read."""
        if part.tensor.order != "halves_swapped":
            return read_into(file, part.start, window)
        half = part.num_bytes // 2
        done = read_into(file, part.start + half, window[:half])
        return done + (read_into(file, part.start, window[half:]) if done == half else 0)

    def _take(self, path: str) -> tuple[str, FileIO]:
        """An open file that no other thread uses; those of paths that are done with are closed on the way."""
        while True:
            try:
                opened, file = self._open.pop()
            except IndexError:
                return path, FileIO(path)
            if opened == path:
                return opened, file
            file.close()
