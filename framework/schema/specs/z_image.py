"""Z-Image (Tongyi-MAI, arXiv:2511.22699), base and Turbo, as published."""

from __future__ import annotations

from framework.schema.family import ComponentSpec, FamilySpec
from framework.schema.specs.flux import VAE_LORA_TARGETS, VAE_RENAMES

Z_IMAGE = FamilySpec(
    name="z_image",
    size_divisor_px=16,
    components={
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            kind=("model_type", "qwen3"),
            renames=((r"^model\.", ""),),
            # What is taken is the input of the last layer: neither the final norm nor the head has a part in it.
            ignored_keys=("norm.weight", "model.norm.weight", "lm_head.*"),
            embedding_globs=("embed_tokens",),
            lora_targets=(
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
            ),
        ),
        "vae": ComponentSpec(
            subfolder="vae",
            kind=("_class_name", "AutoencoderKL"),
            renames=VAE_RENAMES,
            keep_high_precision=("encoder.conv_in", "decoder.conv_out"),
            lora_targets=VAE_LORA_TARGETS,
        ),
        "dit": ComponentSpec(
            subfolder="transformer",
            kind=("_class_name", "ZImageTransformer2DModel"),
            keep_high_precision=(
                "t_embedder*",
                "cap_embedder*",
                "all_x_embedder*",
                "all_final_layer*",
                "*adaLN_modulation*",
            ),
            lora_targets=(
                "attention.to_q",
                "attention.to_k",
                "attention.to_v",
                "attention.to_out.0",
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
            ),
        ),
    },
)
