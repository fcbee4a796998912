"""One layer's adapter, and how several are made one where other programs keep their layers in one, and back.

Letters: R rank, I inputs, O outputs, n slices of a native layer's rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerAdapter:
    """W' = W + scale * up @ down; with DoRA, its rows are then given the lengths in `magnitude`.

    down: (R, I...).   up: (O, R, 1...).   magnitude: (O,), or None without DoRA (Liu et al. 2024, arXiv:2402.09353).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the two matrices."""
        return self.down.shape[0]

    def folded(self, scale: float = 1.0) -> LayerAdapter:
        """The same adapter with another scale: what it was is multiplied into `up`, in float32."""
        if self.scale == scale:
            return self
        up = self.up.float() * (self.scale / scale)
        return replace(self, up=up.to(self.up.dtype), scale=scale)

    def delta(self) -> Tensor:
        """What is added to the weight, float32, in its shape (O, I...)."""
        product: Tensor = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.up.shape[0], *self.down.shape[1:])

    def merged(self, weight: Tensor) -> Tensor:
        """The weight (O, I...) with the adapter in it, float32."""
        changed = weight.float() + self.delta()
        if self.magnitude is None:
            return changed
        rows = changed.flatten(1)
        factor = self.magnitude.float()[:, None] / rows.norm(dim=1, keepdim=True)
        lengthened: Tensor = rows * factor
        return lengthened.reshape(changed.shape)


def fuse(parts: Sequence[LayerAdapter | None], slices: Sequence[int]) -> LayerAdapter:
    """One adapter for a native layer whose rows are those of several of ours; exact for any ranks and scales.

    parts: in the order of the rows, None for a layer without an adapter; all take the same input.
    slices: sizes of the parts relative to each other.
    Returns down (n R, I) and up (O, n R) block-diagonal, R the highest rank, so that readers that cut both into n equal
    parts get the layers back; a part that is missing is zeros in both.
    """
    given = [(part, size) for part, size in zip(parts, slices, strict=True) if part is not None]
    first, first_size = given[0]
    if any(part.magnitude is not None for part, _ in given):
        raise ValueError("no format that fuses layers has DoRA")
    rank = max(part.rank for part, _ in given)
    rows_per_size = first.up.shape[0] // first_size
    downs, ups = [], []
    for part, size in zip(parts, slices, strict=True):
        down = first.down.new_zeros(rank, first.down.shape[1])
        block = first.up.new_zeros(rows_per_size * size, rank)
        if part is not None:
            down[: part.rank] = part.down
            block[:, : part.rank] = part.folded().up
        downs.append(down)
        ups.append(block)
    up = first.up.new_zeros(sum(block.shape[0] for block in ups), rank * len(ups))
    row = 0
    for index, block in enumerate(ups):
        up[row : row + block.shape[0], index * rank : (index + 1) * rank] = block
        row += block.shape[0]
    return LayerAdapter(torch.cat(downs), up)


def split(
    whole: LayerAdapter, slices: Sequence[int], *, keep_rank: bool = False
) -> list[LayerAdapter | None]:
    """The adapters of the layers that one native layer is made of; the inverse of `fuse`.

    keep_rank: give every part the whole rank, so that shapes follow from the file's header alone.
    Returns one for each slice, None where a part is zeros in both matrices: its layer has no adapter.
    """
    unit, rest = divmod(whole.up.shape[0], sum(slices))
    if rest:
        raise ValueError(f"{whole.up.shape[0]} rows can't be cut as {':'.join(map(str, slices))}")
    rows = [unit * size for size in slices]
    starts = [sum(rows[:index]) for index in range(len(rows))]
    cuts = [slice(start, start + count) for start, count in zip(starts, rows, strict=True)]
    ups = [whole.up[cut] for cut in cuts]
    magnitudes = [None if whole.magnitude is None else whole.magnitude[cut] for cut in cuts]
    blocks = None if keep_rank else _diagonal(ups)
    parts: list[LayerAdapter | None] = []
    for index, (up, magnitude) in enumerate(zip(ups, magnitudes, strict=True)):
        down = whole.down
        if blocks is not None:
            block = slice(index * blocks, (index + 1) * blocks)
            down, up = _without_empty_end(down[block], up[:, block])
        if down.shape[0] == 0 and magnitude is None:
            parts.append(None)
            continue
        parts.append(LayerAdapter(down.clone(), up.clone(), whole.scale, magnitude))
    return parts


def swap_halves(adapter: LayerAdapter) -> LayerAdapter:
    """The adapter of a layer whose two halves of rows lie the other way round."""

    def swapped(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2)
        return torch.cat([second, first])

    magnitude = None if adapter.magnitude is None else swapped(adapter.magnitude)
    return replace(adapter, up=swapped(adapter.up), magnitude=magnitude)


def scale_of(*, alpha: float, rank: int, use_rslora: bool) -> float:
    """Alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def _diagonal(ups: Sequence[Tensor]) -> int | None:
    """Rank of each block where `up` is zero outside of n equal diagonal blocks; None elsewhere."""
    rank, rest = divmod(ups[0].shape[1], len(ups))
    if rest or rank == 0:
        return None
    for index, up in enumerate(ups):
        outside = torch.cat([up[:, : index * rank], up[:, (index + 1) * rank :]], dim=1)
        if bool(outside.any()):
            return None
    return rank


def _without_empty_end(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the last ranks that are zeros in both matrices, which `fuse` filled up with."""
    used = down.flatten(1).any(1) | up.any(0)
    rank = int(used.nonzero().max()) + 1 if bool(used.any()) else 0
    return down[:rank], up[:, :rank]
