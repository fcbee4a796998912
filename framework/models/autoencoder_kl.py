"""What the families share whose autoencoder is diffusers' AutoencoderKL: one factor and one shift for all channels.

Shape letters: B batch, C latent channels, H W picture px, h w latent size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from framework.models.base import device_of, input_dtype


def encode_pixels(pixels: Tensor, vae: nn.Module) -> Tensor:
    """Normalised latents (B, C, h, w) float32 of pixels (B, 3, H, W) in [-1, 1]: (mode - shift) * factor."""
    untyped: Any = vae
    posterior = untyped.encode(pixels.to(device_of(vae), input_dtype(vae))).latent_dist
    shift, factor = _scaling(vae)
    mode: Tensor = posterior.mode()
    return (mode.float() - shift) * factor


def decode_latents(latents: Tensor, vae: nn.Module) -> Tensor:
    """Pixels (B, 3, H, W) float32 in [-1, 1] of normalised latents (B, C, h, w)."""
    shift, factor = _scaling(vae)
    raw = latents.to(device_of(vae), torch.float32) / factor + shift
    return _decode(raw, vae).clamp(-1, 1)


def reconstruct_pixels(
    pixels: Tensor, vae: nn.Module, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction without a clamp, mean and logvar of the posterior; see `Family.reconstruct`."""
    untyped: Any = vae
    posterior = untyped.encode(pixels.to(device_of(vae), input_dtype(vae))).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    latents = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(mean)
    return _decode(latents, vae), mean, logvar


def _decode(raw: Tensor, vae: nn.Module) -> Tensor:
    untyped: Any = vae
    pixels: Tensor = untyped.decode(raw.to(input_dtype(vae)), return_dict=False)[0]
    return pixels.float()


def _scaling(vae: nn.Module) -> tuple[float, float]:
    """Shift (0 where the config has none) and factor of the published latents."""
    untyped: Any = vae
    shift, factor = untyped.config.shift_factor, untyped.config.scaling_factor
    return float(shift or 0.0), float(factor)
