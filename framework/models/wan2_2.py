"""Wan 2.2 text-to-video A14B (Wan Team 2025, arXiv:2503.20314): an expert for much noise and one for little."""

from __future__ import annotations

from pathlib import Path

from framework.errors import SourceError
from framework.models.published_config import read_config
from framework.models.wan2_1 import Wan21Family
from framework.schema.family import FamilySpec
from framework.schema.specs.wan2_2 import BOUNDARY_RATIO, WAN2_2


class Wan22Family(Wan21Family):
    """How Wan 2.2 A14B is built, encoded, called, sampled and saved."""

    spec: FamilySpec = WAN2_2

    def __init__(self) -> None:
        super().__init__()
        self._boundary = BOUNDARY_RATIO

    @property
    def boundary(self) -> float:
        """Noise level from which "dit" is asked, and below which "dit_2"."""
        return self._boundary

    def sigma_range(self, component: str) -> tuple[float, float]:
        """From the boundary upwards for "dit", up to the boundary for "dit_2"."""
        return (self.boundary, 1.0) if component == "dit" else (0.0, self.boundary)

    def _check_experts(self, index: Path) -> None:
        """Take the boundary from model_index.json where it lies beside the scheduler, as in a folder of the user's.

        Of a hub checkpoint it isn't fetched; those have the published value.
        """
        if not index.is_file():
            return
        found = read_config(index).get("boundary_ratio")
        if not isinstance(found, float) or not 0 < found < 1:
            raise SourceError(
                f"{self.spec.name} needs a boundary_ratio between 0 and 1, at which its second denoiser takes over",
                where=str(index),
                found=repr(found),
                hint="for a checkpoint with one denoiser write model.family=wan2_1",
            )
        self._boundary = found
