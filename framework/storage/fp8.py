"""The FP8 codec: float8 e4m3 codes held as uint8, with float32 dequantisation scales beside them.

Codes are uint8 so that collectives, `module.to(dtype)`, adapter libraries and checkpoints leave them alone; they are
viewed as `float8_e4m3fn` only where they are decoded.

Letters: O output rows (dimension 0), I everything else; Ob, Ib blocks of rows and of columns that share a scale.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isfinite, prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from framework.plan.types import BLOCK_SHAPE, Scaling, scale_shape

E4M3_MAX = 448.0
"""Largest finite e4m3 value."""

_SMALLEST = torch.finfo(torch.float32).tiny

# Elements handled at once. On the host a chunk and its float32 copy stay in the processor's cache from the first
# operation to the last, which makes encoding and decoding two to four times faster than passes over whole weights; on
# an accelerator a larger one keeps it busy (a guess). Measured by benchmarks/fp8_decode.py.
_CHUNK_ELEMENTS = 1024 * 1024
_ACCELERATOR_CHUNK_ELEMENTS = 16 * 1024 * 1024

# Compute dtype -> (integer of the same width, left shift that puts e4m3's sign-extended exponent and mantissa in place,
# mask of the sign and those 7 bits, power of two between the exponent biases).
_BIT_LAYOUTS: dict[torch.dtype, tuple[torch.dtype, int, int, float]] = {
    torch.bfloat16: (torch.int16, 4, 0x87F0 - (1 << 16), 2.0**120),
    torch.float32: (torch.int32, 20, 0x87F00000 - (1 << 32), 2.0**120),
    torch.float16: (torch.int16, 7, 0xBF80 - (1 << 16), 2.0**8),
}

_EXPONENT = 0x78
# bf16's exponent bias less e4m3's, in its place.
_BF16_BIAS = 120 << 7
# Share of codes above which knowing the subnormals costs more memory than it is worth (10 bytes for each).
_MOST_SUBNORMALS = 1 / 1024


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
    grid = _Grid.of(weight.shape, scaling, block_shape)
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
            # Rounding of the scale may carry the largest weight a hair past 448; the cast rounds it back (NaN begins at
            # 464, where 480 would be nearer).
            values.div_(scale)
        codes.narrow(0, *chunk.rows).view(torch.float8_e4m3fn).copy_(chunk.inside())
    _refuse_unfit(largest, scaling)
    shape = scale_shape(tuple(weight.shape), scaling, block_shape)
    if shape is None:
        return out, None
    if scaling != "tensor":
        scale = torch.cat(scales) if scales else torch.ones_like(largest)
    assert scale is not None
    return out, scale.reshape(shape)


@dataclass(frozen=True, slots=True)
class Subnormals:
    """Where codes without an exponent lie (zeros and e4m3's subnormals), which decoding by integers gets wrong.

    places: int64 (n,), indices into the flattened codes.   numbers: bf16 (n,), what they stand for.
    """

    places: Tensor
    numbers: Tensor

    @classmethod
    def find(cls, codes: Tensor) -> Subnormals | None:
        """Those of a weight; None where they are so many that the other way to decode is better.

        codes: uint8, any shape, on the CPU.   Memory: 1 % of the codes at most; 3 bytes per code while it searches.
        """
        flat = codes.reshape(-1)
        places = flat.bitwise_and(_EXPONENT).eq_(0).nonzero().view(-1)
        if places.numel() > codes.numel() * _MOST_SUBNORMALS:
            return None
        return cls(places, decode_e4m3(flat.index_select(0, places), torch.bfloat16))


def decode_e4m3(
    codes: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    subnormals: Subnormals | None = None,
) -> Tensor:
    """Turn codes into numbers without their scale; exact for every finite code in every float dtype.

    codes: uint8, any shape; must hold no NaN code (0x7F, 0xFF: see `has_nan_codes`).
    out: tensor of the same shape, device and `dtype` to write into; None allocates one.   Returns it.
    subnormals: those of these codes, if they are known; bf16 on the CPU is then decoded faster, to the same bits.
    On the CPU the bits are moved by integer operations, several times faster than torch's cast: an e4m3 number shifted
    into the place of a wider format differs from it by a power of two only. Multiplying by it takes longer than all the
    rest (bf16 passes through float32 and is rounded again), so where the few subnormals are known it is added to the
    exponent, and they are written afterwards. Without, they pass through subnormals of the wide format; where the
    processor flushes those to zero, everything passes through float16, whose subnormals no conversion flushes. Apple's
    GPU has no FP8 format; it looks each code up in a table of 256 numbers.
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
    if subnormals is not None and dtype == torch.bfloat16 and out.is_contiguous():
        for source, target in _flat_chunks(codes, out):
            _widen_(source, target).add_(_BF16_BIAS)
        out.view(-1).index_copy_(0, subnormals.places, subnormals.numbers)
        return out
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
    scaling: Scaling = "block" if dequant_scale.ndim == 2 else "row"
    if scaling == "row" and dequant_scale.shape[0] == 1:
        scaling = "tensor"
    expected = scale_shape(tuple(codes.shape), scaling, block_shape)
    if tuple(dequant_scale.shape) != expected:
        raise ValueError(
            f"a scale {tuple(dequant_scale.shape)} doesn't belong to codes {tuple(codes.shape)}"
        )
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    source, target = _as_matrix(codes), result.view(codes.shape[0], prod(codes.shape[1:]))
    grid = _Grid.of(codes.shape, scaling, block_shape)
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


def has_nan_codes(codes: Tensor) -> bool:
    """Whether one of the two NaN codes is present, as it may be in an FP8 file that somebody else wrote.

    codes: uint8, any shape.
    """
    if not codes.numel():
        return False
    # 0xFF is the largest unsigned byte and 0x7F the largest signed one: two reductions, and no memory.
    return bool(codes.amax() == 0xFF) or bool(codes.view(torch.int8).amax() == 0x7F)


def _dequant_scale(largest: Tensor) -> Tensor:
    """Largest magnitude over 448; 1 where everything is zero.

    largest: float32 of any shape, magnitude of the largest weight that will share each scale.
    """
    # The smallest normal number keeps the division finite for rows of subnormal weights.
    scale = largest.div(E4M3_MAX).clamp_(min=_SMALLEST)
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


@dataclass(frozen=True)
class _Grid:
    """Blocks of a matrix that share a scale, taken some rows of blocks at a time.

    size: (O, I).   block: rows and columns of one.   blocks: (Ob, Ib).
    """

    size: tuple[int, int]
    block: tuple[int, int]
    blocks: tuple[int, int]

    @classmethod
    def of(cls, shape: torch.Size, scaling: Scaling, block_shape: tuple[int, int] | None) -> _Grid:
        """Rows are blocks one row high, also where no scale or a single one is wanted."""
        count, width = shape[0], prod(shape[1:])
        if scaling != "block":
            return cls((count, width), (1, max(1, width)), (count, 1))
        high, wide = block_shape or BLOCK_SHAPE
        if min(high, wide) < 1:
            raise ValueError(f"a block of {high} x {wide} holds no weight")
        return cls((count, width), (high, wide), (ceil(count / high), ceil(width / wide)))

    def chunks(self, matrix: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[_Chunk]:
        """Cover the matrix from top to bottom; all chunks share one buffer of `dtype` on its device."""
        (count, width), (high, wide) = self.size, self.block
        if not (count and width):
            return
        at_once = max(1, _chunk_elements(matrix.device) // (high * self.blocks[1] * wide))
        size = (min(at_once, self.blocks[0]), high, self.blocks[1], wide)
        buffer = _buffer(matrix, prod(size), dtype).view(size)
        if self.blocks[1] * wide != width:
            # Cells beyond the matrix's right edge are never written: zeros, which change no maximum.
            buffer.zero_()
        for first in range(0, self.blocks[0], size[0]):
            last = min(first + size[0], self.blocks[0])
            rows = (first * high, min(last * high, count) - first * high)
            blocks = (first, last - first)
            yield _Chunk(rows, blocks, width, buffer.narrow(0, 0, last - first))


@dataclass(frozen=True)
class _Chunk:
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


def _move_bits_(codes: Tensor, out: Tensor) -> Tensor:
    """Decode into `out` by integer operations within its own memory."""
    _widen_(codes, out)
    return out.mul_(_BIT_LAYOUTS[out.dtype][-1])


def _widen_(codes: Tensor, out: Tensor) -> Tensor:
    """Put sign, exponent and mantissa in their places in `out`, exponents still e4m3's; returns it as integers."""
    integer, shift, mask, _ = _BIT_LAYOUTS[out.dtype]
    bits = out.view(integer)
    # A product takes half the time of the shift that it is.
    return bits.copy_(codes.view(torch.int8)).mul_(1 << shift).bitwise_and_(mask)


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


def _flat_chunks(codes: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors some elements at a time, in one order.

    Of a fake tensor, which has a size and no values, one chunk stands for all.
    """
    step = _chunk_elements(codes.device)
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


def _chunk_elements(device: torch.device) -> int:
    return _CHUNK_ELEMENTS if device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], prod(tensor.shape[1:]))


def _look_up(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode by table, for devices without an FP8 format.   Memory: 4 bytes per code beside the result."""
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(dtype)
    return table.to(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _denormals_are_flushed() -> bool:
    """Whether this thread's processor mode turns subnormal numbers into zero; Python's floats show it at no cost."""
    return sys.float_info.min * 0.5 == 0.0
