"""The section `export`: in which forms a trained LoRA is written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from framework.schema.base import Section


class ExportConfig(Section):
    """Forms in which a run writes its LoRA when it ends."""

    formats: tuple[Literal["peft", "diffusers", "kohya", "comfyui"], ...] = Field(
        ("diffusers",),
        min_length=1,
        description="Programs that shall open the LoRA: one file, or for peft a folder, is written for each. `octavo export` writes others later.",
        examples=[["diffusers", "comfyui"], ["kohya"]],
    )
