"""Products with an FP8 weight on CUDA in one kernel: codes are decoded in registers, no decoded weight is written.

A separate decode reads one byte and writes two for each weight, and the product reads two again; here it reads one.
The plain path of `products` stays the reference, and the default wherever this one isn't measured to be faster.
The package `triton`, which torch's CUDA builds bring along, is imported when the first product is asked for.

Letters: M rows of the input, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_KERNELS = "framework.storage.triton_kernels"

# Compute capabilities below have no bfloat16 products in Triton.
_LEAST_CAPABILITY = (8, 0)

# Compute capability -> the numbers of rows for which the fused product was measured faster than decoding first.
# Empty: not measured on any card so far. benchmarks/fp8_kernel.py prints the lines that belong here.
_FASTER: dict[tuple[int, int], tuple[range, ...]] = {}

# Where few tiles can be made of the result, the sum is shared out so that at least this many programs run.
# A guess: about two for each multiprocessor of a large card.
_PROGRAMS = 256
_MAX_PARTS = 16
_PART_MULTIPLE = 256

_DTYPES = (torch.bfloat16, torch.float16)

# `decode` of the kernels leaves this power of two out, where the plain bits are the number times 2**-8.
_FACTORS = {torch.bfloat16: 1.0, torch.float16: 2.0**8}


@dataclass(frozen=True)
class Tiling:
    """How one kernel cuts its work: lengths in elements, powers of two.

    result_block: along the weight's side of the result.   sum_block: along the sum.   rows_block: along M.
    """

    rows_block: int
    result_block: int
    sum_block: int
    num_warps: int
    num_stages: int


# By the largest number of rows they are meant for. One sum_block per class: it decides the order of the sum, and which
# tiling wins the timing must not change a result. Shapes are guesses from the cards' tensor cores, to be timed there.
_TILINGS: tuple[tuple[int, tuple[Tiling, ...]], ...] = (
    (16, (Tiling(16, 32, 128, 4, 4), Tiling(16, 64, 128, 4, 4), Tiling(16, 128, 128, 4, 3))),
    (64, (Tiling(32, 64, 128, 4, 4), Tiling(64, 64, 128, 4, 3), Tiling(64, 128, 128, 8, 3))),
    (
        2**31 - 1,
        (
            Tiling(64, 128, 64, 4, 4),
            Tiling(128, 64, 64, 4, 4),
            Tiling(128, 128, 64, 8, 3),
            Tiling(256, 128, 64, 8, 3),
            Tiling(128, 256, 64, 8, 3),
        ),
    ),
)
_ROW_TILINGS = (Tiling(1, 8, 512, 4, 2), Tiling(1, 16, 512, 8, 2), Tiling(1, 4, 512, 2, 2))


def is_available(device: torch.device) -> bool:
    """Whether the kernels can run on this device: an NVIDIA card of capability 8.0 or newer, and triton installed."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return find_spec("triton") is not None and _capability(device.index) >= _LEAST_CAPABILITY


def can_fuse(x: Tensor, codes: Tensor, dequant_scale: Tensor | None) -> bool:
    """Whether these tensors suit the kernels: 16-bit input, a matrix of codes with something in it, no block scales.

    x: (..., K) or (..., N).   codes: (N, ...) uint8.   dequant_scale: (N,), (1,), (Nb, Kb) float32 or None.
    """
    return (
        x.dtype in _DTYPES
        and codes.ndim == 2
        and codes.numel() > 0
        and x.numel() > 0
        and (dequant_scale is None or dequant_scale.ndim == 1)
    )


class _Choice:
    """What `use_fused` asks for. Plain state and not a context variable: backward runs in threads of its own."""

    always: bool | None = None


@contextmanager
def use_fused(always: bool) -> Iterator[None]:
    """Inside, every product that can be fused is, or none, whatever was measured: for benchmarks and tests."""
    before = _Choice.always
    _Choice.always = always
    try:
        yield
    finally:
        _Choice.always = before


def choose_product(device: torch.device, rows: int) -> bool:
    """Whether the fused product is the default for an input of so many rows: only where it was measured faster.

    device: where the product runs.   rows: M.   `use_fused` overrides the measurement, but not `is_available`.
    """
    wanted = bool(_FASTER) if _Choice.always is None else _Choice.always
    if not wanted or not is_available(device):
        return False
    if _Choice.always:
        return True
    return any(rows in faster for faster in _FASTER.get(_capability(device.index), ()))


