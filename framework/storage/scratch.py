"""Memory that one decoded weight, or scaled gradient, after the other is written into.

On the CPU a large allocation is fresh pages each time, which cost as much as the decoding itself; an accelerator's
allocator hands the same memory out again anyway.
"""

from __future__ import annotations

import threading
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, torch.dtype, bool], Tensor] = {}


_buffers = _Buffers()


def scratch_like(
    like: Tensor, dtype: torch.dtype, *, purpose: Literal["weight", "gradient"] = "weight"
) -> Tensor | None:
    """A tensor of the shape of `like` and of `dtype`; None where fresh memory is best.

    The thread's next call for the same purpose overwrites it.
    Memory: one buffer per thread, purpose and `dtype`, as large as the largest so far; see `release_scratch`.
    Fake tensors have a fake one, so that a rehearsal counts it.
    """
    if like.device.type != "cpu":
        return None
    count = prod(like.shape)
    kind = (purpose, dtype, isinstance(like, FakeTensor))
    buffer = _buffers.by_kind.get(kind)
    if buffer is None or buffer.numel() < count:
        _buffers.by_kind.pop(kind, None)
        # A tensor made under inference mode couldn't be written outside of it.
        with torch.inference_mode(False):
            buffer = torch.empty(count, dtype=dtype, device="cpu")
        _buffers.by_kind[kind] = buffer
    return buffer[:count].view(like.shape)


def release_scratch() -> None:
    """Give this thread's buffers back."""
    _buffers.by_kind.clear()
