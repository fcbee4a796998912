"""The FP8 codec: float8 e4m3 codes held as uint8, with float32 dequantisation scales beside them.

Codes are uint8 so that collectives, `module.to(dtype)`, adapter libraries and checkpoints leave them alone; they are
viewed as `float8_e4m3fn` only where they are decoded.

Letters: O output rows (dimension 0), I everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["row", "tensor", "none"]

E4M3_MAX = 448.0
"""Largest finite e4m3 value."""

# Elements encoded at once, in one reused float32 buffer of 4 MB: fits a processor's cache, and no page of it is asked
# for twice.
_CHUNK_ELEMENTS = 1024 * 1024

# Compute dtype -> (integer of the same width, left shift that puts e4m3's sign-extended exponent and mantissa in place,
# mask of the sign and those 7 bits, power of two between the exponent biases).
_BIT_LAYOUTS: dict[torch.dtype, tuple[torch.dtype, int, int, float]] = {
    torch.bfloat16: (torch.int16, 4, 0x87F0 - (1 << 16), 2.0**120),
    torch.float32: (torch.int32, 20, 0x87F00000 - (1 << 32), 2.0**120),
    torch.float16: (torch.int16, 7, 0xBF80 - (1 << 16), 2.0**8),
}


def encode_e4m3(weight: Tensor, scaling: Scaling = "row") -> tuple[Tensor, Tensor | None]:
    """Store a frozen weight in one byte per element, so that a large model fits beside its adapter.

    weight: (O, ...), finite, any float dtype, any device; not modified.
    Returns codes, uint8 of the same shape, and dequant_scale, float32: (O,) for "row", (1,) for "tensor", None for
    "none"; weight ~= decode_e4m3(codes) * dequant_scale along dimension 0.
    Error: at most 2**-4 relative for normal codes (3 mantissa bits) and scale * 2**-10 absolute below them; rows of
    zeros are exact (scale 1).   Memory: O*I + 4*O bytes, and 4 MB while encoding (a row, if one is larger).
    Raises ValueError for weights that aren't finite in float32, and for "none" where one is above 448, which a plain
    cast can't hold.
    Source: Micikevicius et al. 2022, arXiv:2209.05433; bounds checked in tests/numerics.
    """
    if not weight.is_floating_point() or weight.ndim == 0:
        raise ValueError(f"can't store a {weight.ndim}-D tensor of {weight.dtype} in FP8")
    rows = (
        weight.detach().reshape(weight.shape[0], -1)
        if weight.numel()
        else weight.new_empty(weight.shape[0], 0)
    )
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
    largest = torch.zeros(rows.shape[0], dtype=torch.float32, device=weight.device)
    for part, chunk in _chunks(rows):
        largest[part] = torch.linalg.vector_norm(chunk, ord=float("inf"), dim=1)
    dequant_scale = _dequant_scale(largest, scaling)
    for part, chunk in _chunks(rows):
        if dequant_scale is not None:
            chunk.div_((dequant_scale[part] if scaling == "row" else dequant_scale)[:, None])
            # Rounding of the scale may carry the largest weight a hair past 448, which a cast would turn into NaN.
            chunk.clamp_(-E4M3_MAX, E4M3_MAX)
        codes[part].view(torch.float8_e4m3fn).copy_(chunk)
    return codes.view(weight.shape), dequant_scale


def decode_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn codes into numbers without their scale; exact for every finite code in every float dtype.

    codes: uint8, any shape; must hold no NaN code (0x7F, 0xFF: see `has_nan_codes`).   Returns a new tensor of `dtype`.
    On the CPU the bits are moved by integer operations, 3 to 4 times faster than torch's cast: an e4m3 number shifted
    into the place of a wider format differs from it by a power of two only. Its subnormals pass through subnormals of
    the wide format, so where the processor flushes those to zero torch's cast is used. Apple's GPU has no FP8 format;
    it looks each code up in a table of 256 numbers.
    Source: measured by benchmarks/fp8_decode.py.
    """
    layout = _BIT_LAYOUTS.get(dtype)
    if layout is None:
        return decode_e4m3(codes, torch.float32).to(dtype)
    if codes.device.type == "mps":
        return _look_up(codes, dtype)
    if codes.device.type != "cpu" or _denormals_are_flushed():
        return codes.view(torch.float8_e4m3fn).to(dtype)
    integer, shift, mask, factor = layout
    bits = codes.view(torch.int8).to(integer)
    bits.bitwise_left_shift_(shift).bitwise_and_(mask)
    return bits.view(dtype).mul_(factor)


def _look_up(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode by table, for devices without an FP8 format.   Memory: 4 bytes per code beside the result."""
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(dtype)
    return table.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def has_nan_codes(codes: Tensor) -> bool:
    """Whether one of the two NaN codes is present, as it may be in an FP8 file that somebody else wrote.

    codes: uint8, any shape.
    """
    return bool((codes.bitwise_and(0x7F) == 0x7F).any())


def dequantise(codes: Tensor, dequant_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Give back the whole weight, scale included, rounded once to `dtype`.

    codes: (O, ...) uint8.   dequant_scale: (O,) or (1,) float32, or None.
    """
    if dequant_scale is None:
        return decode_e4m3(codes, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return decode_e4m3(codes, wide).mul_(_per_row(dequant_scale, codes.ndim)).to(dtype)


def _dequant_scale(largest: Tensor, scaling: Scaling) -> Tensor | None:
    """Largest magnitude over 448, per row or for all; refuses what can't be encoded.

    largest: (O,) float32, magnitude of each row's largest weight.
    """
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("weights that aren't finite can't be stored in FP8")
    if scaling == "none":
        top = float(largest.max()) if largest.numel() else 0.0
        if top > E4M3_MAX:
            raise ValueError(f"a weight of {top:g} is above {E4M3_MAX:g}, the largest FP8 number")
        return None
    if scaling == "tensor":
        largest = largest.amax().reshape(1) if largest.numel() else largest.new_zeros(1)
    # The smallest normal number keeps the division finite for rows of subnormal weights.
    scale = (largest / E4M3_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def _chunks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time as float32, in a buffer that the next ones overwrite.   rows: (O, I)."""
    count, width = rows.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    buffer = torch.empty(min(step, count), width, dtype=torch.float32, device=rows.device)
    for start in range(0, count if width else 0, step):
        part = slice(start, min(start + step, count))
        yield part, buffer[: part.stop - start].copy_(rows[part])


def _per_row(scale: Tensor, ndim: int) -> Tensor:
    """Shape (O,) or (1,) so that it multiplies dimension 0 of an `ndim`-dimensional tensor."""
    return scale.reshape(-1, *([1] * (ndim - 1)))


def _denormals_are_flushed() -> bool:
    """Whether this thread's processor mode turns subnormal float32 numbers into zero."""
    return bool(torch.tensor(2.0**-130).mul(2.0).item() == 0.0)
