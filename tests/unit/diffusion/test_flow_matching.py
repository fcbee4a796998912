"""Flow matching against closed forms in float64 and against diffusers' scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.training_utils import compute_loss_weighting_for_sd3

from framework.diffusion.flow_matching import (
    SIGMA_MIN,
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

# Qwen-Image's published scheduler config.
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


def seeds(count: int, purpose: str = "noise") -> list[int]:
    return [sample_seed(0, 0, position, purpose) for position in range(count)]


def test_seeds_are_stable_numbers() -> None:
    """A changed hash would change every run; these values may never move."""
    assert sample_seed(42, 0, 0, "noise") == 3688043336276995260
    assert sample_seed(42, 7, 3, "sigma") == 5104739081688185217


def test_seeds_differ_in_every_argument() -> None:
    drawn = {
        sample_seed(seed, step, position, purpose)
        for seed in (0, 1, 11)
        for step in (0, 1, 11)
        for position in (0, 1, 11)
        for purpose in ("noise", "sigma")
    }
    assert len(drawn) == 3 * 3 * 3 * 2
    assert all(0 <= seed < 2**63 for seed in drawn)


def test_a_draw_depends_on_its_own_seed_alone() -> None:
    """So splitting a batch over processes, or resuming, changes no number."""
    whole = draw_noise((4, 2, 2), seeds(6))
    parts = [draw_noise((4, 2, 2), seeds(6)[rank::2]) for rank in range(2)]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])
    torch.manual_seed(99)
    assert torch.equal(draw_sigmas(seeds(6))[2:4], draw_sigmas(seeds(6)[2:4]))


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_noise((4,), seeds(3))
    draw_sigmas(seeds(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal() -> None:
    noise = draw_noise((16, 8, 8), seeds(32))
    assert noise.shape == (32, 16, 8, 8)
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_sigmas_have_their_quantiles(mean: float, std: float) -> None:
    sigmas = draw_sigmas(seeds(4000), sampling="logit_normal", logit_mean=mean, logit_std=std)
    for probability, z in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        expected = 1 / (1 + math.exp(-(mean + std * z)))
        assert abs(float(sigmas.quantile(probability)) - expected) < 0.03


def test_uniform_sigmas_are_uniform_and_in_range() -> None:
    sigmas = draw_sigmas(seeds(4000), sampling="uniform")
    assert abs(float(sigmas.mean()) - 0.5) < 0.02
    assert abs(float(sigmas.var()) - 1 / 12) < 0.005
    extreme = draw_sigmas(seeds(50), logit_mean=-50.0)
    assert bool((extreme == SIGMA_MIN).all())
    assert bool((draw_sigmas(seeds(50), logit_mean=50.0) == 1).all())


def test_shift_one_changes_nothing_and_ends_stay() -> None:
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(sigma, 1.0), sigma, rtol=0, atol=1e-15)
    shifted = shift_sigmas(sigma, 3.0)
    assert float(shifted[0]) == 0
    assert float(shifted[-1]) == 1
    assert bool((shifted[1:-1] > sigma[1:-1]).all())
    torch.testing.assert_close(shift_sigmas(shifted, 1 / 3), sigma)


@pytest.mark.parametrize("tokens", [16, 256, 4096, 8192])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_the_schedulers(tokens: int, kind: str) -> None:
    config = {**DYNAMIC, "time_shift_type": kind, "shift_terminal": None}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    mu = calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    levels = [1.0, 0.7, 0.4, 0.05]
    scheduler.set_timesteps(sigmas=levels, mu=mu)
    found = shift_sigmas(torch.tensor(levels), resolve_shift("scheduler", config, tokens))
    torch.testing.assert_close(found, scheduler.sigmas[:-1], rtol=1e-6, atol=1e-6)


def test_dynamic_shift_in_closed_form() -> None:
    assert resolve_shift("scheduler", DYNAMIC, 256) == pytest.approx(math.exp(0.5), rel=1e-12)
    assert resolve_shift("scheduler", DYNAMIC, 8192) == pytest.approx(math.exp(0.9), rel=1e-12)
    middle = resolve_shift("scheduler", DYNAMIC, (256 + 8192) // 2)
    assert middle == pytest.approx(math.exp(0.7), rel=1e-12)


def test_static_shifts() -> None:
    assert resolve_shift(2.5, DYNAMIC, 4096) == 2.5
    assert resolve_shift("scheduler", {"shift": 3.0}, 4096) == 3.0
    assert resolve_shift("scheduler", {}, 4096) == 1.0
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.5])
    found = shift_sigmas(torch.tensor([0.9, 0.5]), 3.0)
    torch.testing.assert_close(found, scheduler.sigmas[:-1], rtol=1e-6, atol=1e-6)


def test_the_path_and_its_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator).unbind()
    ends = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    path = interpolate(x0, noise, ends)
    assert torch.equal(path[0], x0[0])
    assert torch.equal(path[1], noise[1])
    torch.testing.assert_close(path[2], 0.75 * x0[2] + 0.25 * noise[2], rtol=0, atol=1e-15)
    step = 1e-3
    slope = (interpolate(x0, noise, ends + step) - path) / step
    torch.testing.assert_close(slope, velocity_target(x0, noise), rtol=0, atol=1e-10)


def test_float32_interpolation_is_close_to_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 8, 4, 4, 4, dtype=torch.float64, generator=generator).unbind()
    sigma = torch.rand(8, dtype=torch.float64, generator=generator)
    exact = interpolate(x0, noise, sigma)
    found = interpolate(x0.float(), noise.float(), sigma.float())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(weighting: str) -> None:
    sigma = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    expected = compute_loss_weighting_for_sd3(weighting, sigma)
    found = loss_weight(sigma, weighting).float()
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def test_cosmap_integrates_to_one() -> None:
    sigma = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    assert float(loss_weight(sigma, "cosmap").mean()) == pytest.approx(1, abs=1e-6)


def test_losses_in_closed_form() -> None:
    prediction = torch.tensor([[[[0.05, -0.3]]], [[[2.0, 0.0]]]], dtype=torch.float64)
    target = torch.zeros_like(prediction)
    mse = sample_losses(prediction, target)
    assert mse.dtype == torch.float32
    torch.testing.assert_close(mse.double(), torch.tensor([(0.0025 + 0.09) / 2, 2.0]).double())
    huber = sample_losses(prediction, target, loss="huber", huber_delta=0.1)
    expected = torch.tensor([(0.00125 + 0.1 * 0.25) / 2, 0.1 * 1.95 / 2])
    torch.testing.assert_close(huber, expected)
    torch.testing.assert_close(
        huber.mean(), torch.nn.functional.huber_loss(prediction.float(), target.float(), delta=0.1)
    )
    weighted = flow_loss(prediction, target, torch.tensor([1.0, 3.0]))
    assert float(weighted) == pytest.approx((0.04625 + 6.0) / 2)


def test_loss_of_half_precision_is_taken_in_float32() -> None:
    prediction = torch.full((1, 4, 64, 64), 3.0, dtype=torch.bfloat16, requires_grad=True)
    loss = flow_loss(prediction, torch.zeros(1, 4, 64, 64), torch.ones(1))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == 9.0
    loss.backward()
    assert prediction.grad is not None


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_limited_levels_are_the_same_distribution_cut_off(sampling: str) -> None:
    """Kolmogorov-Smirnov distance to the whole distribution's draws between the limits; .04 is far above chance."""
    many = seeds(6000, "sigma")
    options = {"sampling": sampling, "logit_mean": 0.3, "logit_std": 0.8}
    limited = draw_sigmas(many, within=(0.4, 0.9), **options).sort().values
    whole = draw_sigmas(many, **options)
    inside = whole[(whole >= 0.4) & (whole <= 0.9)].sort().values
    assert float(limited.min()) >= 0.4
    assert float(limited.max()) <= 0.9
    points = torch.linspace(0.4, 0.9, 50)
    shares = [torch.searchsorted(x, points) / len(x) for x in (limited, inside)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.04


def test_the_shift_can_be_undone() -> None:
    for factor in (0.5, 1.0, 3.0):
        for sigma in (0.0, 0.2, 1.0):
            shifted = shift_sigmas(torch.tensor([unshift_sigma(sigma, factor)]), factor)
            assert float(shifted) == pytest.approx(sigma, abs=1e-6)


def test_a_mask_counts_where_it_is_white() -> None:
    """A mask of the pictures is averaged over each latent's pixels; black ones give no loss and no gradient."""
    torch.manual_seed(0)
    prediction = torch.randn(2, 4, 8, 8, requires_grad=True)
    target = torch.randn(2, 4, 8, 8)
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, :, :32] = 1
    mask[1, :, :8, :4] = 0  # half of one latent's pixels
    found = sample_losses(prediction, target, mask=mask)
    weight = torch.zeros(2, 1, 8, 8)
    weight[..., :4] = 1
    weight[1, 0, 0, 0] = 0.5
    expected = ((prediction - target) ** 2 * weight).flatten(1).mean(1)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[..., 4:].any()
    clip = sample_losses(prediction[:, :, None], target[:, :, None], mask=mask)
    torch.testing.assert_close(clip, expected)


def test_unipc_calls_the_shift_by_another_name() -> None:
    assert resolve_shift("scheduler", {"flow_shift": 5.0}, 100) == 5.0
