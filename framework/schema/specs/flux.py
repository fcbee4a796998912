"""FLUX.1 dev and schnell (Black Forest Labs 2024) as published for diffusers."""

from __future__ import annotations

from framework.schema.family import ComponentSpec, FamilySpec

CLIP_EMBEDDINGS = ("token_embedding", "position_embedding")
CLIP_LORA_TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
)
CLIP_L = ComponentSpec(
    subfolder="text_encoder",
    kind=("model_type", "clip_text_model"),
    # transformers names the model's parts without a prefix since 5.6, published files with it.
    renames=((r"^text_model\.", ""),),
    ignored_keys=("*.position_ids",),
    embedding_globs=CLIP_EMBEDDINGS,
    lora_targets=CLIP_LORA_TARGETS,
)
# Older files call the parts of the only attention by other names.
VAE_RENAMES = (
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)
VAE_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

FLUX = FamilySpec(
    name="flux",
    size_divisor_px=16,
    guided=False,
    extras={"tokenizer": "tokenizer", "tokenizer_2": "tokenizer_2", "scheduler": "scheduler"},
    components={
        "text_encoder": CLIP_L,
        "text_encoder_2": ComponentSpec(
            subfolder="text_encoder_2",
            kind=("model_type", "t5"),
            # `shared` once more, where a file has both.
            ignored_keys=("encoder.embed_tokens.weight",),
            embedding_globs=("shared", "relative_attention_bias"),
            lora_targets=(
                "SelfAttention.q",
                "SelfAttention.k",
                "SelfAttention.v",
                "SelfAttention.o",
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
            kind=("_class_name", "FluxTransformer2DModel"),
            keep_high_precision=(
                "time_text_embed*",
                "context_embedder",
                "x_embedder",
                "norm_out*",
                "^proj_out",
            ),
            lora_targets=(
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            ),
        ),
    },
)
