"""Builds a tiny FLUX.1 checkpoint in the published layout, with random weights, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoints import rename_keys
from tests.families.clip import clip_text_model, save_clip_tokenizer
from tests.families.parts import kl_vae, t5_tokenizer, unsettle_

POOLED = 20
WIDTH = 24


def build_checkpoint(folder: Path, *, seed: int = 0, guidance: bool = True) -> Path:
    """Write a whole checkpoint of 0.4 MB.   guidance: dev, which is given the scale; False makes schnell."""
    num_tokens = save_clip_tokenizer(folder / "tokenizer")
    tokenizer_2: Any = t5_tokenizer()
    tokenizer_2.save_pretrained(folder / "tokenizer_2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dit = _transformer(guidance)
        clip = unsettle_(
            clip_text_model(num_tokens=num_tokens, width=POOLED, layers=2, act="quick_gelu")
        )
        t5 = _t5(len(tokenizer_2))
        vae = kl_vae(latent_channels=16, scaling=0.3611, shift=0.1159, quant=False)
    for name, module, shard_bytes in (
        ("transformer", dit, 100_000),
        ("text_encoder", clip, 10**9),
        ("text_encoder_2", t5, 10_000),
        ("vae", vae, 10**9),
    ):
        untyped: Any = module.to(torch.bfloat16)
        untyped.save_pretrained(folder / name, max_shard_size=shard_bytes)
    # Published files have the names of older versions of transformers.
    rename_keys(folder / "text_encoder", r"^(?!text_model\.)", "text_model.")
    _save_scheduler(folder / "scheduler", guidance)
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _transformer(guidance: bool) -> nn.Module:
    """2 blocks of each kind, 2 heads of 16."""
    from diffusers import FluxTransformer2DModel

    return unsettle_(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=POOLED,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
    )


def _t5(num_tokens: int) -> nn.Module:
    """T5's encoder with gated products, as its version 1.1: 2 layers of 2 heads."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=num_tokens,
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    return unsettle_(T5EncoderModel(config))


def _save_scheduler(folder: Path, guidance: bool) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if guidance else 1.0,
        use_dynamic_shifting=guidance,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    ).save_pretrained(folder)
