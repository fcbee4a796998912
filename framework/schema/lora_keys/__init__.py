"""What every LoRA format calls the layers of every family, as data, and which layer a key of a file means.

Nothing here reads a file or needs torch. `framework.runtime.lora_files` reads and writes with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from framework.schema.lora_keys.base import (
    FORMAT_NAMES,
    ComponentNames,
    FamilyNames,
    FormatName,
    Naming,
    Rule,
    native_part,
)
from framework.schema.lora_keys.flux import FLUX
from framework.schema.lora_keys.placing import KEY_WORDS, Place, place_keys, split_key
from framework.schema.lora_keys.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT
from framework.schema.lora_keys.sdxl import sdxl_names
from framework.schema.lora_keys.wan import WAN2_1, WAN2_2
from framework.schema.lora_keys.z_image import Z_IMAGE

FAMILY_NAMES: Mapping[str, FamilyNames] = {
    "qwen_image": QWEN_IMAGE,
    "qwen_image_edit": QWEN_IMAGE_EDIT,
    "flux": FLUX,
    "z_image": Z_IMAGE,
    "wan2_1": WAN2_1,
    "wan2_2": WAN2_2,
    "sdxl": sdxl_names(),
}


def family_names(family: str, *, layers_per_block: int | None = None) -> FamilyNames:
    """A family's names.   layers_per_block: of a UNet, where its config says so.   KeyError for an unknown family."""
    if family == "sdxl" and layers_per_block is not None:
        return sdxl_names(layers_per_block)
    return FAMILY_NAMES[family]


def families_of(class_name: str, component: str) -> tuple[str, ...]:
    """Families in which a component's module is of this class; all that have the component where none says so."""
    having = {
        name: family.components[component]
        for name, family in FAMILY_NAMES.items()
        if component in family.components
    }
    exact = tuple(name for name, names in having.items() if class_name in names.classes)
    return exact or tuple(having)


def why_not(
    names: FamilyNames,
    component: str,
    layers: Mapping[str, bool] | tuple[str, ...],
    form: FormatName,
) -> str | None:
    """Why a format can't carry an adapter on these layers, in words; None where it can.

    layers: module names; as a mapping, the value says whether the layer's adapter has DoRA's magnitude.
    """
    if form in ("peft", "diffusers"):
        return None
    if isinstance(layers, Mapping) and any(layers.values()):
        if form == "kohya":
            return "kohya's form has no DoRA: programs that read it would drop the magnitudes"
        return "ComfyUI's versions compute DoRA differently, and none as it was trained"
    parts = names.components[component]
    naming = parts.kohya if form == "kohya" else parts.comfyui
    if naming is None:
        return parts.lacking
    for layer in layers:
        found = native_part(layer, parts.rules)
        if found is None:
            return f"{form}'s form has no name for {component}.{layer}"
        if naming.flat and not found.rule.kohya:
            return f"{component}.{layer}: {parts.lacking}"
    return None


__all__ = [
    "FAMILY_NAMES",
    "FORMAT_NAMES",
    "KEY_WORDS",
    "ComponentNames",
    "FamilyNames",
    "FormatName",
    "Naming",
    "Place",
    "Rule",
    "families_of",
    "family_names",
    "native_part",
    "place_keys",
    "split_key",
    "why_not",
]
