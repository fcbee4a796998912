"""Builds a tiny SDXL checkpoint in the published layout, with random weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoints import rename_keys
from tests.families.clip import clip_text_model, save_clip_tokenizer
from tests.families.parts import kl_vae, unsettle_

FIRST_WIDTH = 8
SECOND_WIDTH = 12
TIME_WIDTH = 4


def build_checkpoint(
    folder: Path, *, seed: int = 0, prediction: str = "epsilon", zeros_for_empty: bool = True
) -> Path:
    """Write a whole checkpoint of 0.5 MB.

    prediction: what the UNet predicts, epsilon or v_prediction.   zeros_for_empty: `force_zeros_for_empty_prompt`.
    """
    num_tokens = save_clip_tokenizer(folder / "tokenizer")
    save_clip_tokenizer(folder / "tokenizer_2", pad_token="!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _unet()
        first = clip_text_model(
            num_tokens=num_tokens, width=FIRST_WIDTH, layers=3, act="quick_gelu"
        )
        second = clip_text_model(
            num_tokens=num_tokens, width=SECOND_WIDTH, layers=3, act="gelu", projects=True
        )
        vae = kl_vae(latent_channels=4, scaling=0.13025, shift=None, quant=True)
        for encoder in (first, second):
            unsettle_(encoder)
    for name, module in (
        ("unet", unet),
        ("text_encoder", first),
        ("text_encoder_2", second),
        ("vae", vae),
    ):
        untyped: Any = module.to(torch.bfloat16)
        untyped.save_pretrained(folder / name)
    # Published files have the names of older versions of transformers.
    rename_keys(folder / "text_encoder", r"^(?!text_model\.)", "text_model.")
    _save_scheduler(folder / "scheduler", prediction)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.1",
        "add_watermarker": None,
        "force_zeros_for_empty_prompt": zeros_for_empty,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _unet() -> nn.Module:
    """The published kinds of blocks, one layer each."""
    from diffusers import UNet2DConditionModel

    return unsettle_(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2, 2),
            transformer_layers_per_block=(1, 1, 2),
            cross_attention_dim=FIRST_WIDTH + SECOND_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_WIDTH,
            projection_class_embeddings_input_dim=6 * TIME_WIDTH + SECOND_WIDTH,
            norm_num_groups=4,
        )
    )


def _save_scheduler(folder: Path, prediction: str) -> None:
    from diffusers import EulerDiscreteScheduler

    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction,
    ).save_pretrained(folder)
