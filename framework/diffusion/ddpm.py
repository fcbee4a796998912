"""DDPM (Ho et al. 2020, arXiv:2006.11239): a fixed schedule of noise levels; the model learns the noise, or v.

The schedule is diffusers' own, made of the checkpoint's scheduler config, so training and sampling agree on it.

Shape letters: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.diffusion.flow_matching import seeded_generator


class DdpmSchedule:
    """Noise levels of steps 0 (almost clean) to N - 1 (almost noise), and what is learned at each.

    scheduler_config: the published one: betas, `prediction_type` (epsilon, v_prediction or sample), zero terminal SNR.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        untyped: Any = DDPMScheduler
        self._scheduler: Any = untyped.from_config(dict(scheduler_config))
        self._signal: Tensor = self._scheduler.alphas_cumprod

    @property
    def num_steps(self) -> int:
        """N, as published 1000."""
        return int(self._scheduler.config.num_train_timesteps)

    def add_noise(self, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """sqrt(a) x0 + sqrt(1 - a) noise with a the step's share of signal; x0, noise (B, C, h, w), step (B,) int64."""
        noisy: Tensor = self._scheduler.add_noise(x0, noise, step)
        return noisy

    def target(self, x0: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """What the model learns, by the schedule's `prediction_type`: noise, v (arXiv:2202.00512) or x0."""
        kind = self._scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            velocity: Tensor = self._scheduler.get_velocity(x0, noise, step)
            return velocity
        if kind == "sample":
            return x0
        raise ValueError(f"a scheduler with prediction_type {kind!r} can't be trained")

    def loss_weight(self, step: Tensor, gamma: float | None) -> Tensor:
        """Weight (B,) float32 of each sample's loss: 1, or min(SNR, gamma) in the units of what is learned.

        Hang et al. 2023, arXiv:2303.09556, section 3.4: divided by SNR for noise, by SNR + 1 for v.
        """
        if gamma is None:
            return torch.ones(step.shape, device=step.device)
        signal = self._signal.to(step.device)[step].double()
        snr = signal / (1 - signal)
        kind = self._scheduler.config.prediction_type
        # At zero terminal SNR the quotient's limit is 1 for noise.
        tiny = torch.finfo(snr.dtype).tiny
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
        return (snr.clamp(min=tiny, max=gamma) / divisor.clamp(min=tiny)).float()


def draw_steps(
    seeds: Sequence[int], *, num_steps: int, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Steps (B,) int64, uniform between low and high (shares of the schedule); row i depends on seeds[i] alone."""
    first = min(int(low * num_steps), num_steps - 1)
    last = max(first + 1, round(high * num_steps))
    drawn = [
        torch.randint(first, last, (), generator=seeded_generator(seed), dtype=torch.int64)
        for seed in seeds
    ]
    return torch.stack(drawn)


def offset_noise(noise: Tensor, seeds: Sequence[int], strength: float) -> Tensor:
    """Noise (B, C, h, w) plus a constant per sample and channel, of standard deviation `strength`; 0 adds nothing."""
    if strength == 0:
        return noise
    rows = [
        torch.randn((noise.shape[1], *[1] * (noise.ndim - 2)), generator=seeded_generator(seed))
        for seed in seeds
    ]
    return noise + strength * torch.stack(rows).to(noise)
