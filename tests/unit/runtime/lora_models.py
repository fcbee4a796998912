"""Tiny modules of every family, from their configs alone, and one forward pass of each, for tests of LoRA files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def build_denoiser(family: str, *, seed: int = 0) -> nn.Module:
    """A transformer or UNet of the family in float32 with weights that aren't at their start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = _BUILD[family]()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return module.eval().requires_grad_(False)


def run_denoiser(family: str, module: Any) -> Tensor:
    """What it predicts for a fixed input."""
    generator = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    half = torch.tensor([0.5])
    with torch.no_grad():
        if family.startswith("qwen"):
            inputs: dict[str, Any] = {
                "hidden_states": noise(1, 4, 64),
                "encoder_hidden_states": noise(1, 3, 16),
                "timestep": half,
                "img_shapes": [[(1, 2, 2)]],
            }
        elif family == "flux":
            inputs = {
                "hidden_states": noise(1, 4, 64),
                "encoder_hidden_states": noise(1, 3, 24),
                "pooled_projections": noise(1, 20),
                "timestep": half,
                "guidance": half,
                "img_ids": noise(4, 3),
                "txt_ids": torch.zeros(3, 3),
            }
        elif family == "z_image":
            return module([noise(16, 1, 4, 4)], half, [noise(5, 16)], return_dict=False)[0][0]
        elif family.startswith("wan"):
            inputs = {
                "hidden_states": noise(1, 16, 1, 4, 4),
                "timestep": 1000 * half,
                "encoder_hidden_states": noise(1, 3, 16),
            }
        else:
            conditions = {"text_embeds": noise(1, 12), "time_ids": torch.ones(1, 6)}
            inputs = {
                "sample": noise(1, 4, 8, 8),
                "timestep": 1000 * half,
                "encoder_hidden_states": noise(1, 3, 20),
                "added_cond_kwargs": conditions,
            }
        output: Tensor = module(**inputs, return_dict=False)[0]
        return output


def _qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )


def _z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        dim=32,
        n_heads=2,
        n_kv_heads=2,
        n_layers=2,
        n_refiner_layers=1,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
    )


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1, 2),
        projection_class_embeddings_input_dim=36,
        cross_attention_dim=20,
        norm_num_groups=4,
    )


_BUILD = {
    "qwen_image": _qwen_image,
    "qwen_image_edit": _qwen_image,
    "flux": _flux,
    "z_image": _z_image,
    "wan2_1": _wan,
    "wan2_2": _wan,
    "sdxl": _sdxl,
}
