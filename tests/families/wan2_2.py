"""Builds a tiny Wan 2.2 A14B checkpoint in the published layout, with random weights, for tests."""

from __future__ import annotations

from pathlib import Path

from tests.families.wan2_1 import save_index, save_parts

BOUNDARY_RATIO = 0.875


def build_checkpoint(
    folder: Path, *, seed: int = 0, boundary_ratio: float = BOUNDARY_RATIO
) -> Path:
    """Write a whole checkpoint of 0.3 MB: Wan 2.1's with a second transformer."""
    save_parts(folder, ("transformer", "transformer_2"), seed=seed)
    second = ["diffusers", "WanTransformer3DModel"]
    save_index(folder, {"boundary_ratio": boundary_ratio, "transformer_2": second})
    return folder
