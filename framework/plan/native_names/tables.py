"""All names that are known, gathered from the files of the families."""

from __future__ import annotations

from framework.plan.native_names.flux import FLUX
from framework.plan.native_names.form import (
    DIFFUSION_PREFIXES,
    Content,
    FamilyNames,
    NativeNames,
)
from framework.plan.native_names.others import OTHERS
from framework.plan.native_names.sdxl import SDXL
from framework.plan.native_names.text_encoders import CLIP_KINDS, CLIP_PREFIXES, TEXT_ENCODERS
from framework.plan.native_names.wan import WAN
from framework.plan.native_names.z_image import Z_IMAGE
from framework.schema.family import ComponentSpec

_DENOISER_FOLDERS = ("transformer", "transformer_2", "unet")
_ALL: tuple[FamilyNames, ...] = (OTHERS, FLUX, Z_IMAGE, WAN, SDXL, TEXT_ENCODERS)

NAMES: tuple[NativeNames, ...] = tuple(names for family in _ALL for names in family.names)
CONTENTS: tuple[Content, ...] = tuple(content for family in _ALL for content in family.contents)
_PREFIXES = {kind: found for family in _ALL for kind, found in family.prefixes.items()}


def prefixes_of(spec: ComponentSpec) -> tuple[str, ...]:
    """What may stand before a component's keys in a file that holds more than it; of several, the first counts."""
    kind, folder = spec.kind[1], spec.subfolder
    if folder in _DENOISER_FOLDERS:
        return DIFFUSION_PREFIXES
    if kind in CLIP_KINDS:
        return CLIP_PREFIXES.get(folder, ())
    return _PREFIXES.get(kind, ("vae.", "first_stage_model.") if folder == "vae" else ())
