"""Pictures made by the family against those of diffusers' pipeline from the same noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import nn

from framework.models import Family, SampleSettings
from tests.unit.models.conftest import load

PROMPTS = ["a red apple", "a house with a garden"]


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_same_pictures_as_the_pipeline(
    guidance: float, family: Family, modules: dict[str, nn.Module], pipeline: QwenImagePipeline
) -> None:
    settings = SampleSettings((64, 32), num_inference_steps=3, guidance_scale=guidance, seed=7)
    with torch.no_grad():
        positive = family.encode_text(PROMPTS, modules)
        negative = family.encode_text([" "], modules)
    pictures = family.sample(positive, negative, modules, settings)
    for index, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt,
            negative_prompt=" " if guidance > 1 else None,
            true_cfg_scale=guidance,
            width=64,
            height=32,
            num_inference_steps=3,
            generator=torch.Generator("cpu").manual_seed(7 + index),
        ).images[0]
        assert pictures[index].size == expected.size == (64, 32)
        assert psnr(pictures[index], expected) >= 40
        assert np.asarray(expected).std() > 1  # a flat picture would prove nothing


def test_the_pictures_of_a_seed_do_not_depend_on_the_others(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    with torch.no_grad():
        positive = family.encode_text(PROMPTS, modules)
    both = family.sample(positive, None, modules, SampleSettings((32, 32), 2, 1.0, seed=5))
    second = family.sample(positive.row(1), None, modules, SampleSettings((32, 32), 2, 1.0, seed=6))
    assert psnr(both[1], second[0]) >= 40
    assert psnr(both[0], both[1]) < 40


def test_modes_and_gradients_are_as_before_and_steps_are_reported(
    family: Family, tiny_checkpoint: Path, modules: dict[str, nn.Module]
) -> None:
    dit = load(family, "dit", tiny_checkpoint / "transformer").requires_grad_(True)
    dit.train()
    dit.transformer_blocks[0].eval()
    before = [part.training for part in dit.modules()]
    with torch.no_grad():
        positive = family.encode_text(PROMPTS, modules)
    seen: list[tuple[int, int]] = []
    family.sample(
        positive,
        None,
        {**modules, "dit": dit},
        SampleSettings((32, 32), 2, 1.0),
        on_step=lambda done, in_all: seen.append((done, in_all)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [part.training for part in dit.modules()] == before
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in dit.parameters())
    assert all(parameter.grad is None for parameter in dit.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_formats_make_pictures(
    autocast: bool, family: Family, tiny_checkpoint: Path, modules: dict[str, nn.Module]
) -> None:
    """bf16 base with float32 adapters and a bf16 VAE: close to the float32 pictures, and no dtype clash."""
    dit = load(family, "dit", tiny_checkpoint / "transformer", torch.bfloat16)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), dit)
    for name, parameter in dit.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    vae = load(family, "vae", tiny_checkpoint / "vae", torch.bfloat16)
    settings = SampleSettings((32, 32), 2, 3.0)
    with torch.no_grad():
        positive = family.encode_text(PROMPTS[:1], modules)
        negative = family.encode_text([""], modules)
    expected = family.sample(positive, negative, modules, settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = family.sample(
            positive.to(dtype=torch.bfloat16), negative, {"dit": dit, "vae": vae}, settings
        )
    assert psnr(found[0], expected[0]) > 25


def test_float32_weights_under_autocast_make_pictures(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    settings = SampleSettings((32, 32), 2, 3.0)
    with torch.no_grad():
        positive = family.encode_text(PROMPTS[:1], modules)
    expected = family.sample(positive, positive, modules, settings)
    with torch.autocast("cpu", torch.bfloat16):
        found = family.sample(positive, positive, modules, settings)
    assert psnr(found[0], expected[0]) > 25


def test_wrong_requests_are_refused(family: Family, modules: dict[str, nn.Module]) -> None:
    with torch.no_grad():
        positive = family.encode_text(PROMPTS, modules)
    with pytest.raises(ValueError, match="multiples of 16, not 40 x 32"):
        family.sample(positive, None, modules, SampleSettings((40, 32), 1, 1.0))
    with pytest.raises(ValueError, match="one negative caption"):
        family.sample(positive, None, modules, SampleSettings((32, 32), 1, 2.0))


def test_a_single_step_is_finite(family: Family, modules: dict[str, nn.Module]) -> None:
    """The published `shift_terminal` makes the scheduler divide by zero when there is one step."""
    with torch.no_grad():
        positive = family.encode_text(PROMPTS[:1], modules)
    picture = family.sample(positive, None, modules, SampleSettings((32, 32), 1, 1.0))[0]
    assert np.asarray(picture).std() > 1