def fused_linear(
    x: Tensor, codes: Tensor, dequant_scale: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Give y = (x codes^T) * dequant_scale + bias; scale and bias join the sum in float32, which is rounded once.

    x: (M, K) bfloat16 or float16, M any number.   codes: (N, K) uint8 without NaN codes.
    dequant_scale: (N,) or (1,) float32, or None.   bias: (N,) of any float dtype, or None.
    Returns (M, N) in x's dtype.   Memory: the result; with few rows also parts of it in float32, 16 times at most.
    Raises ValueError for other shapes and number formats: ask `can_fuse` first.
    The first call for a kind of shape times a few tilings, which takes seconds; all give the same bits.
    """
    _check(x, codes, dequant_scale, bias, along=1)
    rows, outputs = x.shape[0], codes.shape[0]
    if isinstance(x, FakeTensor):
        return x.new_empty(rows, outputs)
    operands = (x.contiguous(), codes.contiguous(), dequant_scale, bias)
    with torch.cuda.device_of(x):
        if rows == 1:
            return _launch_row(operands)
        return _launch_linear(operands)


def fused_grad_input(grad: Tensor, codes: Tensor, dequant_scale: Tensor | None) -> Tensor:
    """Give grad_x = grad (codes * dequant_scale), the gradient of `fused_linear` by its input.

    grad: (M, N) bfloat16 or float16, M any number.   codes: (N, K) uint8 without NaN codes.
    dequant_scale: (N,) or (1,) float32, or None. A row's scale is multiplied into the decoded weight, which is rounded
    once after that (the plain path rounds grad * scale instead).
    Returns (M, K) in grad's dtype.   Memory and errors: as `fused_linear`.
    """
    _check(grad, codes, dequant_scale, None, along=0)
    if isinstance(grad, FakeTensor):
        return grad.new_empty(grad.shape[0], codes.shape[1])
    with torch.cuda.device_of(grad):
        return _launch_grad_input(grad.contiguous(), codes.contiguous(), dequant_scale)


def _check(
    x: Tensor, codes: Tensor, dequant_scale: Tensor | None, bias: Tensor | None, *, along: int
) -> None:
    fits = (
        x.ndim == 2
        and can_fuse(x, codes, dequant_scale)
        and codes.dtype == torch.uint8
        and x.shape[1] == codes.shape[along]
        and (dequant_scale is None or dequant_scale.shape[0] in (1, codes.shape[0]))
        and (bias is None or bias.shape == codes.shape[:1])
    )
    if not fits:
        scale = None if dequant_scale is None else tuple(dequant_scale.shape)
        raise ValueError(
            f"no fused product of {tuple(x.shape)} {x.dtype} with codes {tuple(codes.shape)} {codes.dtype}, "
            f"scale {scale}, bias {None if bias is None else tuple(bias.shape)}"
        )


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _launch_linear(operands: Operands) -> Tensor:
    x, codes, scale, bias = operands
    (rows, inputs), outputs = x.shape, codes.shape[0]
    rows_class, tilings = _tilings(rows)
    parts, chunk = _share_out(rows, outputs, inputs, tilings[0])
    y = x.new_empty(rows, outputs) if parts == 1 else _parts_of(x, parts, rows, outputs)
    whole = parts == 1
    arguments = {
        "x": x,
        "codes": codes,
        "scale": scale if whole else None,
        "bias": bias if whole else None,
        "y": y,
        "M": rows,
        "N": outputs,
        "K": inputs,
        "chunk": chunk,
        "rows_class": rows_class,
        "SCALE": _kind(scale) if whole else 0,
        "EVEN_K": inputs % tilings[0].sum_block == 0,
        **_formats(x),
    }

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return (-(-outputs // meta["BLOCK_N"]) * -(-rows // meta["BLOCK_M"]), parts)

    _runner("linear_kernel", rows_class)(grid, arguments)
    if whole:
        return y
    total = y.sum(0)
    if scale is not None:
        total.mul_(scale)
    if bias is not None:
        total.add_(bias)
    return total.to(x.dtype)


def _launch_row(operands: Operands) -> Tensor:
    x, codes, scale, bias = operands
    (rows, inputs), outputs = x.shape, codes.shape[0]
    y = x.new_empty(rows, outputs)
    arguments = {
        "x": x,
        "codes": codes,
        "scale": scale,
        "bias": bias,
        "y": y,
        "N": outputs,
        "K": inputs,
        "SCALE": _kind(scale),
        "EVEN_K": inputs % _ROW_TILINGS[0].sum_block == 0,
    }

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return (-(-outputs // meta["BLOCK_N"]), rows)

    _runner("row_kernel", 1)(grid, arguments)
    return y


def _launch_grad_input(grad: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    rows, (outputs, inputs) = grad.shape[0], codes.shape
    rows_class, tilings = _tilings(rows)
    parts, chunk = _share_out(rows, inputs, outputs, tilings[0])
    whole = parts == 1
    grad_x = grad.new_empty(rows, inputs) if whole else _parts_of(grad, parts, rows, inputs)
    kind = _kind(scale)
    arguments = {
        "grad": grad,
        "codes": codes,
        "scale": scale if whole or kind == 2 else None,
        "grad_x": grad_x,
        "M": rows,
        "N": outputs,
        "K": inputs,
        "chunk": chunk,
        "rows_class": rows_class,
        "SCALE": kind if whole or kind == 2 else 0,
        "EVEN_N": outputs % tilings[0].sum_block == 0,
        **_formats(grad),
    }

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return (-(-inputs // meta["BLOCK_K"]) * -(-rows // meta["BLOCK_M"]), parts)

    _runner("grad_input_kernel", rows_class)(grid, arguments)
    if whole:
        return grad_x
    total = grad_x.sum(0)
    if scale is not None and kind == 1:
        total.mul_(scale)
    return total.to(grad.dtype)


def _parts_of(x: Tensor, parts: int, rows: int, columns: int) -> Tensor:
    return x.new_empty(parts, rows, columns, dtype=torch.float32)


def _kind(scale: Tensor | None) -> int:
    """0 without a scale, 1 with one for the tensor, 2 with one for each row."""
    if scale is None:
        return 0
    return 1 if scale.shape[0] == 1 else 2


def _tilings(rows: int) -> tuple[int, tuple[Tiling, ...]]:
    return next((most, tilings) for most, tilings in _TILINGS if rows <= most)


def _share_out(rows: int, columns: int, length: int, tiling: Tiling) -> tuple[int, int]:
    """How many parts a sum of `length` is made in, and the length of each.

    Decided by the shapes alone, as the parts are part of the sum's order.
    """
    tiles = -(-rows // tiling.rows_block) * -(-columns // tiling.result_block)
    parts = min(_PROGRAMS // tiles, _MAX_PARTS, length // (2 * _PART_MULTIPLE))
    if parts < 2:
        return 1, length
    chunk = -(-length // (parts * _PART_MULTIPLE)) * _PART_MULTIPLE
    return -(-length // chunk), chunk


def _formats(x: Tensor) -> dict[str, Any]:
    """What the kernels multiply in; float32 for bfloat16 in Triton's interpreter, which can't multiply that."""
    language = import_module("triton.language")
    dot = {torch.bfloat16: language.bfloat16, torch.float16: language.float16}[x.dtype]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        dot = language.float32
    return {"DOT": dot, "FACTOR": _FACTORS[x.dtype]}


def _meta(kernel: str, tiling: Tiling) -> dict[str, int]:
    """The kernel's own names for the three lengths."""
    along_sum, along_result = (
        ("BLOCK_N", "BLOCK_K") if kernel == "grad_input_kernel" else ("BLOCK_K", "BLOCK_N")
    )
    lengths = {along_sum: tiling.sum_block, along_result: tiling.result_block}
    return lengths if kernel == "row_kernel" else {**lengths, "BLOCK_M": tiling.rows_block}


@cache
def _runner(kernel: str, rows_class: int) -> Any:
    """A function of (grid, arguments) that runs the kernel in the fastest of its tilings, timed once per shape."""
    triton = import_module("triton")
    function = getattr(import_module(_KERNELS), kernel)
    tilings = _ROW_TILINGS if kernel == "row_kernel" else _tilings(rows_class)[1]
    configs = [
        triton.Config(_meta(kernel, t), num_warps=t.num_warps, num_stages=t.num_stages)
        for t in tilings
    ]
    tuned = triton.autotune(configs=configs, key=_tuning_key(kernel))(function)

    def run(grid: Any, arguments: dict[str, Any]) -> None:
        # Said outright, because Triton's default for fused multiply-add changes with its version.
        tuned[grid](**arguments, enable_fp_fusion=True)

    return run


def _tuning_key(kernel: str) -> list[str]:
    return ["N", "K"] if kernel == "row_kernel" else ["N", "K", "rows_class"]


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
