"""All model families that can be named in `model.family`; see `framework/schema/family.py`."""

from __future__ import annotations

from collections.abc import Mapping

from framework.schema.family import DENOISERS, ComponentSpec, FamilySpec
from framework.schema.specs.flux import FLUX
from framework.schema.specs.qwen_image import QWEN_IMAGE
from framework.schema.specs.qwen_image_edit import QWEN_IMAGE_EDIT
from framework.schema.specs.sdxl import SDXL
from framework.schema.specs.wan2_1 import WAN2_1
from framework.schema.specs.wan2_2 import WAN2_2
from framework.schema.specs.z_image import Z_IMAGE

__all__ = [
    "DENOISERS",
    "FAMILIES",
    "FLUX",
    "QWEN_IMAGE",
    "QWEN_IMAGE_EDIT",
    "SDXL",
    "WAN2_1",
    "WAN2_2",
    "Z_IMAGE",
    "ComponentSpec",
    "FamilySpec",
]

FAMILIES: Mapping[str, FamilySpec] = {
    spec.name: spec for spec in (QWEN_IMAGE, QWEN_IMAGE_EDIT, FLUX, Z_IMAGE, WAN2_1, WAN2_2, SDXL)
}
