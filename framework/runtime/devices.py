"""From the device and number formats that a configuration names to those of this machine."""

from __future__ import annotations

import torch

from framework.errors import PlanError
from framework.schema.model import ComputeDtype

COMPUTE_DTYPES: dict[ComputeDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` means here.

    `auto` takes the current CUDA device, else Apple's, else the CPU.   Raises PlanError for a device that isn't there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        return _resolve_cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise _absent(name, "this machine or this build of torch has no Metal device")
    return device


def resolve_compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """Return torch's number format; raises PlanError where the device can't compute in it."""
    if name == "fp16" and device.type == "cpu":
        raise PlanError(
            "the CPU doesn't compute in fp16",
            where="model.compute_dtype",
            hint="set model.compute_dtype=bf16 (or fp32)",
        )
    return COMPUTE_DTYPES[name]


def _resolve_cuda(device: torch.device) -> torch.device:
    if torch.version.cuda is None and torch.version.hip is None:
        raise _absent(str(device), f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise _absent(str(device), "torch finds no CUDA device or no working driver")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise _absent(str(device), f"{count} CUDA device{'s' if count != 1 else ''}")
    return torch.device("cuda", index)


def _absent(name: str, found: str) -> PlanError:
    return PlanError(
        f'the device "{name}" can\'t be used',
        where="model.device",
        found=found,
        hint="set model.device=auto to take what is there, or install the torch build for your device",
    )
