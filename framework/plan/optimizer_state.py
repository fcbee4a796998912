"""Bytes of optimizer state for the tensors that train, by optimizer.

All state is float32 on the device of the parameter. Per-tensor scalars (a step counter) are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod

from framework.schema.run import OptimizerName

# Full-size float32 copies per parameter. sgd runs with momentum; prodigy keeps two moments, the start weights and a
# running sum (16 bytes at most: it skips the start weights of tensors that begin at zero).
_COPIES: dict[str, int] = {
    "adamw": 2,
    "adam": 2,
    "nadam": 2,
    "radam": 2,
    "sgd": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "prodigy": 4,
}
# Quantised moments per parameter; bitsandbytes keeps tensors below 4096 elements in float32 and one float32 scale for
# each block of 256 elements of the others.
_QUANTISED: dict[str, int] = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
_QUANTISED_FROM_ELEMENTS = 4096
_QUANTISED_BLOCK_ELEMENTS = 256
# Float32 temporaries while a step is made. On the CPU torch goes from tensor to tensor and holds so many of the
# largest; on a GPU it takes all tensors at once (`foreach`) and holds so many of each. Measured for torch 2.13 with
# weight decay (tests/unit/runtime/test_trace.py); prodigy, which always goes from tensor to tensor, is a guess.
_STEP_COPIES: dict[str, tuple[int, int]] = {
    "adamw": (3, 1),
    "adam": (4, 1),
    "nadam": (3, 1),
    "radam": (2, 1),
    "adafactor": (2, 1),
    "sgd": (1, 1),
    "rmsprop": (3, 2),
    "adagrad": (3, 2),
    "prodigy": (4, 0),
}


def optimizer_state_bytes(name: OptimizerName, shapes: Iterable[tuple[int, ...]]) -> int:
    """Bytes that the optimizer holds beside the parameters, once it has made a step.

    shapes: of the tensors that train.   Exact but for prodigy, where it is an upper bound.
    """
    return sum(_tensor_bytes(name, shape) for shape in shapes)


def optimizer_step_bytes(
    name: OptimizerName, shapes: Iterable[tuple[int, ...]], *, at_once: bool
) -> int:
    """Bytes that a step holds for as long as it takes, beside weights, gradients and state; an upper bound.

    at_once: whether torch updates all tensors together, as it does on a GPU. The 8-bit optimizers work in place.
    """
    sizes = [4 * prod(shape) for shape in shapes]
    one_by_one, together = _STEP_COPIES.get(name, (0, 0))
    if at_once and together:
        return together * sum(sizes)
    return one_by_one * max(sizes, default=0)


def _tensor_bytes(name: str, shape: tuple[int, ...]) -> int:
    numel = prod(shape)
    if name == "adafactor":
        # Shazeer and Stern 2018, arXiv:1804.04235: one row and one column statistic for each matrix.
        if len(shape) > 1:
            return 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])
        return 4 * numel
    if name in _QUANTISED:
        moments = _QUANTISED[name]
        if numel < _QUANTISED_FROM_ELEMENTS:
            return 4 * moments * numel
        return moments * (numel + 4 * ceil(numel / _QUANTISED_BLOCK_ELEMENTS))
    return 4 * _COPIES[name] * numel
