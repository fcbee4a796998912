"""What a plan says of a preset: a LoRA that is active and frozen under the one that trains."""

from __future__ import annotations

from math import prod

from pydantic import BaseModel, ConfigDict


class PresetLayer(BaseModel):
    """One layer of a preset.   rank: of its adapter.   shape: of the base weight, output dimension first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rank: int
    shape: tuple[int, ...]


class PresetPlan(BaseModel):
    """A frozen LoRA from a file, under the one that trains; held in float32, never saved."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    use_dora: bool
    layers: tuple[PresetLayer, ...]

    @property
    def numel(self) -> int:
        """Number of its parameters."""
        count = 0
        for layer in self.layers:
            outputs, *inputs = layer.shape
            count += layer.rank * (prod(inputs) + outputs) + (outputs if self.use_dora else 0)
        return count
