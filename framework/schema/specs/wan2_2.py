"""Wan 2.2 text-to-video A14B (Wan Team 2025, arXiv:2503.20314): Wan 2.1 with two experts, as published for diffusers."""

from __future__ import annotations

from framework.schema.family import FamilySpec
from framework.schema.specs.wan2_1 import TEXT_ENCODER, VAE, transformer

BOUNDARY_RATIO = 0.875
"""Noise level from which the first expert is asked, as in the published model_index.json."""

WAN2_2 = FamilySpec(
    name="wan2_2",
    size_divisor_px=16,
    media="video",
    frame_divisor=4,
    components={
        "text_encoder": TEXT_ENCODER,
        "vae": VAE,
        # The high-noise expert, and the low-noise expert.
        "dit": transformer("transformer"),
        "dit_2": transformer("transformer_2"),
    },
)
