"""FLUX.1's transformer in the names of its authors (black-forest-labs/flux), which ComfyUI uses, too.

Facts: diffusers `convert_flux_transformer_checkpoint_to_diffusers`; flux `model.py`, `modules/layers.py`.
"""

from __future__ import annotations

from framework.plan.native_names.form import Content, FamilyNames, NativeNames, Split

_KINDS = frozenset({"FluxTransformer2DModel"})

FLUX = FamilyNames(
    names=(
        NativeNames(
            kinds=_KINDS,
            marker=r"^double_blocks\.\d+\.img_attn\.qkv\.weight$",
            renames=(
                (r"^double_blocks\.", "transformer_blocks."),
                (r"^single_blocks\.", "single_transformer_blocks."),
                (r"\.img_attn\.norm\.([qk])\w*_norm\.(scale|weight)$", r".attn.norm_\1.weight"),
                (
                    r"\.txt_attn\.norm\.([qk])\w*_norm\.(scale|weight)$",
                    r".attn.norm_added_\1.weight",
                ),
                (r"\.norm\.([qk])\w*_norm\.(scale|weight)$", r".attn.norm_\1.weight"),
                (r"\.img_attn\.proj\.", ".attn.to_out.0."),
                (r"\.txt_attn\.proj\.", ".attn.to_add_out."),
                (r"\.img_mlp\.0\.", ".ff.net.0.proj."),
                (r"\.img_mlp\.2\.", ".ff.net.2."),
                (r"\.txt_mlp\.0\.", ".ff_context.net.0.proj."),
                (r"\.txt_mlp\.2\.", ".ff_context.net.2."),
                (r"\.img_mod\.lin\.", ".norm1.linear."),
                (r"\.txt_mod\.lin\.", ".norm1_context.linear."),
                (r"\.modulation\.lin\.", ".norm.linear."),
                (r"\.linear2\.", ".proj_out."),
                (r"^img_in\.", "x_embedder."),
                (r"^txt_in\.", "context_embedder."),
                (r"^time_in\.", "time_text_embed.timestep_embedder."),
                (r"^vector_in\.", "time_text_embed.text_embedder."),
                (r"^guidance_in\.", "time_text_embed.guidance_embedder."),
                (r"_embedder\.in_layer\.", "_embedder.linear_1."),
                (r"_embedder\.out_layer\.", "_embedder.linear_2."),
                (r"^final_layer\.linear\.", "proj_out."),
                (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
            ),
            splits=(
                Split(
                    r"\.img_attn\.qkv\.",
                    (".attn.to_q.", ".attn.to_k.", ".attn.to_v."),
                    (1, 1, 1),
                ),
                Split(
                    r"\.txt_attn\.qkv\.",
                    (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj."),
                    (1, 1, 1),
                ),
                # The MLP is four times as wide as the model, in every FLUX.1 model.
                Split(
                    r"\.linear1\.",
                    (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".proj_mlp."),
                    (1, 1, 1, 4),
                ),
            ),
            swapped=r"^norm_out\.linear\.(weight|bias)$",  # (shift, scale) there, (scale, shift) here
        ),
    ),
    contents=(
        Content(
            "FLUX.1's transformer",
            _KINDS,
            (r"double_blocks\.0\.img_attn\.qkv\.weight", r"vector_in\.in_layer\.weight"),
        ),
        Content(
            "FLUX.1's transformer",
            _KINDS,
            (
                r"single_transformer_blocks\.0\.proj_mlp\.weight",
                r"time_text_embed\.text_embedder\.linear_1\.weight",
            ),
        ),
    ),
)
