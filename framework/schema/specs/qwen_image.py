"""Qwen-Image (Wu et al. 2025, arXiv:2508.02324) as published."""

from __future__ import annotations

from framework.schema.family import ComponentSpec, FamilySpec

QWEN_IMAGE = FamilySpec(
    name="qwen_image",
    size_divisor_px=16,
    components={
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            kind=("model_type", "qwen2_5_vl"),
            # Published files use the names of two generations of transformers; only the language model is needed here.
            renames=(
                (r"^model\.language_model\.", ""),
                (r"^language_model\.model\.", ""),
                (r"^model\.", ""),
            ),
            ignored_keys=("visual.*", "model.visual.*", "lm_head.*"),
            embedding_globs=("embed_tokens",),
            # Embeddings stay in high precision unless `fp8.layers` asks for them.
            lora_targets=(
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
            ),
        ),
        "vae": ComponentSpec(
            subfolder="vae",
            kind=("_class_name", "AutoencoderKLQwenImage"),
            keep_high_precision=(
                "encoder.conv_in",
                "decoder.conv_out",
                "quant_conv",
                "post_quant_conv",
            ),
            lora_targets=("to_qkv", "proj"),
        ),
        "dit": ComponentSpec(
            subfolder="transformer",
            kind=("_class_name", "QwenImageTransformer2DModel"),
            keep_high_precision=("time_text_embed*", "img_in", "txt_in", "norm_out*", "proj_out"),
            lora_targets=(
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
            ),
        ),
    },
)
