"""The base class of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values can't be changed once checked."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )


UNIT = "x-unit"
"""The JSON Schema keyword under which a number's unit is told."""


def unit(name: str, *, examples: list[JsonValue]) -> dict[str, JsonValue]:
    """Say what a number counts or measures, e.g. "pixels", and show some; for `Field(json_schema_extra=...)`."""
    return {UNIT: name, "examples": examples}
