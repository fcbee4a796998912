"""What is found out once about an FP8 weight that stays in the CPU's memory, so that integers alone decode it.

Multiplying by the power of two between the formats' exponents, and by the scale, takes longer than all the rest of
decoding (bf16 passes through float32 and is rounded again). Both can be added to the exponent instead, except for codes
that have none: e4m3's subnormals and zeros. They are few, and are written afterwards.

Letters: O output rows, Ob, Ib blocks of rows and of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from framework.storage.fp8 import decode_e4m3, folds, scaling_of, widen_
from framework.storage.grid import Grid

_EXPONENT = 0x78
_BF16_MANTISSA_BITS = 7
# bf16's exponent bias less e4m3's.
_BIAS = 120
# Share of codes without an exponent above which knowing them costs more memory than it is worth (10 bytes for each).
_MOST_PLACES = 1 / 1024


@dataclass(frozen=True, slots=True)
class Prepared:
    """How to decode one weight to bf16.

    places: int64 (n,), of codes without an exponent in the flattened codes.   numbers: bf16 (n,), in their place.
    grid, added: blocks, and int16 (Ob,), (1,) or (Ob, Ib), what is added to the bits of each block's numbers.
    is_scaled: whether that holds the scale, so that the whole weight comes out; else it comes out without its scale.
    """

    places: Tensor
    numbers: Tensor
    grid: Grid
    added: Tensor
    is_scaled: bool

    @classmethod
    def find(
        cls, codes: Tensor, dequant_scale: Tensor | None, block_shape: tuple[int, int] | None = None
    ) -> Prepared | None:
        """Of a weight as `dequantise` describes it, on the CPU; None where the other ways to decode it are better.

        Those are for weights with too many codes without an exponent, and for blocks whose scales aren't powers of two.
        Memory: 1 % of the codes at most; 2 bytes per code while it searches.
        """
        if not codes.is_contiguous():
            return None
        flat = codes.view(-1)
        places = flat.bitwise_and(_EXPONENT).eq_(0).nonzero().view(-1)
        if places.numel() > codes.numel() * _MOST_PLACES:
            return None
        numbers = decode_e4m3(flat.index_select(0, places), torch.bfloat16)
        plain = Grid.of(codes.shape, "tensor", None)
        bias = torch.full((1,), _BIAS << _BF16_MANTISSA_BITS, dtype=torch.int16, device="cpu")
        if dequant_scale is None or not folds(dequant_scale, torch.bfloat16):
            if dequant_scale is not None and dequant_scale.ndim == 2:
                return None
            return cls(places, numbers, plain, bias, dequant_scale is None)
        scaling = scaling_of(dequant_scale)
        grid = Grid.of(codes.shape, scaling, block_shape)
        if not grid.is_even:
            return None
        # A power of two in bf16 is its exponent alone, which counts from 127.
        exponents = dequant_scale.bfloat16().view(torch.int16)
        return cls(
            places,
            numbers.mul_(grid.spread(dequant_scale, places)),
            grid,
            exponents - (127 << _BF16_MANTISSA_BITS) + bias,
            is_scaled=True,
        )

    def decode(self, codes: Tensor, out: Tensor) -> Tensor:
        """Write the weight to `out`, bf16, contiguous; returns it. The same bits as `dequantise` or `decode_e4m3`."""
        for source, target, added in self.grid.in_blocks(codes, out, self.added):
            widen_(source, target).add_(added)
        out.view(-1).index_copy_(0, self.places, self.numbers)
        return out
