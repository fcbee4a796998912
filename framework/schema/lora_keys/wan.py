"""Layer names of Wan 2.1 and 2.2. ComfyUI knows only the native ones. Each expert of 2.2 has a file of its own."""

from __future__ import annotations

from dataclasses import replace

from framework.schema.lora_keys.base import ComponentNames, FamilyNames, Naming, Rule
from framework.schema.lora_keys.text_encoders import autoencoder, t5

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{native}" for ours, native in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{native}" for ours, native in _ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
_DIT = ComponentNames(
    classes=("WanTransformer3DModel",),
    diffusers="transformer",
    kohya=Naming("lora_unet", native=True, flat=True),
    comfyui=Naming("diffusion_model", native=True),
    lacking="kohya's programs train only blocks of this family",
    rules=(
        *(Rule(f"blocks.#.{ours}", f"blocks.#.{native}") for ours, native in _BLOCK.items()),
        *(Rule(ours, native, kohya=False) for ours, native in _OUTSIDE.items()),
    ),
    also=("pipe.dit", "lycoris"),
)
_REST = {
    "text_encoder": t5(
        ("UMT5EncoderModel",), component="text_encoder", wrapper="umt5xxl", flat=None
    ),
    "vae": autoencoder("AutoencoderKLWan"),
}

WAN2_1 = FamilyNames(
    components={"dit": _DIT, **_REST},
    architecture="wan2.1",
    base_version="wan2.1",
    network_module="networks.lora_wan",
)
WAN2_2 = replace(
    WAN2_1,
    components={
        "dit": _DIT,
        # In its own file it is called as the first one is.
        "dit_2": replace(_DIT, also=("transformer_2", "pipe.dit2")),
        **_REST,
    },
    base_version="wan2.2",
)
