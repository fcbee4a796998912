"""Flow matching with straight paths: noise levels, targets and losses as pure functions.

The path is x_sigma = (1 - sigma) x0 + sigma n with n ~ N(0, 1); the model learns its velocity
dx/dsigma = n - x0 (Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003). sigma
1 is noise, sigma 0 the picture. Noise levels and weights follow Esser et al. 2024,
arXiv:2403.03206, section 3.1.

Every random number comes from a seed made of (run seed, micro-step, position in the global batch,
purpose). So it depends neither on the number of processes nor on what else is in the batch, and a
resumed run draws what the uninterrupted one would have drawn.

Shape letters: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor

Sampling = Literal["uniform", "logit_normal"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]
Loss = Literal["mse", "huber"]

# Lowest noise level that is drawn. A guess: far below the last level of any sampler (Qwen-Image's
# is 0.02), yet high enough that one sample weighted by sigma**-2 can't ruin a run.
SIGMA_MIN = 1e-3


def sample_seed(seed: int, micro_step: int, position: int, purpose: str) -> int:
    """Seed for one random draw, the same on every machine: a 63-bit hash of all four.

    position: place of the sample in the global batch.   purpose: "noise", "sigma", "dropout"...
    """
    text = f"{seed}:{micro_step}:{position}:{purpose}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape) float32 on the CPU; row i depends on seeds[i] alone."""
    rows = [torch.randn(tuple(shape), generator=seeded_generator(seed)) for seed in seeds]
    return torch.stack(rows)


def draw_sigmas(
    seeds: Sequence[int],
    *,
    sampling: Sampling = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    within: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Noise levels (B,) float32 on the CPU in [SIGMA_MIN, 1], before any shift; row i depends on seeds[i] alone.

    logit_normal: sigmoid(mean + std * N(0, 1)) (arXiv:2403.03206, section 3.1).
    within: lowest and highest level; the distribution is cut off there, not squeezed.
    """
    if within != (0.0, 1.0):
        sigmas = _draw_within(seeds, sampling, logit_mean, logit_std, within)
    elif sampling == "uniform":
        drawn = [torch.rand((), generator=seeded_generator(s), dtype=torch.float64) for s in seeds]
        sigmas = torch.stack(drawn)
    else:
        drawn = [torch.randn((), generator=seeded_generator(s), dtype=torch.float64) for s in seeds]
        sigmas = torch.sigmoid(logit_mean + logit_std * torch.stack(drawn))
    return sigmas.clamp(SIGMA_MIN, 1.0).float()


def _draw_within(
    seeds: Sequence[int],
    sampling: Sampling,
    mean: float,
    std: float,
    within: tuple[float, float],
) -> Tensor:
    """Levels (B,) float64 of the distribution between two levels, by its inverse cumulative distribution."""
    drawn = [torch.rand((), generator=seeded_generator(s), dtype=torch.float64) for s in seeds]
    share = torch.stack(drawn)
    low, high = within
    if sampling == "uniform":
        return low + (high - low) * share
    ends = torch.tensor([low, high], dtype=torch.float64).logit()
    below, above = torch.special.ndtr((ends - mean) / std)
    # Beyond 8 standard deviations nothing is left between the ends; the nearer end is what is meant.
    place = torch.special.ndtri((below + (above - below) * share).clamp(1e-15, 1 - 1e-15))
    return torch.sigmoid(mean + std * place).clamp(low, high)


def unshift_sigma(sigma: float, factor: float) -> float:
    """The level that `shift_sigmas` turns into this one."""
    return sigma / (factor - (factor - 1) * sigma)


def shift_sigmas(sigma: Tensor, factor: float) -> Tensor:
    """Move noise levels towards 1: factor * sigma / (1 + (factor - 1) * sigma); factor 1 leaves them.

    arXiv:2403.03206, section 5.3.2. The schedulers' exp(mu) / (exp(mu) + 1 / sigma - 1) is this
    with factor exp(mu).
    """
    return factor * sigma / (1 + (factor - 1) * sigma)


def resolve_shift(
    shift: float | Literal["scheduler"], scheduler_config: Mapping[str, Any], image_tokens: int
) -> float:
    """The factor for `shift_sigmas`: as configured, or as the published scheduler config says for this size.

    With dynamic shifting, mu is linear in the number of image tokens: base_shift at
    base_image_seq_len, max_shift at max_image_seq_len, going on beyond both; the factor is exp(mu),
    or mu where time_shift_type is "linear". `shift_terminal` stretches a sampler's finite list of
    levels and has no meaning for training. Missing keys have the defaults of diffusers'
    FlowMatchEulerDiscreteScheduler.
    """
    if shift != "scheduler":
        return float(shift)
    if not scheduler_config.get("use_dynamic_shifting", False):
        # UniPC's name for it is flow_shift.
        return float(scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0)))
    base, limit = (
        scheduler_config.get("base_shift", 0.5),
        scheduler_config.get("max_shift", 1.15),
    )
    base_tokens = scheduler_config.get("base_image_seq_len", 256)
    limit_tokens = scheduler_config.get("max_image_seq_len", 4096)
    mu = base + (limit - base) * (image_tokens - base_tokens) / (limit_tokens - base_tokens)
    if scheduler_config.get("time_shift_type", "exponential") == "linear":
        return float(mu)
    return math.exp(mu)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents (1 - sigma) x0 + sigma noise; x0, noise (B, C, h, w), sigma (B,)."""
    level = _per_sample(sigma, x0)
    return (1 - level) * x0 + level * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model learns: noise - x0, the path's derivative by sigma; a sampler adds dsigma times it."""
    return noise - x0


def loss_weight(sigma: Tensor, weighting: Weighting) -> Tensor:
    """Weight (B,) of each sample's loss at its noise level, in sigma's dtype.

    sigma_sqrt: sigma**-2, which stresses nearly clean pictures (named as in diffusers' training
    examples).
    cosmap: 2 / (pi (1 - 2 sigma + 2 sigma**2)), the density of a cosine schedule (arXiv:2403.03206,
    section 3.1).
    """
    if weighting == "sigma_sqrt":
        return sigma**-2.0
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    *,
    loss: Loss = "mse",
    huber_delta: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean error of each sample (B,) float32; prediction and target (B, C, h, w), any float dtype.

    huber: e**2 / 2 where |e| < delta, delta (|e| - delta / 2) beyond (Huber 1964).
    mask: (B, 1, H, W) in [0, 1], of the pictures; each latent's error counts by the mean of the mask over its pixels.
    """
    error = prediction.float() - target.float()
    if loss == "huber":
        size = error.abs()
        each = torch.where(
            size < huber_delta, 0.5 * error**2, huber_delta * (size - 0.5 * huber_delta)
        )
    else:
        each = error**2
    if mask is not None:
        height, width = each.shape[-2:]
        weight = torch.nn.functional.adaptive_avg_pool2d(mask.to(each), (height, width))
        each = each * (weight[:, :, None] if each.ndim == 5 else weight)
    return each.flatten(1).mean(1)


def flow_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    loss: Loss = "mse",
    huber_delta: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Weighted mean (scalar float32) of the samples' losses. weight: (B,).   mask: see `sample_losses`."""
    losses = sample_losses(prediction, target, loss=loss, huber_delta=huber_delta, mask=mask)
    return (weight.to(losses) * losses).mean()


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU, whose numbers are the same on every machine."""
    return torch.Generator("cpu").manual_seed(seed)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) as (B, 1, 1, ...) so that it broadcasts over `like`."""
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))
