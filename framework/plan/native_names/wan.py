"""Wan 2.1 and 2.2: transformer and VAE in the names of their authors (Wan-Video), which ComfyUI uses, too.

Qwen-Image's VAE has the structure and the names of Wan 2.1's.
Facts: diffusers `convert_wan_transformer_to_diffusers` and `convert_wan_vae_to_diffusers`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from framework.plan.native_names.form import Content, FamilyNames, NativeNames, Rename

_TRANSFORMER = frozenset({"WanTransformer3DModel"})
_VAE = frozenset({"AutoencoderKLWan", "AutoencoderKLQwenImage"})


def _up_blocks(keys: Collection[str]) -> tuple[Rename, ...]:
    """The decoder counts its parts in one row, residual blocks and an upsampler in turn; here in blocks of them."""
    found = [re.match(r"decoder\.upsamples\.(\d+)\.(\w+)\.", key) for key in keys]
    parts = {int(match[1]): match[2] for match in found if match}
    samplers = [i for i, name in parts.items() if name in ("resample", "time_conv")]
    per_block = min(samplers, default=max(parts, default=0) + 1) + 1
    renames = []
    for i in sorted(parts):
        block, j = divmod(i, per_block)
        part = "upsamplers.0" if j == per_block - 1 else f"resnets.{j}"
        renames.append((rf"^decoder\.upsamples\.{i}\.", f"decoder.up_blocks.{block}.{part}."))
    return tuple(renames)


WAN = FamilyNames(
    names=(
        NativeNames(
            kinds=_TRANSFORMER,
            marker=r"^blocks\.\d+\.self_attn\.q\.weight$",
            renames=(
                (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
                (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
                (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
                (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
                (r"^time_projection\.1\.", "condition_embedder.time_proj."),
                (r"^head\.modulation$", "scale_shift_table"),
                (r"^head\.head\.", "proj_out."),
                (r"\.self_attn\.", ".attn1."),
                (r"\.cross_attn\.", ".attn2."),
                (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
                (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
                (r"\.ffn\.0\.", ".ffn.net.0.proj."),
                (r"\.ffn\.2\.", ".ffn.net.2."),
                (r"\.modulation$", ".scale_shift_table"),
                # The one norm with weights; it stands before the attention to the text in both.
                (r"\.norm3\.", ".norm2."),
            ),
        ),
        NativeNames(
            kinds=_VAE,
            marker=r"^decoder\.middle\.0\.residual\.0\.gamma$",
            numbered=_up_blocks,
            renames=(
                (r"^conv1\.", "quant_conv."),
                (r"^conv2\.", "post_quant_conv."),
                (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
                (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
                (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
                (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
                (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
                (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
                (r"^encoder\.downsamples\.", "encoder.down_blocks."),
                (r"\.residual\.0\.", ".norm1."),
                (r"\.residual\.2\.", ".conv1."),
                (r"\.residual\.3\.", ".norm2."),
                (r"\.residual\.6\.", ".conv2."),
                (r"\.shortcut\.", ".conv_shortcut."),
            ),
        ),
    ),
    contents=(
        Content(
            "a Wan image-to-video transformer",
            frozenset(),
            (r"blocks\.0\.(self_attn\.q|attn1\.to_q)\.weight", r"\w*img_emb\.proj\.1\.weight"),
        ),
        Content(
            "a Wan text-to-video transformer",
            _TRANSFORMER,
            (r"blocks\.0\.self_attn\.q\.weight", r"text_embedding\.0\.weight"),
            without=r"img_emb\.proj\.1\.weight",
        ),
        Content(
            "a Wan text-to-video transformer",
            _TRANSFORMER,
            (r"blocks\.0\.attn1\.to_q\.weight", r"condition_embedder\.time_proj\.weight"),
            without=r"condition_embedder\.image_embedder\.norm1\.weight",
        ),
        Content(
            "Wan 2.2's VAE in its authors' names",
            frozenset(),
            (r"encoder\.downsamples\.0\.downsamples\.0\.residual\.0\.gamma",),
            hint="give the vae/ folder of Wan-AI/Wan2.2-TI2V-5B-Diffusers: this file's names aren't known",
        ),
        Content(
            "the VAE of Wan 2.1 or Qwen-Image",
            _VAE,
            (r"decoder\.middle\.0\.residual\.0\.gamma",),
            without=r"encoder\.downsamples\.0\.downsamples\.0\.residual\.0\.gamma",
        ),
        Content(
            "the VAE of Wan or Qwen-Image",
            _VAE,
            (r"decoder\.mid_block\.resnets\.0\.norm1\.gamma",),
        ),
    ),
)
