"""Qwen-Image-Edit (Wu et al. 2025, arXiv:2508.02324) and its later editions 2509 and 2511, as published."""

from __future__ import annotations

from dataclasses import replace

from framework.schema.family import ComponentSpec, FamilySpec
from framework.schema.specs.qwen_image import QWEN_IMAGE

_TEXT_ENCODER = QWEN_IMAGE.components["text_encoder"]

QWEN_IMAGE_EDIT = FamilySpec(
    name="qwen_image_edit",
    size_divisor_px=QWEN_IMAGE.size_divisor_px,
    # The first edition takes one control picture, the later ones up to three.
    num_controls=3,
    extras={
        "tokenizer": "tokenizer",
        "scheduler": "scheduler",
        "processor": "processor",
    },
    components={
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            kind=_TEXT_ENCODER.kind,
            # As Qwen-Image's, with the vision tower, which sees the control pictures: the model has both, side by side.
            renames=(
                (r"^model\.visual\.", "visual."),
                (r"^model\.language_model\.", "language_model."),
                (r"^language_model\.model\.", "language_model."),
                (r"^model\.", "language_model."),
            ),
            ignored_keys=("lm_head.*",),
            embedding_globs=_TEXT_ENCODER.embedding_globs,
            keep_high_precision=("visual.patch_embed*", "visual.merger*"),
            lora_targets=_TEXT_ENCODER.lora_targets,
        ),
        "vae": QWEN_IMAGE.components["vae"],
        "dit": replace(
            QWEN_IMAGE.components["dit"],
            # Marks single files of 2511, whose config says the same (`zero_cond_t`).
            ignored_keys=("__index_timestep_zero__",),
        ),
    },
)
