"""Memory that one decoded weight after the other is written into.

On the CPU a large allocation is fresh pages each time, which cost as much as the decoding itself; an accelerator's
allocator hands the same memory out again anyway.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_kind: dict[tuple[torch.dtype, bool], Tensor] = {}


_buffers = _Buffers()


def scratch_like(codes: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A tensor of the codes' shape and `dtype` that the thread's next call overwrites; None where fresh memory is best.

    codes: what is to be decoded.
    Memory: one buffer per thread and `dtype`, as large as the largest weight so far; see `release_scratch`.
    Fake tensors have a fake one, so that a rehearsal counts it.
    """
    if codes.device.type != "cpu":
        return None
    count = prod(codes.shape)
    kind = (dtype, isinstance(codes, FakeTensor))
    buffer = _buffers.by_kind.get(kind)
    if buffer is None or buffer.numel() < count:
        _buffers.by_kind.pop(kind, None)
        # A tensor made under inference mode couldn't be written outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(count, dtype=dtype)
        _buffers.by_kind[kind] = buffer
    return buffer[:count].view(codes.shape)


def release_scratch() -> None:
    """Give this thread's buffers back."""
    _buffers.by_kind.clear()
