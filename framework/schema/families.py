"""What is known about each model family without reading a weight or importing torch.

The other half of a family, how to encode, call and decode it, is `framework/models/<family>.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ComponentSpec:
    """Where a component's weights lie in the published layout and which of them the family uses.

    subfolder: folder of the component inside a checkpoint, e.g. "transformer".
    kind: (key, value) in its config.json that says that it is the right model.
    renames: (regular expression, replacement) pairs from a key in the file to a name in the module; the first that matches wins.
    ignored_keys: globs over file keys that the family never loads (a vision tower, an output head).
    embedding_globs: globs over module names that hold token embeddings (2-D like a linear layer, but looked up).
    keep_high_precision: globs over module names that stay in bf16 by default when the component is stored in FP8.
    lora_targets: default `target_modules` of a LoRA on this component.
    """

    subfolder: str
    kind: tuple[str, str]
    renames: tuple[tuple[str, str], ...] = ()
    ignored_keys: tuple[str, ...] = ()
    embedding_globs: tuple[str, ...] = ()
    keep_high_precision: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilySpec:
    """One model family: its components and the sizes that its pictures may have.

    size_divisor_px: width and height must be multiples of this (pixels per image token along one side).
    """

    name: str
    components: Mapping[str, ComponentSpec]
    size_divisor_px: int


QWEN_IMAGE = FamilySpec(
    name="qwen_image",
    size_divisor_px=16,
    components={
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
    },
)

FAMILIES: Mapping[str, FamilySpec] = {QWEN_IMAGE.name: QWEN_IMAGE}
