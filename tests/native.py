"""Gives the tensors of a component the names, and the joints, that ComfyUI's single files have; for tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.published import weight_in_fp8

State = dict[str, Tensor]


def flux(state: Mapping[str, Tensor]) -> State:
    """FLUX.1's transformer as its authors have it."""
    found: State = {}
    left = dict(state)
    for key in state:
        for stream, names in (
            ("img", ("to_q", "to_k", "to_v")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            match = re.fullmatch(rf"transformer_blocks\.(\d+)\.attn\.{names[0]}\.(\w+)", key)
            if match:
                i, leaf = match.groups()
                parts = [left.pop(f"transformer_blocks.{i}.attn.{n}.{leaf}") for n in names]
                found[f"double_blocks.{i}.{stream}_attn.qkv.{leaf}"] = torch.cat(parts)
        match = re.fullmatch(r"single_transformer_blocks\.(\d+)\.proj_mlp\.(\w+)", key)
        if match:
            block, leaf = f"single_transformer_blocks.{match[1]}", match[2]
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            parts = [left.pop(f"{block}.{n}.{leaf}") for n in names]
            found[f"single_blocks.{match[1]}.linear1.{leaf}"] = torch.cat(parts)
    for leaf in ("weight", "bias"):
        scale, shift = left.pop(f"norm_out.linear.{leaf}").chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    table = {
        r"^single_transformer_blocks\.(\d+)\.norm\.linear": r"single_blocks.\1.modulation.lin",
        r"^single_transformer_blocks\.(\d+)\.proj_out": r"single_blocks.\1.linear2",
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
        r"^transformer_blocks\.": "double_blocks.",
        r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale",
        r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
        r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
        r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
        r"attn\.to_out\.0": "img_attn.proj",
        r"attn\.to_add_out": "txt_attn.proj",
        r"norm1\.linear": "img_mod.lin",
        r"norm1_context\.linear": "txt_mod.lin",
        r"ff\.net\.0\.proj": "img_mlp.0",
        r"ff\.net\.2": "img_mlp.2",
        r"ff_context\.net\.0\.proj": "txt_mlp.0",
        r"ff_context\.net\.2": "txt_mlp.2",
        r"^x_embedder": "img_in",
        r"^context_embedder": "txt_in",
        r"^time_text_embed\.timestep_embedder": "time_in",
        r"^time_text_embed\.text_embedder": "vector_in",
        r"^time_text_embed\.guidance_embedder": "guidance_in",
        r"_in\.linear_1": "_in.in_layer",
        r"_in\.linear_2": "_in.out_layer",
        r"^proj_out": "final_layer.linear",
    }
    return found | renamed(left, table)


def z_image(state: Mapping[str, Tensor]) -> State:
    """Z-Image's transformer as Lumina 2 has it, with the norm that nothing reads."""
    found: State = {"norm_final.weight": torch.ones(4)}
    left = dict(state)
    for key in state:
        if key.endswith(".attention.to_q.weight"):
            block = key.removesuffix(".to_q.weight")
            parts = [left.pop(f"{block}.to_{n}.weight") for n in "qkv"]
            found[f"{block}.qkv.weight"] = torch.cat(parts)
    table = {
        r"all_x_embedder\.2-1": "x_embedder",
        r"all_final_layer\.2-1": "final_layer",
        r"\.to_out\.0": ".out",
        r"\.norm_([qk])": r".\1_norm",
    }
    return found | renamed(left, table)


def wan(state: Mapping[str, Tensor]) -> State:
    """Wan's transformer as its authors have it."""
    table = {
        r"^scale_shift_table$": "head.modulation",
        r"scale_shift_table": "modulation",
        r"^proj_out": "head.head",
        r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
        r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
        r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
        r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
        r"^condition_embedder\.time_proj": "time_projection.1",
        r"\.attn1\.": ".self_attn.",
        r"\.attn2\.": ".cross_attn.",
        r"\.to_([qkv])\.": r".\1.",
        r"\.to_out\.0\.": ".o.",
        r"\.ffn\.net\.0\.proj": ".ffn.0",
        r"\.ffn\.net\.2": ".ffn.2",
        r"\.norm2\.": ".norm3.",
    }
    return renamed(state, table)


def wan_vae(state: Mapping[str, Tensor], *, resnets: int = 3) -> State:
    """Wan 2.1's or Qwen-Image's VAE.   resnets: of a block of the decoder."""
    found = {}
    for key, value in state.items():
        match = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", key)
        name = key
        if match:
            j = resnets if match[2] == "upsamplers" else int(match[3])
            name = f"decoder.upsamples.{int(match[1]) * (resnets + 1) + j}." + key[match.end() :]
        found[name] = value
    table = {
        r"encoder\.down_blocks\.": "encoder.downsamples.",
        r"mid_block\.resnets\.0": "middle.0",
        r"mid_block\.resnets\.1": "middle.2",
        r"mid_block\.attentions\.0": "middle.1",
        r"coder\.norm_out\.": "coder.head.0.",
        r"coder\.conv_out\.": "coder.head.2.",
        r"coder\.conv_in\.": "coder.conv1.",
        r"^quant_conv": "conv1",
        r"^post_quant_conv": "conv2",
        r"\.conv_shortcut\.": ".shortcut.",
        r"(upsamples\.\d+|downsamples\.\d+|middle\.\d)\.norm1\.": r"\1.residual.0.",
        r"(upsamples\.\d+|downsamples\.\d+|middle\.\d)\.conv1\.": r"\1.residual.2.",
        r"(upsamples\.\d+|downsamples\.\d+|middle\.\d)\.norm2\.": r"\1.residual.3.",
        r"(upsamples\.\d+|downsamples\.\d+|middle\.\d)\.conv2\.": r"\1.residual.6.",
    }
    return renamed(found, table)


def unet(state: Mapping[str, Tensor], *, layers: int) -> State:
    """SDXL's UNet as its authors have it.   layers: `layers_per_block`."""
    found = {}
    with_attention = {key.split(".attentions.")[0] for key in state if ".attentions." in key}
    for key, value in state.items():
        name = key
        if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", key):
            i = int(match[1]) * (layers + 1) + int(match[3]) + 1
            name = f"input_blocks.{i}.{int(match[2] == 'attentions')}." + key[match.end() :]
        elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", key):
            name = f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op." + key[match.end() :]
        elif match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", key):
            i = int(match[1]) * (layers + 1) + int(match[3])
            name = f"output_blocks.{i}.{int(match[2] == 'attentions')}." + key[match.end() :]
        elif match := re.match(r"(up_blocks\.(\d+))\.upsamplers\.0\.conv\.", key):
            i = int(match[2]) * (layers + 1) + layers
            name = (
                f"output_blocks.{i}.{1 + (match[1] in with_attention)}.conv." + key[match.end() :]
            )
        found[name] = value
    table = {
        r"^mid_block\.resnets\.0\.": "middle_block.0.",
        r"^mid_block\.attentions\.0\.": "middle_block.1.",
        r"^mid_block\.resnets\.1\.": "middle_block.2.",
        r"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.norm1": r"\1.in_layers.0",
        r"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.conv1": r"\1.in_layers.2",
        r"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.norm2": r"\1.out_layers.0",
        r"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.conv2": r"\1.out_layers.3",
        r"\.time_emb_proj": ".emb_layers.1",
        r"\.conv_shortcut": ".skip_connection",
        r"^conv_in": "input_blocks.0.0",
        r"^conv_norm_out": "out.0",
        r"^conv_out": "out.2",
        r"^time_embedding\.linear_1": "time_embed.0",
        r"^time_embedding\.linear_2": "time_embed.2",
        r"^add_embedding\.linear_1": "label_emb.0.0",
        r"^add_embedding\.linear_2": "label_emb.0.2",
    }
    return renamed(found, table)


def ldm_vae(state: Mapping[str, Tensor], *, blocks: int = 4) -> State:
    """AutoencoderKL as latent diffusion's authors have it: attention by convolutions.   blocks: of the decoder."""
    found = {}
    for key, value in state.items():
        name = re.sub(
            r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}", key
        )
        is_projection = ".attentions.0.to_" in key and value.ndim == 2
        found[name] = value[:, :, None, None] if is_projection else value
    table = {
        r"encoder\.down_blocks\.": "encoder.down.",
        r"\.resnets\.(?=\d+\.)(?<!mid_block\.resnets\.)": ".block.",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
        r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
        r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
        r"downsamplers\.0": "downsample",
        r"upsamplers\.0": "upsample",
        r"conv_shortcut": "nin_shortcut",
        r"conv_norm_out": "norm_out",
    }
    return renamed(found, table)


def open_clip(state: Mapping[str, Tensor]) -> State:
    """CLIPTextModelWithProjection as OpenCLIP has it, with the number that nothing reads."""
    found: State = {"logit_scale": torch.ones(())}
    left = dict(state)
    for key in state:
        match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key)
        if match:
            i, leaf = match.groups()
            names = [
                f"text_model.encoder.layers.{i}.self_attn.{n}_proj.{leaf}" for n in ("q", "k", "v")
            ]
            parts = [left.pop(name) for name in names]
            found[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat(parts)
    found["text_projection"] = left.pop("text_projection.weight").t().contiguous()
    table = {
        r"text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
        r"text_model\.embeddings\.token_embedding": "token_embedding",
        r"text_model\.final_layer_norm": "ln_final",
        r"text_model\.encoder\.layers": "transformer.resblocks",
        r"\.layer_norm([12])": r".ln_\1",
        r"\.mlp\.fc1": ".mlp.c_fc",
        r"\.mlp\.fc2": ".mlp.c_proj",
        r"\.self_attn\.": ".attn.",
    }
    return found | renamed(left, table)


def renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> State:
    """Replace each expression in every key, one after the other."""
    found = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in table.items():
            name = re.sub(pattern, replacement, name)
        found[name] = value
    assert len(found) == len(state)
    return found


def write(state: Mapping[str, Tensor], file: Path, *, prefix: str = "", fp8: str = "") -> Path:
    """Write a single file.   prefix: before each key.   fp8: layout of `tests.published` for all 2-D weights."""
    written: State = {}
    for key, value in state.items():
        if fp8 and value.ndim == 2 and key.endswith(".weight"):
            written |= weight_in_fp8(key.removesuffix(".weight"), value, fp8)
        else:
            written[key] = value
    if fp8 == "comfyui":
        written["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: value.contiguous() for key, value in written.items()}, file)
    return file
