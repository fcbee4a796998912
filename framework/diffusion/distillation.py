"""Direct distillation: a student samples in few steps, differentiably, towards what a teacher made of the same noise.

Shape letters: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents, noise levels (B,)) -> velocity."""


def student_sigmas(
    num_steps: int, scheduler_config: Mapping[str, Any], shift: float
) -> tuple[float, ...]:
    """Noise levels from 1 to 0 of the published flow-matching sampler in `num_steps` steps; num_steps + 1 of them.

    shift: the factor for the pictures' size (`resolve_shift`).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = dict(scheduler_config)
    if num_steps == 1:
        # The first and the last level are one; stretching between them would divide by zero.
        config["shift_terminal"] = None
    untyped: Any = FlowMatchEulerDiscreteScheduler
    scheduler = untyped.from_config(config)
    levels = [1 - step / num_steps for step in range(num_steps)]
    linear = config.get("time_shift_type", "exponential") == "linear"
    dynamic = bool(config.get("use_dynamic_shifting", False))
    scheduler.set_timesteps(
        sigmas=levels, mu=(shift if linear else math.log(shift)) if dynamic else None
    )
    return tuple(float(sigma) for sigma in scheduler.sigmas)


def sample_differentiably(predict: Predict, noise: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """Euler steps from noise (B, C, h, w) float32 along `sigmas`; gradients flow through all of them."""
    latents = noise
    for sigma, following in pairwise(sigmas):
        levels = torch.full((len(latents),), sigma, device=latents.device)
        latents = latents + (following - sigma) * predict(latents, levels)
    return latents
