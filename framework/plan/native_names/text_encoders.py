"""Text encoders as single files: the names are the published ones, but for keys of no use and prefixes.

Facts: ComfyUI `comfy/text_encoders/`, `comfy/sd.py`; transformers' models of these names.
"""

from __future__ import annotations

from framework.plan.native_names.form import Content, FamilyNames, NativeNames

T5_KINDS = frozenset({"t5", "T5EncoderModel"})
UMT5_KINDS = frozenset({"umt5", "UMT5EncoderModel"})
CLIP_KINDS = frozenset({"clip_text_model", "CLIPTextModel", "CLIPTextModelWithProjection"})
QWEN_VL_KINDS = frozenset({"qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"})
QWEN3_KINDS = frozenset({"qwen3", "Qwen3Model", "Qwen3ForCausalLM"})

_CLIP_JUNK = r"^(logit_scale|(.*\.)?position_ids|vision_model\..*|visual_projection\..*)$"
_BIAS = r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
_BLOCK = r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"

TEXT_ENCODERS = FamilyNames(
    names=(
        NativeNames(
            kinds=T5_KINDS | UMT5_KINDS,
            marker=rf"^{_BLOCK}$",
            aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
            # ComfyUI's umt5 files carry the tokenizer's model as bytes.
            dropped=r"^(spiece_model|logit_scale|lm_head\.weight|decoder\..*)$",
        ),
        NativeNames(
            # The first encoder of two has no projection here, but `clip_l.safetensors` may have one.
            kinds=CLIP_KINDS,
            folder="text_encoder",
            marker=r"^text_model\.encoder\.layers\.0\.",
            dropped=rf"{_CLIP_JUNK}|^text_projection\.",
        ),
        NativeNames(
            kinds=CLIP_KINDS,
            marker=r"^text_model\.encoder\.layers\.0\.",
            dropped=_CLIP_JUNK,
        ),
        NativeNames(
            kinds=QWEN_VL_KINDS | QWEN3_KINDS,
            marker=r"^(model\.)?layers\.0\.",
            dropped=r"^(tekken_model|spiece_model|tokenizer_json)$",
        ),
    ),
    contents=(
        Content("the T5 text encoder", T5_KINDS, (_BLOCK,), without=_BIAS),
        Content("the UMT5 text encoder", UMT5_KINDS, (_BLOCK, _BIAS)),
        Content(
            "a CLIP text encoder",
            CLIP_KINDS,
            (r"(text_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",),
        ),
        Content(
            "the Qwen2.5-VL text encoder",
            QWEN_VL_KINDS,
            (r"layers\.0\.self_attn\.q_proj\.bias", r"layers\.0\.mlp\.gate_proj\.weight"),
        ),
        Content(
            "a Qwen3 text encoder",
            QWEN3_KINDS,
            (r"layers\.0\.self_attn\.q_norm\.weight", r"layers\.0\.mlp\.gate_proj\.weight"),
        ),
    ),
    prefixes={
        "qwen2_5_vl": ("text_encoders.qwen25_7b.transformer.",),
        "qwen3": ("text_encoders.qwen3_4b.transformer.",),
        "t5": ("text_encoders.t5xxl.transformer.",),
        "umt5": ("text_encoders.umt5xxl.transformer.",),
    },
)

CLIP_PREFIXES = {
    "text_encoder": (
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.1.transformer.",
        "text_encoders.clip_g.transformer.",
    ),
}
"""A whole checkpoint holds two text encoders of one kind: by its folder in the published layout, which is which."""
