"""SDXL (Podell et al. 2023, arXiv:2307.01952), base and fine-tuned models, as published for diffusers."""

from __future__ import annotations

from framework.schema.family import ComponentSpec, FamilySpec
from framework.schema.specs.flux import (
    CLIP_EMBEDDINGS,
    CLIP_L,
    CLIP_LORA_TARGETS,
    VAE_LORA_TARGETS,
    VAE_RENAMES,
)

SDXL = FamilySpec(
    name="sdxl",
    # The VAE shrinks 8-fold and the UNet 4-fold once more.
    size_divisor_px=32,
    objective="ddpm",
    extras={"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_2", "scheduler": "scheduler"},
    components={
        "text_encoder": CLIP_L,
        "text_encoder_2": ComponentSpec(
            subfolder="text_encoder_2",
            kind=("model_type", "clip_text_model"),
            ignored_keys=("*.position_ids",),
            embedding_globs=CLIP_EMBEDDINGS,
            lora_targets=CLIP_LORA_TARGETS,
        ),
        "vae": ComponentSpec(
            subfolder="vae",
            kind=("_class_name", "AutoencoderKL"),
            renames=VAE_RENAMES,
            keep_high_precision=(
                "encoder.conv_in",
                "decoder.conv_out",
                "quant_conv",
                "post_quant_conv",
            ),
            lora_targets=VAE_LORA_TARGETS,
        ),
        "dit": ComponentSpec(
            subfolder="unet",
            kind=("_class_name", "UNet2DConditionModel"),
            keep_high_precision=(
                "time_embedding*",
                "add_embedding*",
                "conv_in",
                "conv_out",
                "time_emb_proj",
            ),
            # Every linear layer of the UNet's transformers.
            lora_targets=(
                "to_q",
                "to_k",
                "to_v",
                "to_out.0",
                "proj_in",
                "proj_out",
                "ff.net.0.proj",
                "ff.net.2",
            ),
        ),
    },
)
