"""Files that people give by mistake, so that they are told what it is, and Qwen-Image's transformer."""

from __future__ import annotations

from framework.plan.native_names.form import Content, FamilyNames, NativeNames

_QWEN_IMAGE = frozenset({"QwenImageTransformer2DModel"})
_NONE: frozenset[str] = frozenset()

OTHERS = FamilyNames(
    names=(
        NativeNames(
            kinds=_QWEN_IMAGE,
            marker=r"^transformer_blocks\.0\.img_mod\.1\.weight$",
            # Edit 2511 modulates control pictures as if they were clean.
            dropped=r"^__index_timestep_zero__$",
            markers=(("__index_timestep_zero__", ("zero_cond_t", True)),),
        ),
    ),
    contents=(
        Content(
            "a LoRA",
            _NONE,
            (r".*\.lora_(A|B|down|up)(\.default)?\.weight",),
            hint="give the checkpoint as `source`, and the LoRA as `lora.init_from` of the component",
        ),
        Content(
            "Qwen-Image's transformer",
            _QWEN_IMAGE,
            (r"transformer_blocks\.0\.img_mod\.1\.weight", r"txt_norm\.weight"),
        ),
        Content("Stable Diffusion 3", _NONE, (r"joint_blocks\.0\.x_block\.attn\.qkv\.weight",)),
        Content(
            "a ControlNet", _NONE, (r"(zero_convs\.0\.0|controlnet_cond_embedding\..*)\.weight",)
        ),
        Content(
            "HunyuanVideo",
            _NONE,
            (r"double_blocks\.0\.img_attn_qkv\.weight",),
        ),
        Content(
            "Chroma's transformer",
            _NONE,
            (r"distilled_guidance_layer\.in_proj\.weight",),
        ),
    ),
)
