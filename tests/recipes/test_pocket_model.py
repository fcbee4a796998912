"""The committed pocket model is a Qwen-Image that diffusers itself loads, and its pictures are the same there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from transformers import AutoTokenizer

from framework.compose import compose_run
from framework.inference.generate import generate
from framework.models import SampleSettings, get_family
from framework.schema.validate import validate

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "assets" / "pocket"
MAX_BYTES = 25 * 1000 * 1000
PROMPTS = ("red apple", "penguin", "sailboat")
SETTINGS = SampleSettings((64, 64), num_inference_steps=6, guidance_scale=3.0, seed=5)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(10 * np.log10(255**2 / max(float((difference**2).mean()), 1e-12)))


def pictures(*overrides: str) -> list[Image.Image]:
    """What `octavo generate recipe=pocket_lora` would make."""
    composition = compose_run(
        ["recipe=pocket_lora", "model.compute_dtype=fp32", "model.device=cpu", *overrides]
    )
    config, _ = validate(composition.values, composition.where, use="generate")
    return generate(config.model, prompts=PROMPTS, settings=SETTINGS)


@pytest.fixture(scope="module")
def exact() -> list[Image.Image]:
    return pictures()


def test_the_committed_files_are_small() -> None:
    sizes = [path.stat().st_size for path in POCKET.rglob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) < MAX_BYTES


def test_diffusers_makes_the_same_pictures(exact: list[Image.Image]) -> None:
    pipeline = QwenImagePipeline.from_pretrained(POCKET, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    family = get_family("qwen_image")
    family.load_extras({"tokenizer": POCKET / "tokenizer", "scheduler": POCKET / "scheduler"})
    for index, (prompt, picture) in enumerate(zip(PROMPTS, exact, strict=True)):
        # The pipeline takes packed latents: (1, tokens, 4 channels), 2 x 2 positions to a token.
        noise = family.initial_latents(64, 64, SETTINGS.seed + index)
        packed = pipeline._pack_latents(noise, 1, 16, 8, 8)
        reference = pipeline(
            prompt,
            negative_prompt=" ",
            true_cfg_scale=SETTINGS.guidance_scale,
            num_inference_steps=SETTINGS.num_inference_steps,
            width=64,
            height=64,
            latents=packed,
        ).images[0]
        assert psnr(picture, reference) >= 40


def test_fp8_storage_changes_pictures_little(exact: list[Image.Image]) -> None:
    stored = pictures("model.dit.precision=fp8", "model.text_encoder.precision=fp8")
    values = [psnr(a, b) for a, b in zip(stored, exact, strict=True)]
    assert 20 < min(values) < 80


def test_the_prompt_template_is_what_the_pipeline_drops() -> None:
    """QwenImagePipeline drops the first 34 hidden states, which are the template before the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "tokenizer")
    prefix = QwenImagePipeline.from_pretrained(
        POCKET, transformer=None, vae=None, text_encoder=None
    ).prompt_template_encode.partition("{}")[0]
    assert len(tokenizer(prefix).input_ids) == 34
