"""Layer names of Qwen-Image and Qwen-Image-Edit: the same in every program."""

from __future__ import annotations

from framework.schema.lora_keys.base import ComponentNames, FamilyNames, Naming, same
from framework.schema.lora_keys.text_encoders import autoencoder, language_model

_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
_BLOCK = (
    *(f"attn.{part}" for part in _ATTENTION),
    *(
        f"{side}_{part}"
        for side in ("img", "txt")
        for part in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
    ),
)
_OUTSIDE = (
    "img_in", "txt_in", "proj_out", "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
)  # fmt: skip


def _family(architecture: str) -> FamilyNames:
    return FamilyNames(
        components={
            "dit": ComponentNames(
                classes=("QwenImageTransformer2DModel",),
                diffusers="transformer",
                kohya=Naming("lora_unet", flat=True),
                comfyui=Naming("diffusion_model"),
                rules=same((*(f"transformer_blocks.#.{part}" for part in _BLOCK), *_OUTSIDE)),
                also=("pipe.dit", "lycoris"),
            ),
            "text_encoder": language_model(
                (
                    "Qwen2_5_VLTextModel",
                    "Qwen2_5_VLModel",
                    "Qwen2_5_VLForConditionalGeneration",
                ),
                "qwen25_7b",
            ),
            "vae": autoencoder("AutoencoderKLQwenImage"),
        },
        architecture=architecture,
        base_version=architecture.lower(),
        network_module="networks.lora_qwen_image",
    )


QWEN_IMAGE = _family("Qwen-Image")
QWEN_IMAGE_EDIT = _family("Qwen-Image-Edit")
