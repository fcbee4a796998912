"""Builds a tiny Wan 2.1 text-to-video checkpoint in the published layout, with random weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from tests.families.parts import t5_tokenizer, unsettle_

HIDDEN = 16
# As published for 480p.
FLOW_SHIFT = 3.0


def build_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """Write a whole checkpoint of 0.2 MB."""
    save_parts(folder, ("transformer",), seed=seed)
    save_index(folder, {})
    return folder


def save_parts(folder: Path, transformers: tuple[str, ...], *, seed: int) -> None:
    """Write everything but model_index.json.   transformers: folders of the denoisers, which get different weights."""
    tokenizer = t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, vae = _text_encoder(len(tokenizer)), _vae()
        denoisers = {name: _transformer() for name in transformers}
    for name, denoiser in denoisers.items():
        denoiser.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size=30_000)
    text_encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder", max_shard_size=10_000)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    _save_scheduler(folder / "scheduler")


def save_index(folder: Path, more: dict[str, object]) -> None:
    """Write model_index.json.   more: what a variant adds."""
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **more}, indent=2))


def _transformer() -> nn.Module:
    """2 blocks, 2 heads of 12."""
    from diffusers import WanTransformer3DModel

    return unsettle_(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=HIDDEN,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=1024,
        )
    )


def _text_encoder(num_tokens: int) -> nn.Module:
    """2 blocks, 2 heads of 8; `tie_word_embeddings` is false as in the published config."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=num_tokens,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        tie_word_embeddings=False,
    )
    return unsettle_(UMT5EncoderModel(config))


def _vae() -> nn.Module:
    """4 base channels, 8-fold reduction in space and 4-fold in time, latents scaled off centre."""
    from diffusers import AutoencoderKLWan

    return unsettle_(
        AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[(i - 7.5) / 10 for i in range(16)],
            latents_std=[0.5 + i / 10 for i in range(16)],
        )
    )


def _save_scheduler(folder: Path) -> None:
    from diffusers import UniPCMultistepScheduler

    UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    ).save_pretrained(folder)
