"""How work on a weight is cut: into blocks that share a scale, and into chunks that a processor's cache holds.

Letters: O output rows (dimension 0), I everything else; Ob, Ib blocks of rows and of columns that share a scale.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from framework.plan.types import BLOCK_SHAPE, Scaling

# Elements handled at once. On the host a chunk and its float32 copy stay in the processor's cache from the first
# operation to the last, which makes encoding and decoding two to four times faster than passes over whole weights; on
# an accelerator a larger one keeps it busy (a guess). Measured by benchmarks/fp8_decode.py.
_CHUNK_ELEMENTS = 1024 * 1024
_ACCELERATOR_CHUNK_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class Grid:
    """Blocks of a matrix that share a scale, taken some rows of blocks at a time.

    size: (O, I).   block: rows and columns of one.   blocks: (Ob, Ib).
    """

    size: tuple[int, int]
    block: tuple[int, int]
    blocks: tuple[int, int]

    @classmethod
    def of(cls, shape: torch.Size, scaling: Scaling, block_shape: tuple[int, int] | None) -> Grid:
        """Rows are blocks one row high, also where no scale or a single one is wanted."""
        count, width = shape[0], prod(shape[1:])
        if scaling != "block":
            return cls((count, width), (1, max(1, width)), (count, 1))
        high, wide = block_shape or BLOCK_SHAPE
        if min(high, wide) < 1:
            raise ValueError(f"a block of {high} x {wide} holds no weight")
        return cls((count, width), (high, wide), (ceil(count / high), ceil(width / wide)))

    @property
    def is_even(self) -> bool:
        """Whether all blocks are whole."""
        (count, width), (high, wide), (down, across) = self.size, self.block, self.blocks
        return (count, width) == (high * down, wide * across)

    def spread(self, numbers: Tensor, places: Tensor) -> Tensor:
        """The number of the block that each place lies in, (n,).

        numbers: (Ob,), (1,) or (Ob, Ib), one per block.   places: int64 (n,), indices in the flattened matrix.
        """
        if numbers.numel() == 1:
            return numbers.reshape(1).expand(places.shape)
        (_, width), (high, wide) = self.size, self.block
        down, across = places // (width * high), places % width // wide
        return numbers.reshape(-1).index_select(0, down * self.blocks[1] + across)

    def in_blocks(
        self, codes: Tensor, out: Tensor, numbers: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Two tensors of an even grid's matrix, and one number per block, some rows of blocks at a time.

        codes, out: contiguous, (O, ...).   numbers: (Ob,), (1,) or (Ob, Ib).
        Yields (n, rows, Ib, columns) of both and (n or 1, 1, Ib or 1, 1) of the numbers.
        """
        (high, wide), (down, across) = self.block, self.blocks
        shape = (down, high, across, wide)
        sources, targets = codes.view(shape), out.view(shape)
        numbers = numbers.reshape(numbers.shape[0], 1, -1, 1)
        step = max(1, chunk_elements(codes.device) // max(1, high * across * wide))
        for first in range(0, down, step):
            part = (first, min(step, down - first))
            own = numbers if numbers.shape[0] == 1 else numbers.narrow(0, *part)
            yield sources.narrow(0, *part), targets.narrow(0, *part), own

    def chunks(self, matrix: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Chunk]:
        """Cover the matrix from top to bottom; all chunks share one buffer of `dtype` on its device."""
        (count, width), (high, wide) = self.size, self.block
        if not (count and width):
            return
        at_once = max(1, chunk_elements(matrix.device) // (high * self.blocks[1] * wide))
        size = (min(at_once, self.blocks[0]), high, self.blocks[1], wide)
        buffer = _buffer(matrix, prod(size), dtype).view(size)
        if self.blocks[1] * wide != width:
            # Cells beyond the matrix's right edge are never written: zeros, which change no maximum.
            buffer.zero_()
        for first in range(0, self.blocks[0], size[0]):
            last = min(first + size[0], self.blocks[0])
            rows = (first * high, min(last * high, count) - first * high)
            blocks = (first, last - first)
            yield Chunk(rows, blocks, width, buffer.narrow(0, 0, last - first))


@dataclass(frozen=True)
class Chunk:
    """Some rows of a matrix, as whole blocks in a buffer that the next chunk overwrites.

    rows: the first one and their number.   blocks: the first row of blocks and the number of such rows.
    values: (blocks, rows, Ib, columns).
    """

    rows: tuple[int, int]
    blocks: tuple[int, int]
    width: int
    values: Tensor

    def load(self, matrix: Tensor) -> Tensor:
        """Fill the buffer from the matrix (O, I), and with zeros below its last row; returns it."""
        self.inside().copy_(matrix.narrow(0, *self.rows))
        self._flat()[self.rows[1] :].zero_()
        return self.values

    def inside(self) -> Tensor:
        """The part of the buffer that belongs to the matrix, (rows, I)."""
        return self._flat().narrow(0, 0, self.rows[1]).narrow(1, 0, self.width)

    def _flat(self) -> Tensor:
        return self.values.view(self.values.shape[0] * self.values.shape[1], -1)


def _buffer(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Memory for `count` numbers, 1-D; on the host the same again for each call of a thread, if it isn't large.

    Asking the system for a page costs more than encoding what fits into it.
    """
    if like.device.type != "cpu" or isinstance(like, FakeTensor):
        return torch.empty(count, dtype=dtype, device=like.device)
    num_bytes = count * dtype.itemsize
    if num_bytes > 4 * _CHUNK_ELEMENTS:
        return torch.empty(count, dtype=dtype, device="cpu")
    if _kept.memory is None or _kept.memory.numel() < num_bytes:
        with torch.inference_mode(mode=False):
            _kept.memory = torch.empty(4 * _CHUNK_ELEMENTS, dtype=torch.uint8, device="cpu")
    return _kept.memory.narrow(0, 0, num_bytes).view(dtype)


class _Kept(threading.local):
    """A thread's memory for one chunk."""

    memory: Tensor | None = None


_kept = _Kept()


def chunk_elements(device: torch.device) -> int:
    """How many elements are handled at once."""
    return _CHUNK_ELEMENTS if device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS
