"""Z-Image's transformer in the names of Lumina 2, which ComfyUI uses.

Facts: diffusers `convert_z_image_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from framework.plan.native_names.form import Content, FamilyNames, NativeNames, Split

_KINDS = frozenset({"ZImageTransformer2DModel"})

Z_IMAGE = FamilyNames(
    names=(
        NativeNames(
            kinds=_KINDS,
            marker=r"^layers\.\d+\.attention\.qkv\.weight$",
            renames=(
                # 2-1: patches of 2 x 2 px in one frame, the only size that there is.
                (r"^x_embedder\.", "all_x_embedder.2-1."),
                (r"^final_layer\.", "all_final_layer.2-1."),
                (r"\.attention\.out\.", ".attention.to_out.0."),
                (r"\.attention\.([qk])_norm\.", r".attention.norm_\1."),
            ),
            splits=(
                Split(
                    r"\.attention\.qkv\.",
                    (".attention.to_q.", ".attention.to_k.", ".attention.to_v."),
                    (1, 1, 1),
                ),
            ),
            dropped=r"^norm_final\.weight$",
        ),
    ),
    contents=(
        Content(
            "Z-Image's transformer",
            _KINDS,
            (r"noise_refiner\.0\.attention\.(qkv|to_q)\.weight", r"cap_embedder\.1\.weight"),
        ),
    ),
)
