"""One layer's weight as it is stored, and what gives it to the layer when it is used.

Letters: O outputs (dimension 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from framework.storage.fp8 import dequantise
from framework.storage.prepared import Prepared


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight on the device in its stored form.

    values: (O, ...) uint8 e4m3 codes, or numbers of a float format.   dequant_scale: float32, (O,), (1,) or
    (row blocks, column blocks); None for floats and for a plain cast.
    block_shape: rows and columns that share a scale, where the scale has two dimensions.
    prepared: what makes decoding to bf16 faster, where it is known.
    """

    values: Tensor
    dequant_scale: Tensor | None = None
    block_shape: tuple[int, int] | None = None
    prepared: Prepared | None = None

    def fetch(self) -> StoredWeight:
        """Itself: it rests on the device."""
        return self

    @property
    def is_encoded(self) -> bool:
        """Whether the values are FP8 codes."""
        return self.values.dtype == torch.uint8

    def decoded(self, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """The weight in `dtype`, scale included: in `out` if given, else new unless it is stored in that format."""
        if not self.is_encoded:
            return self.values.to(dtype)
        return dequantise(self.values, self.dequant_scale, dtype, self.block_shape, out=out)


class WeightSource(Protocol):
    """Where a managed layer has its weight from, in forward and again in backward."""

    def fetch(self) -> StoredWeight:
        """The weight on the device. It may be overwritten or let go once another layer's is asked for."""
        ...


class OffloadedSource(WeightSource, Protocol):
    """Source of a weight that rests elsewhere than on `device`."""

    device: torch.device
