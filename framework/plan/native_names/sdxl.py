"""SDXL's UNet, its second text encoder and the VAE that FLUX.1 and Z-Image share, in the names of their authors.

A whole checkpoint (`sd_xl_base_1.0.safetensors`) holds all of them, and the first text encoder, under prefixes.
Facts: diffusers `convert_ldm_unet_checkpoint`, `convert_ldm_vae_checkpoint`, `convert_open_clip_checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from framework.plan.native_names.form import Content, FamilyNames, NativeNames, Rename, Split

_UNET = frozenset({"UNet2DConditionModel"})
_VAE = frozenset({"AutoencoderKL"})
_CLIP = frozenset({"clip_text_model", "CLIPTextModel", "CLIPTextModelWithProjection"})


def _unet_blocks(keys: Collection[str]) -> tuple[Rename, ...]:
    """Input and output blocks are counted in one row; here they are gathered into blocks of one resolution."""
    text = "\n".join(keys)
    samplers = [int(i) for i in re.findall(r"(?m)^input_blocks\.(\d+)\.0\.op\.weight$", text)]
    inputs = {int(i) for i in re.findall(r"(?m)^input_blocks\.(\d+)\.", text)} - {0}
    outputs = {int(i) for i in re.findall(r"(?m)^output_blocks\.(\d+)\.", text)}
    per_block = min(samplers, default=max(inputs, default=0) + 1)
    renames = []
    for i in sorted(inputs):
        block, j = divmod(i - 1, per_block)
        there, here = rf"^input_blocks\.{i}\.", f"down_blocks.{block}."
        renames += [
            (rf"{there}0\.op\.", f"{here}downsamplers.0.conv."),
            (rf"{there}0\.", f"{here}resnets.{j}."),
            (rf"{there}1\.", f"{here}attentions.{j}."),
        ]
    for i in sorted(outputs):
        block, j = divmod(i, per_block)
        there, here = rf"^output_blocks\.{i}\.", f"up_blocks.{block}."
        renames += [
            (rf"{there}[12]\.conv\.", f"{here}upsamplers.0.conv."),
            (rf"{there}0\.", f"{here}resnets.{j}."),
            (rf"{there}1\.", f"{here}attentions.{j}."),
        ]
    return tuple(renames)


def _vae_blocks(keys: Collection[str]) -> tuple[Rename, ...]:
    """The decoder counts its blocks from the picture inwards; here from the latents outwards."""
    found = (re.match(r"decoder\.up\.(\d+)\.", key) for key in keys)
    blocks = sorted({int(match[1]) for match in found if match})
    return tuple((rf"^decoder\.up\.{i}\.", f"decoder.up_blocks.{blocks[-1] - i}.") for i in blocks)


SDXL = FamilyNames(
    names=(
        NativeNames(
            kinds=_UNET,
            marker=r"^input_blocks\.0\.0\.weight$",
            numbered=_unet_blocks,
            renames=(
                (r"^time_embed\.0\.", "time_embedding.linear_1."),
                (r"^time_embed\.2\.", "time_embedding.linear_2."),
                (r"^label_emb\.0\.0\.", "add_embedding.linear_1."),
                (r"^label_emb\.0\.2\.", "add_embedding.linear_2."),
                (r"^input_blocks\.0\.0\.", "conv_in."),
                (r"^out\.0\.", "conv_norm_out."),
                (r"^out\.2\.", "conv_out."),
                (r"^middle_block\.0\.", "mid_block.resnets.0."),
                (r"^middle_block\.1\.", "mid_block.attentions.0."),
                (r"^middle_block\.2\.", "mid_block.resnets.1."),
                (r"\.in_layers\.0\.", ".norm1."),
                (r"\.in_layers\.2\.", ".conv1."),
                (r"\.emb_layers\.1\.", ".time_emb_proj."),
                (r"\.out_layers\.0\.", ".norm2."),
                (r"\.out_layers\.3\.", ".conv2."),
                (r"\.skip_connection\.", ".conv_shortcut."),
            ),
        ),
        NativeNames(
            kinds=_VAE,
            marker=r"^decoder\.up\.0\.block\.0\.norm1\.weight$",
            numbered=_vae_blocks,
            renames=(
                (r"^encoder\.down\.", "encoder.down_blocks."),
                (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
                (r"\.downsample\.", ".downsamplers.0."),
                (r"\.upsample\.", ".upsamplers.0."),
                (r"\.nin_shortcut\.", ".conv_shortcut."),
                (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
                (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
                (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
                (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
                (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
                (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
            ),
            flattened=r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$",
            dropped=r"^(loss|model_ema)\.",
        ),
        NativeNames(
            kinds=_CLIP,
            marker=r"^transformer\.resblocks\.0\.ln_1\.weight$",
            renames=(
                (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
                (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
                (r"^ln_final\.", "text_model.final_layer_norm."),
                (r"^text_projection$", "text_projection.weight"),
                (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
                (r"\.ln_([12])\.", r".layer_norm\1."),
                (r"\.mlp\.c_fc\.", ".mlp.fc1."),
                (r"\.mlp\.c_proj\.", ".mlp.fc2."),
                (r"\.attn\.", ".self_attn."),
            ),
            splits=(
                Split(
                    r"\.in_proj_(weight|bias)$",
                    (r".q_proj.\1", r".k_proj.\1", r".v_proj.\1"),
                    (1, 1, 1),
                ),
            ),
            transposed=r"^text_projection\.weight$",
            dropped=r"^(logit_scale|attn_mask)$",
        ),
    ),
    contents=(
        Content(
            "SDXL's UNet",
            _UNET,
            (r"input_blocks\.0\.0\.weight", r"label_emb\.0\.0\.weight"),
        ),
        Content(
            "SDXL's UNet",
            _UNET,
            (
                r"down_blocks\.0\.resnets\.0\.time_emb_proj\.weight",
                r"add_embedding\.linear_1\.weight",
            ),
        ),
        Content(
            "a UNet of Stable Diffusion 1 or 2",
            frozenset(),
            (r"input_blocks\.0\.0\.weight",),
            without=r"label_emb\.0\.0\.weight",
        ),
        Content(
            "the VAE of SDXL, FLUX.1 or Z-Image",
            _VAE,
            (r"decoder\.(up\.0\.block|up_blocks\.0\.resnets)\.0\.norm1\.weight",),
        ),
        Content(
            "a CLIP text encoder",
            _CLIP,
            (r"transformer\.resblocks\.0\.attn\.in_proj_weight",),
            without=r"visual\.conv1\.weight",
        ),
    ),
    prefixes={"AutoencoderKL": ("first_stage_model.", "vae.")},
)
