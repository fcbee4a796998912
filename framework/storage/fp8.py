"""The FP8 codec: float8 e4m3 codes held as uint8, with float32 dequantisation scales beside them.

Codes are uint8 so that collectives, `module.to(dtype)`, adapter libraries and checkpoints leave them alone; they are
viewed as `float8_e4m3fn` only where they are decoded.

Letters: O output rows (dimension 0), I everything else; Ob, Ib blocks of rows and of columns that share a scale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import isfinite, prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from framework.plan.types import Scaling, scale_shape
from framework.storage.grid import Grid, chunk_elements

E4M3_MAX = 448.0
"""Largest finite e4m3 value."""

# Compute dtype -> (integer of the same width, left shift that puts e4m3's sign-extended exponent and mantissa in place,
# mask of the sign and those 7 bits, power of two between the exponent biases).
_BIT_LAYOUTS: dict[torch.dtype, tuple[torch.dtype, int, int, float]] = {
    torch.bfloat16: (torch.int16, 4, 0x87F0 - (1 << 16), 2.0**120),
    torch.float32: (torch.int32, 20, 0x87F00000 - (1 << 32), 2.0**120),
    torch.float16: (torch.int16, 7, 0xBF80 - (1 << 16), 2.0**8),
}

# Scales between these leave every code a normal number of bfloat16 and float32, and 2**120 times them finite.
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-117, 2.0**7
_FLOAT32_MANTISSA = 0x7FFFFF
_FLOAT32_EXPONENT = 0x7F800000


def encode_e4m3(
    weight: Tensor,
    scaling: Scaling = "row",
    block_shape: tuple[int, int] | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Store a frozen weight in one byte per element, so that a large model fits beside its adapter.

    weight: (O, ...), finite, any float dtype, any device; not modified.
    block_shape: rows and columns of (O, I) that share a scale, with "block"; None means `BLOCK_SHAPE`.
    out: contiguous uint8 tensor of the same shape for the codes; None allocates one.
    Returns codes, uint8 of the same shape, and dequant_scale, float32: (O,) for "row", (1,) for "tensor", (Ob, Ib) for
    "block", None for "none"; weight ~= codes * dequant_scale, as `dequantise` multiplies them.
    Error: at most 2**-4 relative for normal codes (3 mantissa bits) and scale * 2**-10 absolute below them; rows or
    blocks of zeros are exact (scale 1).   Memory: O*I bytes, the scales, and 4 MB while encoding (a row, or a row of
    blocks, if that is larger; 64 MB on an accelerator).
    Raises ValueError for weights that aren't finite in float32, and for "none" where one is above 448, which a plain
    cast can't hold.
    Source: Micikevicius et al. 2022, arXiv:2209.05433; bounds checked in tests/numerics.
    """
    if not weight.is_floating_point() or weight.ndim == 0:
        raise ValueError(f"can't store a {weight.ndim}-D tensor of {weight.dtype} in FP8")
    rows = _as_matrix(weight.detach())
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes = out.view(rows.shape)
    grid = Grid.of(weight.shape, scaling, block_shape)
    largest = torch.zeros(grid.blocks, dtype=torch.float32, device=weight.device)
    scale = None
    scales: list[Tensor] = []
    if scaling == "tensor":
        for chunk in grid.chunks(rows):
            largest.narrow(0, *chunk.blocks).copy_(_largest(chunk.load(rows)))
        scale = _dequant_scale(largest.amax() if largest.numel() else largest.new_zeros(()))
    for chunk in grid.chunks(rows):
        values = chunk.load(rows)
        if scaling != "tensor":
            largest.narrow(0, *chunk.blocks).copy_(_largest(values))
        if scaling in ("row", "block"):
            scale = _dequant_scale(largest.narrow(0, *chunk.blocks))
            scales.append(scale)
            scale = scale[:, None, :, None]
        if scale is not None:
            # Of a power of two the reciprocal is exact, and multiplying takes half the time of dividing.
            values.mul_(scale.reciprocal())
        codes.narrow(0, *chunk.rows).view(torch.float8_e4m3fn).copy_(chunk.inside())
    _refuse_unfit(largest, scaling)
    shape = scale_shape(tuple(weight.shape), scaling, block_shape)
    if shape is None:
        return out, None
    if scaling != "tensor":
        scale = torch.cat(scales) if scales else torch.ones_like(largest)
    assert scale is not None
    return out, scale.reshape(shape)


