"""From encoded samples to a loss: flow matching for the DiT and text encoder, reconstruction for the VAE.

Shape letters: B batch, C latent channels, H W picture px, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.diffusion.flow_matching import (
    draw_noise,
    draw_sigmas,
    flow_loss,
    interpolate,
    loss_weight,
    resolve_shift,
    sample_losses,
    sample_seed,
    shift_sigmas,
    velocity_target,
)
from framework.models import Family, TextConditioning
from framework.schema import ObjectiveConfig


@dataclass(frozen=True)
class Objective:
    """The loss of a run; every random draw follows from the run's seed and the sample's place in the stream.

    places: of each sample in the stream of all samples of the run, micro_step * global batch + position. So
    batches of 4, two accumulated batches of 2, and two processes with 2 each draw the same for each sample.
    """

    config: ObjectiveConfig
    family: Family
    seed: int

    def flow_loss(
        self,
        latents: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        places: Sequence[int],
        size_px: tuple[int, int],
    ) -> Tensor:
        """Flow-matching loss (scalar float32) at drawn noise levels.

        latents: (B, C, h, w).   size_px: width and height of the batch's pictures.
        """
        config = self.config
        noise = draw_noise(latents.shape[1:], self._seeds(places, "noise")).to(latents)
        sigma = draw_sigmas(
            self._seeds(places, "sigma"),
            sampling=config.timestep_sampling,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
        ).to(latents.device)
        sigma = shift_sigmas(sigma, self._shift(size_px))
        prediction = self.family.predict(interpolate(latents, noise, sigma), sigma, text, dit)
        return flow_loss(
            prediction,
            velocity_target(latents, noise),
            loss_weight(sigma, config.weighting),
            loss=config.loss,
            huber_delta=config.huber_delta,
        )

    def losses_at(
        self,
        sigma: float,
        latents: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        seeds: Sequence[int],
    ) -> Tensor:
        """Unweighted loss (B,) of each sample at one noise level and with the noise of `seeds`."""
        noise = draw_noise(latents.shape[1:], seeds).to(latents)
        levels = torch.full((len(latents),), sigma, device=latents.device)
        prediction = self.family.predict(interpolate(latents, noise, levels), levels, text, dit)
        return sample_losses(
            prediction,
            velocity_target(latents, noise),
            loss=self.config.loss,
            huber_delta=self.config.huber_delta,
        )

    def reconstruction_loss(
        self, pixels: Tensor, vae: nn.Module, *, places: Sequence[int]
    ) -> Tensor:
        """L1 distance of the reconstruction plus `vae_kl_weight` times the KL divergence (scalar float32).

        pixels: (B, 3, H, W) in [-1, 1]. The latents are drawn from the posterior (arXiv:1312.6114); the
        divergence from N(0, 1) is summed over each picture's latents and averaged over pictures.
        """
        height, width = pixels.shape[-2:]
        shape = self.family.initial_latents(width, height, 0).shape[1:]
        noise = draw_noise(shape, self._seeds(places, "vae")).to(pixels)
        reconstruction, mean, logvar = self.family.reconstruct(pixels, vae, noise=noise)
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        distance = (reconstruction - pixels).abs().mean()
        return distance + self.config.vae_kl_weight * divergence

    def _seeds(self, places: Sequence[int], purpose: str) -> list[int]:
        return [sample_seed(self.seed, 0, place, purpose) for place in places]

    def _shift(self, size_px: tuple[int, int]) -> float:
        """The factor for the pictures' size; all pictures of a batch have one size."""
        tokens = self.family.image_tokens(*size_px)
        return resolve_shift(self.config.shift, self.family.scheduler_config, tokens)
