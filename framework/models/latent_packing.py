"""Folds latents into tokens of 2 x 2 patches, as Qwen-Image and FLUX.1 take them.

Shape letters: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from torch import Tensor

PATCH = 2


def pack_latents(latents: Tensor) -> Tensor:
    """Fold each 2 x 2 patch into one token: (B, C, h, w) -> (B, h/2 * w/2, 4C)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack_latents`: (B, h/2 * w/2, 4C) -> (B, C, h, w)."""
    batch, _, features = tokens.shape
    channels = features // (PATCH * PATCH)
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)
