"""Host memory that a GPU copies from by itself."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from framework.errors import RunError


def pin_(buffer: Tensor) -> None:
    """Lock the pages of a host tensor for the GPU, for as long as its storage lives.

    `pin_memory=True` would do, but torch's allocator rounds such a request up to a power of two: up to twice the host
    memory of a large model.   buffer: 1-D uint8 on the CPU.   Raises RunError where the system refuses.
    """
    runtime = torch.cuda.cudart()
    address = buffer.data_ptr()
    status = int(runtime.cudaHostRegister(address, buffer.numel(), 0))  # type: ignore[union-attr]
    if status != 0:
        raise RunError(
            "host memory can't be pinned for the GPU",
            found=f"{buffer.numel()} bytes, CUDA error {status}",
            hint="raise the limit of locked memory (`ulimit -l unlimited`), or use offload=disk",
        )
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)  # type: ignore[union-attr]
