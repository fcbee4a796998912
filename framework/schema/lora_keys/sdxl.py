"""Layer names of SDXL. Natively the UNet's blocks are counted through, which depends on how many layers each has."""

from __future__ import annotations

from collections.abc import Iterator

from framework.schema.lora_keys.base import ComponentNames, FamilyNames, Naming, Rule
from framework.schema.lora_keys.text_encoders import autoencoder, clip

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = (
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.#.attn{number}.{part}"
        for number in (1, 2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2",
)
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_NUM_BLOCKS = 3


def _places(layers_per_block: int) -> Iterator[tuple[str, str, str, str]]:
    """Ours and native: a resnet and the attention beside it, for every place in the UNet."""
    for block in range(_NUM_BLOCKS):
        for layer in range(layers_per_block):
            ours, number = f"down_blocks.{block}", (layers_per_block + 1) * block + layer + 1
            native = f"input_blocks.{number}"
            yield (
                f"{ours}.resnets.{layer}",
                f"{native}.0",
                f"{ours}.attentions.{layer}",
                f"{native}.1",
            )
        for layer in range(layers_per_block + 1):
            ours, number = f"up_blocks.{block}", (layers_per_block + 1) * block + layer
            native = f"output_blocks.{number}"
            yield (
                f"{ours}.resnets.{layer}",
                f"{native}.0",
                f"{ours}.attentions.{layer}",
                f"{native}.1",
            )
    for layer in (0, 1):
        yield (
            f"mid_block.resnets.{layer}",
            f"middle_block.{2 * layer}",
            "mid_block.attentions.0",
            "middle_block.1",
        )


def _unet_rules(layers_per_block: int) -> tuple[Rule, ...]:
    rules: dict[str, Rule] = {}
    for resnet, native_resnet, attention, native_attention in _places(layers_per_block):
        for ours, native in _RESNET.items():
            rules[f"{resnet}.{ours}"] = Rule(f"{resnet}.{ours}", f"{native_resnet}.{native}")
        for part in _ATTENTION:
            rules[f"{attention}.{part}"] = Rule(f"{attention}.{part}", f"{native_attention}.{part}")
    for block in range(_NUM_BLOCKS - 1):
        down = (layers_per_block + 1) * (block + 1)
        up = (layers_per_block + 1) * block + layers_per_block
        for ours, native in (
            (f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{down}.0.op"),
            (f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{up}.2.conv"),
        ):
            rules[ours] = Rule(ours, native)
    return (*rules.values(), *(Rule(ours, native) for ours, native in _OUTSIDE.items()))


def sdxl_names(layers_per_block: int = 2) -> FamilyNames:
    """The family's names.   layers_per_block: as in the UNet's config; 2 in SDXL itself."""
    return FamilyNames(
        components={
            "dit": ComponentNames(
                classes=("UNet2DConditionModel",),
                diffusers="unet",
                kohya=Naming("lora_unet", native=True, flat=True),
                # ComfyUI takes the names of today's diffusers for none of the attention layers.
                comfyui=Naming("lora_unet", native=True, flat=True),
                rules=_unet_rules(layers_per_block),
                also=("diffusion_model", "pipe.unet", "lycoris"),
            ),
            "text_encoder": clip(second=False),
            "text_encoder_2": clip(second=True),
            "vae": autoencoder("AutoencoderKL"),
        },
        architecture="stable-diffusion-xl-v1-base",
        base_version="sdxl_base_v1-0",
        network_module="networks.lora",
        one_alpha=True,
    )
