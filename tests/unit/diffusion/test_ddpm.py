"""DDPM: the schedule against its definition, what is learned, and the draws."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from framework.diffusion.ddpm import DdpmSchedule, draw_steps, offset_noise
from framework.diffusion.flow_matching import sample_seed

# As SDXL is published.
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SEEDS = [sample_seed(0, 0, place, "sigma") for place in range(4000)]


def schedule(prediction_type: str = "epsilon", **changes: object) -> DdpmSchedule:
    return DdpmSchedule({**CONFIG, "prediction_type": prediction_type, **changes})


def test_noise_is_added_as_the_definition_says() -> None:
    """sqrt(a) x0 + sqrt(1 - a) n with a the product of 1 - beta (arXiv:2006.11239, equation 4)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    step = torch.tensor([10, 900])
    share = signal[step].view(2, 1, 1, 1)
    expected = share.sqrt() * x0 + (1 - share).sqrt() * noise
    found = schedule().add_noise(x0, noise, step)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_noise_levels_are_those_of_the_published_sampler() -> None:
    sampler = EulerDiscreteScheduler.from_config(CONFIG)
    signal = schedule().add_noise(torch.ones(1000, 1), torch.zeros(1000, 1), torch.arange(1000))
    expected = sampler.alphas_cumprod.sqrt()
    torch.testing.assert_close(signal[:, 0], expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_from_what_is_learned_the_picture_can_be_found_again(kind: str) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    step = torch.tensor([400])
    made = schedule(kind)
    noisy, target = made.add_noise(x0, noise, step), made.target(x0, noise, step)
    signal = made.add_noise(torch.ones(1), torch.zeros(1), step)
    spread = made.add_noise(torch.zeros(1), torch.ones(1), step)
    found = {
        "epsilon": (noisy - spread * target) / signal,
        "v_prediction": signal * noisy - spread * target,
        "sample": target,
    }[kind]
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5)


def test_an_unknown_prediction_is_refused() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="'flow'"):
        schedule("flow").target(x, x, torch.tensor([0]))


def test_min_snr_weights() -> None:
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v (arXiv:2303.09556, section 3.4)."""
    step = torch.tensor([0, 500, 999])
    signal = schedule().add_noise(torch.ones(3), torch.zeros(3), step).double() ** 2
    snr = signal / (1 - signal)
    least = snr.clamp(max=5)
    for kind, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        torch.testing.assert_close(
            schedule(kind).loss_weight(step, 5.0), expected.float(), rtol=1e-4, atol=1e-6
        )
    assert schedule().loss_weight(step, None).tolist() == [1, 1, 1]


def test_weights_stay_finite_where_no_signal_is_left() -> None:
    made = schedule("v_prediction", rescale_betas_zero_snr=True)
    assert torch.isfinite(made.loss_weight(torch.tensor([999]), 5.0)).all()


def test_steps_are_uniform_between_the_limits() -> None:
    steps = draw_steps(SEEDS, num_steps=1000)
    assert (int(steps.min()), int(steps.max())) == (0, 999)
    assert float(steps.double().mean()) == pytest.approx(499.5, abs=15)
    some = draw_steps(SEEDS, num_steps=1000, low=0.2, high=0.4)
    assert (int(some.min()), int(some.max())) == (200, 399)
    assert torch.equal(draw_steps(SEEDS[3:5], num_steps=1000), steps[3:5])


def test_offset_noise_moves_whole_channels() -> None:
    noise = torch.zeros(2, 3, 4, 4)
    assert offset_noise(noise, SEEDS[:2], 0.0) is noise
    moved = offset_noise(noise, SEEDS[:2], 0.5)
    assert torch.equal(moved, moved[:, :, :1, :1].expand_as(moved))
    assert len(moved[:, :, 0, 0].unique()) == 6
    assert offset_noise(torch.zeros(2, 3, 2, 4, 4), SEEDS[:2], 0.5).shape == (2, 3, 2, 4, 4)
    large = offset_noise(torch.zeros(4000, 1, 1, 1), SEEDS, 0.5)
    assert float(large.std()) == pytest.approx(0.5, rel=0.05)
