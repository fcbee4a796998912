"""From encoded samples to a loss: flow matching, DDPM or distillation for the denoiser, reconstruction for the VAE.

Shape letters: B batch, C latent channels, H W picture px, h w latent size. Latents of clips are (B, C, T, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from framework.diffusion.ddpm import DdpmSchedule, draw_steps, offset_noise
from framework.diffusion.distillation import sample_differentiably, student_sigmas
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
    unshift_sigma,
    velocity_target,
)
from framework.models import Family, TextConditioning
from framework.schema import ObjectiveConfig


@dataclass(frozen=True)
class Batch:
    """Encoded samples of one size.

    latents: (B, C, h, w).   text: B captions and what goes with them.
    places: of each sample in the stream of all samples of the run, micro_step * global batch + position. So batches of
    4, two accumulated batches of 2, and two processes with 2 each draw the same for each sample.
    size_px: width and height of the pictures.   mask: (B, 1, H, W) in [0, 1], where the loss counts; None everywhere.
    noise_seeds: of the noise that a teacher started each picture from; only `direct_distill` reads it.
    """

    latents: Tensor
    text: TextConditioning
    places: Sequence[int]
    size_px: tuple[int, int]
    mask: Tensor | None = None
    noise_seeds: Sequence[int] | None = None


@dataclass(frozen=True)
class Objective:
    """The loss of a run; every random draw follows from the run's seed and the sample's place in the stream.

    component: the denoiser that the loss goes through.
    """

    config: ObjectiveConfig
    family: Family
    seed: int
    component: str = "dit"

    def denoising_loss(self, batch: Batch, dit: nn.Module) -> Tensor:
        """The configured loss (scalar float32) at drawn noise levels."""
        if self.config.name == "ddpm":
            return self._ddpm_loss(batch, dit)
        if self.config.name == "direct_distill":
            return self._distillation_loss(batch, dit)
        return self._flow_loss(batch, dit)

    def losses_at(
        self,
        level: float,
        latents: Tensor,
        text: TextConditioning,
        dit: nn.Module,
        *,
        seeds: Sequence[int],
    ) -> Tensor:
        """Unweighted loss (B,) of each sample at one noise level and with the noise of `seeds`.

        level: sigma; with DDPM the share of the schedule. Of a denoiser that takes some noise levels only it is the
        share of its range. Distillation is judged as flow matching.
        """
        low, high = self.family.sigma_range(self.component)
        level = low + (high - low) * level
        noise = draw_noise(latents.shape[1:], seeds).to(latents)
        if self.config.name == "ddpm":
            schedule = self._schedule
            last = schedule.num_steps - 1
            step = torch.full((len(latents),), round(level * last), device=latents.device)
            noisy, target = (
                schedule.add_noise(latents, noise, step),
                schedule.target(latents, noise, step),
            )
            time = step.float()
        else:
            time = torch.full((len(latents),), level, device=latents.device)
            noisy, target = interpolate(latents, noise, time), velocity_target(latents, noise)
        prediction = self._predict(noisy, time, text, dit)
        return sample_losses(
            prediction, target, loss=self.config.loss, huber_delta=self.config.huber_delta
        )

    def reconstruction_loss(
        self, pixels: Tensor, vae: nn.Module, *, places: Sequence[int]
    ) -> Tensor:
        """L1 distance of the reconstruction plus `vae_kl_weight` times the KL divergence (scalar float32).

        pixels: (B, 3, H, W) in [-1, 1], or (B, 3, F, H, W). The latents are drawn from the posterior (arXiv:1312.6114);
        the divergence from N(0, 1) is summed over each picture's latents and averaged over pictures.
        """
        height, width = pixels.shape[-2:]
        frames = pixels.shape[2] if pixels.ndim == 5 else 1
        shape = self.family.initial_latents(width, height, 0, num_frames=frames).shape[1:]
        noise = draw_noise(shape, self._seeds(places, "vae")).to(pixels)
        reconstruction, mean, logvar = self.family.reconstruct(pixels, vae, noise=noise)
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        distance = (reconstruction - pixels).abs().mean()
        return distance + self.config.vae_kl_weight * divergence

    def _flow_loss(self, batch: Batch, dit: nn.Module) -> Tensor:
        config, latents = self.config, batch.latents
        noise = draw_noise(latents.shape[1:], self._seeds(batch.places, "noise")).to(latents)
        shift = self._shift(batch.size_px)
        sigma = draw_sigmas(
            self._seeds(batch.places, "sigma"),
            sampling=config.timestep_sampling,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            within=self._range(shift),
        ).to(latents.device)
        sigma = shift_sigmas(sigma, shift)
        prediction = self._predict(interpolate(latents, noise, sigma), sigma, batch.text, dit)
        return flow_loss(
            prediction,
            velocity_target(latents, noise),
            loss_weight(sigma, config.weighting),
            loss=config.loss,
            huber_delta=config.huber_delta,
            mask=batch.mask,
        )

    def _ddpm_loss(self, batch: Batch, dit: nn.Module) -> Tensor:
        config, latents, schedule = self.config, batch.latents, self._schedule
        noise = draw_noise(latents.shape[1:], self._seeds(batch.places, "noise"))
        offsets = self._seeds(batch.places, "offset")
        noise = offset_noise(noise, offsets, config.noise_offset).to(latents)
        step = draw_steps(
            self._seeds(batch.places, "sigma"),
            num_steps=schedule.num_steps,
            low=config.sigma_min,
            high=config.sigma_max,
        ).to(latents.device)
        noisy = schedule.add_noise(latents, noise, step)
        prediction = self._predict(noisy, step.float(), batch.text, dit)
        return flow_loss(
            prediction,
            schedule.target(latents, noise, step),
            schedule.loss_weight(step, config.min_snr_gamma),
            loss=config.loss,
            huber_delta=config.huber_delta,
            mask=batch.mask,
        )

    def _distillation_loss(self, batch: Batch, dit: nn.Module) -> Tensor:
        """Distance between the student's picture and the teacher's, both from the noise of the sample's seed."""
        if batch.noise_seeds is None:
            raise ValueError("distillation needs the seeds of the teacher's pictures")
        latents = batch.latents
        width, height = batch.size_px
        frames = [
            self.family.initial_latents(width, height, seed, num_frames=self._num_frames(latents))
            for seed in batch.noise_seeds
        ]
        sigmas = student_sigmas(
            self.config.distill_steps, self.family.scheduler_config, self._shift(batch.size_px)
        )
        made = sample_differentiably(
            lambda noisy, levels: self._predict(noisy, levels, batch.text, dit),
            torch.cat(frames).to(latents),
            sigmas,
        )
        return flow_loss(
            made,
            latents,
            torch.ones(len(latents), device=latents.device),
            loss=self.config.loss,
            huber_delta=self.config.huber_delta,
            mask=batch.mask,
        )

    def _predict(
        self, noisy: Tensor, time: Tensor, text: TextConditioning, dit: nn.Module
    ) -> Tensor:
        return self.family.predict(noisy, time, text, dit, guidance=self.config.guidance)

    def _range(self, shift: float) -> tuple[float, float]:
        """The noise levels that are drawn, before the shift: those wanted, of those that the denoiser is asked at."""
        low, high = self.family.sigma_range(self.component)
        low, high = max(low, self.config.sigma_min), min(high, self.config.sigma_max)
        if (low, high) == (0.0, 1.0):
            return low, high
        return unshift_sigma(low, shift), unshift_sigma(high, shift)

    def _num_frames(self, latents: Tensor) -> int:
        if latents.ndim != 5:
            return 1
        return 1 + (latents.shape[2] - 1) * self.family.spec.frame_divisor

    @cached_property
    def _schedule(self) -> DdpmSchedule:
        return DdpmSchedule(self.family.scheduler_config)

    def _seeds(self, places: Sequence[int], purpose: str) -> list[int]:
        return [sample_seed(self.seed, 0, place, purpose) for place in places]

    def _shift(self, size_px: tuple[int, int]) -> float:
        """The factor for the pictures' size; all pictures of a batch have one size."""
        tokens = self.family.image_tokens(*size_px)
        return resolve_shift(self.config.shift, self.family.scheduler_config, tokens)
