"""Layer names of Z-Image: q, k and v are one layer natively, but every program takes them one by one as well."""

from __future__ import annotations

from framework.schema.lora_keys.base import (
    ComponentNames,
    FamilyNames,
    Naming,
    Rule,
    same,
    sliced,
)
from framework.schema.lora_keys.text_encoders import autoencoder, language_model

_STACKS = ("layers.#", "noise_refiner.#", "context_refiner.#")


def _block(stack: str) -> tuple[Rule, ...]:
    return (
        *sliced(
            (f"{stack}.attention.to_{part}" for part in "qkv"),
            f"{stack}.attention.qkv",
            (1, 1, 1),
        ),
        Rule(f"{stack}.attention.to_out.0", f"{stack}.attention.out"),
        *same(f"{stack}.feed_forward.w{number}" for number in (1, 2, 3)),
        *same((f"{stack}.adaLN_modulation.0",)),
    )


Z_IMAGE = FamilyNames(
    components={
        "dit": ComponentNames(
            classes=("ZImageTransformer2DModel",),
            diffusers="transformer",
            kohya=Naming("lora_unet", flat=True),
            comfyui=Naming("diffusion_model"),
            lacking="kohya's programs train only blocks and embedders of this family",
            rules=(
                *(rule for stack in _STACKS for rule in _block(stack)),
                *same(("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")),
                Rule("all_x_embedder.2-1", "x_embedder", kohya=False),
                Rule("all_final_layer.2-1.linear", "final_layer.linear", kohya=False),
                Rule(
                    "all_final_layer.2-1.adaLN_modulation.1",
                    "final_layer.adaLN_modulation.1",
                    kohya=False,
                ),
            ),
            also=("pipe.dit", "lycoris"),
        ),
        "text_encoder": language_model(("Qwen3Model", "Qwen3ForCausalLM"), "qwen3_4b"),
        "vae": autoencoder("AutoencoderKL"),
    },
    architecture="Z-Image",
    base_version="zimage",
    network_module="networks.lora_zimage",
)
