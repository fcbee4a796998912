"""Sampling in a few differentiable steps: the levels are the sampler's, and gradients reach every step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from framework.diffusion.distillation import sample_differentiably, student_sigmas

DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


@pytest.mark.parametrize("config", [DYNAMIC, {"shift": 3.0}], ids=["dynamic", "static"])
def test_levels_are_those_of_the_sampler(config: dict[str, object]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    dynamic = bool(config.get("use_dynamic_shifting"))
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=math.log(1.7) if dynamic else None)
    found = student_sigmas(4, config, 1.7)
    assert found == pytest.approx(scheduler.sigmas.tolist())
    assert (found[0], found[-1], len(found)) == (pytest.approx(1.0), 0.0, 5)


def test_a_single_step_is_possible() -> None:
    assert student_sigmas(1, DYNAMIC, 1.7) == pytest.approx((1.0, 0.0))


def test_the_true_velocity_leads_from_noise_to_picture() -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    made = sample_differentiably(
        lambda x, level: noise - x0, noise, student_sigmas(4, DYNAMIC, 1.7)
    )
    torch.testing.assert_close(made, x0)


def test_gradients_flow_through_all_steps() -> None:
    """With v = w x each Euler step multiplies by 1 + w dsigma; so does the derivative."""
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sigmas = student_sigmas(3, {"shift": 1.0}, 1.0)
    seen = []

    def predict(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        seen.append(float(level[0]))
        return weight * x

    made = sample_differentiably(predict, torch.ones(1, 1, dtype=torch.float64), sigmas)
    made.sum().backward()
    steps = torch.tensor([b - a for a, b in pairwise(sigmas)])
    whole = (1 + 0.3 * steps.double()).prod()
    slope = whole * (steps.double() / (1 + 0.3 * steps.double())).sum()
    assert float(made.detach()) == pytest.approx(float(whole))
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx(float(slope), rel=1e-6)
    assert seen == pytest.approx(list(sigmas[:-1]))
