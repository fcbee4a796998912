"""Wan 2.1 text-to-video (Wan Team 2025, arXiv:2503.20314), 1.3B and 14B, as published for diffusers."""

from __future__ import annotations

from framework.schema.family import ComponentSpec, FamilySpec

TEXT_ENCODER = ComponentSpec(
    subfolder="text_encoder",
    kind=("model_type", "umt5"),
    # Only the encoder's stack is built, and it has the one table of embeddings that the file calls `shared`.
    renames=((r"^shared\.", "embed_tokens."), (r"^encoder\.", "")),
    # `spiece_model` is a tokenizer as bytes; the other is `shared` once more, where a file has both.
    ignored_keys=("encoder.embed_tokens.weight", "spiece_model"),
    embedding_globs=("embed_tokens", "relative_attention_bias"),
    lora_targets=("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
)

VAE = ComponentSpec(
    subfolder="vae",
    kind=("_class_name", "AutoencoderKLWan"),
    keep_high_precision=("encoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv"),
    lora_targets=("to_qkv", "proj"),
)


def transformer(subfolder: str) -> ComponentSpec:
    """A Wan transformer in a folder of this name."""
    return ComponentSpec(
        subfolder=subfolder,
        kind=("_class_name", "WanTransformer3DModel"),
        keep_high_precision=("patch_embedding", "condition_embedder*", "proj_out"),
        lora_targets=(
            "attn1.to_q",
            "attn1.to_k",
            "attn1.to_v",
            "attn1.to_out.0",
            "attn2.to_q",
            "attn2.to_k",
            "attn2.to_v",
            "attn2.to_out.0",
            "ffn.net.0.proj",
            "ffn.net.2",
        ),
    )


WAN2_1 = FamilySpec(
    name="wan2_1",
    size_divisor_px=16,
    media="video",
    frame_divisor=4,
    components={"text_encoder": TEXT_ENCODER, "vae": VAE, "dit": transformer("transformer")},
)
