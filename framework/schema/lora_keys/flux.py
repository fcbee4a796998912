"""Layer names of FLUX.1: q, k and v (and, in single blocks, the MLP's first layer) are one layer natively."""

from __future__ import annotations

from framework.schema.lora_keys.base import ComponentNames, FamilyNames, Naming, Rule, sliced
from framework.schema.lora_keys.text_encoders import autoencoder, clip, t5

_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
# diffusers loses these when it reads kohya's form.
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{ours}_embedder.linear_{number}": f"{native}_in.{side}_layer"
        for ours, native in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for number, side in ((1, "in"), (2, "out"))
    },
}
_RULES = (
    *sliced(
        (f"transformer_blocks.#.attn.to_{part}" for part in "qkv"),
        "double_blocks.#.img_attn.qkv",
        (1, 1, 1),
    ),
    *sliced(
        (f"transformer_blocks.#.attn.add_{part}_proj" for part in "qkv"),
        "double_blocks.#.txt_attn.qkv",
        (1, 1, 1),
    ),
    *sliced(
        (
            *(f"single_transformer_blocks.#.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.#.proj_mlp",
        ),
        "single_blocks.#.linear1",
        (1, 1, 1, 4),
    ),
    *(Rule(f"transformer_blocks.#.{o}", f"double_blocks.#.{n}") for o, n in _DOUBLE.items()),
    *(Rule(f"single_transformer_blocks.#.{o}", f"single_blocks.#.{n}") for o, n in _SINGLE.items()),
    *(Rule(ours, native, kohya=False) for ours, native in _OUTSIDE.items()),
    # diffusers keeps scale before shift, the first code shift before scale.
    Rule("norm_out.linear", "final_layer.adaLN_modulation.1", swapped=True, kohya=False),
)

FLUX = FamilyNames(
    components={
        "dit": ComponentNames(
            classes=("FluxTransformer2DModel",),
            diffusers="transformer",
            kohya=Naming("lora_unet", native=True, flat=True),
            # ComfyUI slices by itself what comes under diffusers' names.
            comfyui=Naming("transformer"),
            lacking="diffusers loses this layer when it reads kohya's form",
            rules=_RULES,
            also=("diffusion_model", "pipe.dit", "lora_transformer", "lycoris"),
        ),
        "text_encoder": clip(second=False, comfyui=Naming("text_encoder", native=True)),
        "text_encoder_2": t5(
            ("T5EncoderModel",), component="text_encoder_2", wrapper="t5xxl", flat="lora_te3"
        ),
        "vae": autoencoder("AutoencoderKL"),
    },
    architecture="flux-1-dev",
    base_version="flux1",
    network_module="networks.lora_flux",
)