def decode_e4m3(codes: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Turn codes into numbers without their scale; exact for every finite code in every float dtype.

    codes: uint8, any shape; must hold no NaN code (0x7F, 0xFF: see `has_nan_codes`).
    out: tensor of the same shape, device and `dtype` to write into; None allocates one.   Returns it.
    On the CPU the bits are moved by integer operations, several times faster than torch's cast: an e4m3 number shifted
    into the place of a wider format differs from it by a power of two only. Subnormal codes pass through subnormals of
    the wide format; where the processor flushes those to zero, everything passes through float16, whose subnormals no
    conversion flushes. Apple's GPU has no FP8 format; it looks each code up in a table of 256 numbers.
    `framework.storage.prepared` is faster still, for weights that stay.
    Memory: the result, and 6 MB where denormals are flushed.
    Source: measured by benchmarks/fp8_decode.py.
    """
    if out is None:
        out = torch.empty_like(codes, dtype=dtype)
    elif out.shape != codes.shape or out.dtype != dtype:
        raise ValueError(
            f"codes {tuple(codes.shape)} don't fit into {out.dtype} {tuple(out.shape)}"
        )
    if codes.device.type == "mps":
        return out.copy_(_look_up(codes, dtype))
    if codes.device.type != "cpu":
        return _copy_(out, codes.view(torch.float8_e4m3fn))
    if dtype not in _BIT_LAYOUTS:
        return out.copy_(decode_e4m3(codes, torch.float32))
    through_half = dtype != torch.float16 and _denormals_are_flushed()
    for source, target in _flat_chunks(codes, out):
        if through_half:
            target.copy_(_move_bits_(source, torch.empty_like(source, dtype=torch.float16)).float())
        else:
            _move_bits_(source, target)
    return out


def dequantise(
    codes: Tensor,
    dequant_scale: Tensor | None,
    dtype: torch.dtype,
    block_shape: tuple[int, int] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Give back the whole weight, scale included, rounded once to `dtype`.

    codes: (O, ...) uint8.   dequant_scale: float32, (O,), (1,), (Ob, Ib), or None.
    block_shape: rows and columns that share a scale, where the scale has two dimensions; None means `BLOCK_SHAPE`.
    out: tensor of the codes' shape and `dtype` to write into; None allocates one.   Returns it.
    Memory: the result, and 4 MB (a row, or a row of blocks, if that is larger; 64 MB on an accelerator).
    """
    if dequant_scale is None:
        return decode_e4m3(codes, dtype, out=out)
    scaling = scaling_of(dequant_scale)
    expected = scale_shape(tuple(codes.shape), scaling, block_shape)
    if tuple(dequant_scale.shape) != expected:
        raise ValueError(
            f"a scale {tuple(dequant_scale.shape)} doesn't belong to codes {tuple(codes.shape)}"
        )
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    source, target = _as_matrix(codes), result.view(codes.shape[0], prod(codes.shape[1:]))
    grid = Grid.of(codes.shape, scaling, block_shape)
    if not codes.numel():
        return result
    plain = codes.is_contiguous() and result.is_contiguous() and grid.is_even
    if plain and not _denormals_are_flushed() and folds(dequant_scale, dtype):
        # One multiplication moves the exponent and scales.
        factors = dequant_scale.mul(_BIT_LAYOUTS[dtype][-1]).to(dtype)
        for part, whole, factor in grid.in_blocks(codes, result, factors):
            widen_(part, whole)
            whole.mul_(factor)
            if isinstance(codes, FakeTensor):
                break
        return result
    wide = torch.promote_types(dtype, torch.float32)
    for chunk in grid.chunks(source, wide):
        decode_e4m3(source.narrow(0, *chunk.rows), wide, out=chunk.inside())
        scale = dequant_scale
        if scaling != "tensor":
            scale = scale.narrow(0, *chunk.blocks)
        chunk.values.mul_(scale.reshape(scale.shape[0], 1, -1, 1))
        _copy_(target.narrow(0, *chunk.rows), chunk.inside())
        if isinstance(codes, FakeTensor):
            break
    return result


def folds(dequant_scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether the scaled weight is exact in `dtype`, so that it is decoded as a whole and no output is scaled.

    So it is in bfloat16 and float32 where all scales are powers of two, as `encode_e4m3` makes them, and not extreme.
    Asked on the CPU only: anywhere else the answer would have to be waited for. Scales of fake tensors have no values;
    they are taken for our own.
    """
    if dequant_scale.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return False
    if isinstance(dequant_scale, FakeTensor) or not dequant_scale.numel():
        return True
    least, largest = torch.aminmax(dequant_scale)
    if not (least >= _LEAST_SCALE and largest <= _LARGEST_SCALE):
        return False
    return not bool(dequant_scale.view(torch.int32).bitwise_and(_FLOAT32_MANTISSA).any())


def scaling_of(dequant_scale: Tensor) -> Scaling:
    """What shares one number of a scale, (O,), (1,) or (Ob, Ib)."""
    if dequant_scale.ndim == 2:
        return "block"
    return "tensor" if dequant_scale.shape[0] == 1 else "row"


def has_nan_codes(codes: Tensor) -> bool:
    """Whether one of the two NaN codes is present, as it may be in an FP8 file that somebody else wrote.

    codes: uint8, any shape.
    """
    if not codes.numel():
        return False
    # 0xFF is the largest unsigned byte and 0x7F the largest signed one: two reductions, and no memory.
    return bool(codes.amax() == 0xFF) or bool(codes.view(torch.int8).amax() == 0x7F)


def _dequant_scale(largest: Tensor) -> Tensor:
    """Smallest power of two, at least 2**-117, by which the largest magnitude is at most 448; 1 where all is zero.

    A power of two costs no precision, since it changes the exponents of weights and codes alike.
    largest: float32 of any shape, magnitude of the largest weight that will share each scale.
    """
    bits = largest.view(torch.int32)
    # 448 is 1.75 * 2**8: a mantissa above .75 carries into the exponent.
    bits = bits.add(_FLOAT32_MANTISSA - 0x600000).bitwise_and_(_FLOAT32_EXPONENT).sub_(8 << 23)
    scale = bits.view(torch.float32).clamp_(min=_LEAST_SCALE)
    return scale.masked_fill_(largest == 0, 1.0)


def _refuse_unfit(largest: Tensor, scaling: Scaling) -> None:
    """Raise ValueError for what can't be encoded.   largest: float32, magnitudes of the largest weights."""
    top = float(largest.amax()) if largest.numel() else 0.0
    if not isfinite(top):
        raise ValueError("weights that aren't finite can't be stored in FP8")
    if scaling == "none" and top > E4M3_MAX:
        raise ValueError(f"a weight of {top:g} is above {E4M3_MAX:g}, the largest FP8 number")


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude in each block, NaN where a block holds one.   values: (Ob, rows, Ib, columns) -> (Ob, Ib)."""
    # Two reductions are quicker than one over magnitudes, and than any norm.
    top, bottom = values.amax(3).amax(1), values.amin(3).amin(1)
    return torch.maximum(top, bottom.neg_())


def _move_bits_(codes: Tensor, out: Tensor) -> Tensor:
    """Decode into `out` by integer operations within its own memory."""
    widen_(codes, out)
    return out.mul_(_BIT_LAYOUTS[out.dtype][-1])


def widen_(codes: Tensor, out: Tensor) -> Tensor:
    """Put sign, exponent and mantissa in their places in `out`, exponents still e4m3's; returns it as integers."""
    integer, shift, mask, _ = _BIT_LAYOUTS[out.dtype]
    bits = out.view(integer)
    # A product takes half the time of the shift that it is.
    return bits.copy_(codes.view(torch.int8)).mul_(1 << shift).bitwise_and_(mask)


def _flat_chunks(codes: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors some elements at a time, in one order.

    Of a fake tensor, which has a size and no values, one chunk stands for all.
    """
    step = chunk_elements(codes.device)
    if codes.numel() <= step or not (codes.is_contiguous() and out.is_contiguous()):
        yield codes, out
        return
    sources, targets = codes.view(-1), out.view(-1)
    for start in range(0, 1 if isinstance(codes, FakeTensor) else sources.numel(), step):
        yield sources[start : start + step], targets[start : start + step]


def _copy_(out: Tensor, source: Tensor) -> Tensor:
    """`out.copy_(source)`, also for fake tensors of a device that this build of torch has no support for."""
    copied: Tensor = torch.ops.aten.copy_.default(out, source)
    return copied


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))


def _look_up(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode by table, for devices without an FP8 format.   Memory: 4 bytes per code beside the result."""
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(dtype)
    return table.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _denormals_are_flushed() -> bool:
    """Whether this thread's processor mode turns subnormal numbers into zero; Python's floats show it at no cost."""
    return sys.float_info.min * 0.5 == 0.0
