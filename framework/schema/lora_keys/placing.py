"""Which layers the keys of a LoRA file mean, whoever wrote it: the form is recognised by the keys alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from framework.schema.lora_keys.base import ComponentNames, FamilyNames, Rule, our_layers

KeyWord = Literal["down", "up", "alpha", "magnitude", "dora_scale"]
KEY_WORDS: Mapping[str, KeyWord] = {
    ".lora_A.weight": "down",
    ".lora_A.default.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.default.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".dora_scale": "dora_scale",
}
"""How a key ends, and what that says."""

_OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon with a Tucker core",
    "diff": "full differences of weights",
    "ia3": "IA3",
}
_PEFT = "base_model.model."
_WRAPPERS = (_PEFT, "model.diffusion_model.")
# What stands before a denoiser's layers, whatever the family.
_DENOISER = ("diffusion_model", "dit")
# Components by diffusers' names: of a family that has no such component, a file is for another model.
_COMPONENTS = ("transformer", "transformer_2", "unet", "text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True)
class Place:
    """What one stem of a file's keys stands for.

    component: of ours.   layers: module names, in the order of the row slices.   slices: their relative sizes.
    swapped: whether the halves of the rows are to be exchanged.   named: whether a rule knows the name; otherwise it was
    taken for a module name as it is.   bare: whether the stem names no component, so that "dit" is only a guess.
    """

    component: str
    layers: tuple[str, ...]
    slices: tuple[int, ...] = (1,)
    swapped: bool = False
    named: bool = True
    bare: bool = False


def split_key(key: str) -> tuple[str, KeyWord] | None:
    """The stem of a key and what the key holds; None for one that no LoRA has."""
    for ending, word in KEY_WORDS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), word
    return None


def other_method(key: str) -> str | None:
    """What the adapter is where a key is one of another method than LoRA."""
    leaf = re.split(r"[.]", key)[-1] if not key.endswith(".weight") else key.split(".")[-2]
    return next((name for start, name in _OTHER_METHODS.items() if leaf.startswith(start)), None)


def place_keys(stems: Iterable[str], names: FamilyNames) -> dict[str, Place | None]:
    """What each stem means in a family; None for one that means nothing in it."""
    return {stem: _place(stem, names) for stem in stems}


def written_form(stems: Iterable[str]) -> str:
    """Which program's form the stems are in, for people."""
    one = next(iter(stems), "")
    for start, form in (
        (_PEFT, "peft"),
        ("lora_", "kohya"),
        ("lycoris_", "kohya"),
        ("diffusion_model.", "comfyui"),
        ("text_encoders.", "comfyui"),
        ("transformer.", "diffusers"),
        ("unet.", "diffusers"),
        ("text_encoder", "diffusers"),
        ("vae.", "diffusers"),
    ):
        if one.startswith(start):
            return form
    return "DiffSynth-Studio"


def _place(stem: str, names: FamilyNames) -> Place | None:
    if "." not in stem and (flat := _flat(stem, names)) is not None:
        return flat
    bare = stem
    for wrapper in _WRAPPERS:
        bare = bare.removeprefix(wrapper)
    for prefix, component in _dotted_prefixes(names):
        if bare.startswith(f"{prefix}."):
            return _dotted(bare.removeprefix(f"{prefix}."), component, names.components[component])
    if bare.startswith(("pipe.", "lora_", "lycoris_")):
        return None
    first, _, rest = bare.partition(".")
    if first in _COMPONENTS and rest:
        return Place(first, (rest,), named=False)
    # Without a prefix: as peft and DiffSynth-Studio write the one model that they train.
    return replace(_dotted(bare, "dit", names.components["dit"]), bare=True)


def _dotted_prefixes(names: FamilyNames) -> list[tuple[str, str]]:
    """Prefix -> component, the longest first, so that `text_encoder.text_model` comes before `text_encoder`."""
    found: dict[str, str] = {}
    for component, parts in names.components.items():
        for naming in (parts.kohya, parts.comfyui):
            if naming is not None and not naming.flat:
                found.setdefault(naming.prefix, component)
        for prefix in (component, parts.diffusers, *parts.also):
            found.setdefault(prefix, component)
    for prefix in _DENOISER:
        found.setdefault(prefix, "dit")
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _dotted(name: str, component: str, parts: ComponentNames) -> Place:
    for native in (True, False):
        found = our_layers(name, parts.rules, native=native, flat=False)
        if found:
            return _placed(component, found, sliced=native)
    return Place(component, (name,), named=False)


def _flat(stem: str, names: FamilyNames) -> Place | None:
    """A name with underscores; only the rules know where its dots were."""
    for component, parts in names.components.items():
        prefixes = {n.prefix for n in (parts.kohya, parts.comfyui) if n is not None and n.flat}
        for prefix in (*prefixes, *(p for p in parts.also if "." not in p)):
            if not stem.startswith(f"{prefix}_"):
                continue
            for native in (True, False):
                name = stem.removeprefix(f"{prefix}_")
                found = our_layers(name, parts.rules, native=native, flat=True)
                if found:
                    return _placed(component, found, sliced=native)
    return None


def _placed(component: str, found: tuple[tuple[str, Rule], ...], *, sliced: bool) -> Place:
    """sliced: whether the name was the native one, which may stand for several of our layers."""
    if not sliced:
        return Place(component, (found[0][0],))
    # A decoder may be called in two ways by us, alone or inside its wrapper: the first is taken.
    rule = found[0][1]
    layers = tuple(layer for layer, _ in found) if len(rule.slices) > 1 else (found[0][0],)
    return Place(component, layers, rule.slices, rule.swapped)
