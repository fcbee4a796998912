"""What a LoRA file will hold once it is loaded as a frozen preset, from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from framework.errors import SourceError
from framework.inventory import StoredTensor, read_file_header
from framework.plan.preset_plan import PresetLayer, PresetPlan
from framework.schema.family import ComponentSpec
from framework.schema.lora_keys import (
    FAMILY_NAMES,
    KEY_WORDS,
    Place,
    families_of,
    family_names,
    place_keys,
    split_key,
)


class _Pair(NamedTuple):
    """Shapes of one layer in the file."""

    down: StoredTensor
    up: StoredTensor
    has_magnitude: bool


def read_preset(
    path: Path, component: str, spec: ComponentSpec, layers: Mapping[str, tuple[int, ...]]
) -> PresetPlan:
    """Plan a component's preset.   layers: module name -> shape of the weight, of all that can take an adapter.

    Where the file's layer stands for several of ours, each gets its whole rank.
    Raises SourceError for a file that is no LoRA, has nothing for the component, or was made for another model.
    """
    if not path.is_file():
        raise SourceError(
            "the LoRA file does not exist", where=str(path), hint="Correct the file's name"
        )
    pairs = _pairs(read_file_header(path), path)
    families = families_of(spec.kind[1], component) or tuple(FAMILY_NAMES)
    best: dict[str, Place | None] = {}
    for family in families:
        places = place_keys(pairs, family_names(family))
        if not best or _num_named(places) > _num_named(best):
            best = places
    found: dict[str, PresetLayer] = {}
    for stem, place in best.items():
        if place is None or not _is_for(place, component):
            continue
        for layer in place.layers:
            if layer not in layers or not _fits(pairs[stem], place, layers[layer]):
                raise SourceError(
                    f"the preset's layer {layer} doesn't fit the model",
                    where=str(path),
                    found=f"{stem}: {list(pairs[stem].up.shape)} x {list(pairs[stem].down.shape)}",
                    hint="Give a LoRA that was made for this model",
                )
            found[layer] = PresetLayer(
                name=layer, rank=pairs[stem].down.shape[0], shape=layers[layer]
            )
    if not found:
        raise SourceError(
            f"the LoRA file holds nothing for {component}",
            where=str(path),
            found=", ".join(list(pairs)[:3]),
            hint="Give another file",
        )
    use_dora = {pair.has_magnitude for pair in pairs.values()}
    return PresetPlan(path=str(path), use_dora=use_dora == {True}, layers=tuple(found.values()))


def _pairs(header: Mapping[str, StoredTensor], path: Path) -> dict[str, _Pair]:
    stems: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in header.items():
        parted = split_key(key)
        if parted is not None:
            stems.setdefault(parted[0], {})[parted[1]] = tensor
    pairs = {
        stem: _Pair(t["down"], t["up"], bool({"magnitude", "dora_scale"} & t.keys()))
        for stem, t in stems.items()
        if {"down", "up"} <= t.keys()
    }
    if not pairs or any(split_key(key) is None for key in header):
        strange = [key for key in header if split_key(key) is None]
        raise SourceError(
            "the file isn't a LoRA in diffusers' form or another that is known",
            where=str(path),
            found=", ".join(strange[:3]) or "no pair of matrices",
            hint=f"Give a LoRA whose keys end in {', '.join(list(KEY_WORDS)[:3])} or the like",
        )
    return pairs


def _num_named(places: Mapping[str, Place | None]) -> int:
    return sum(place is not None and place.named for place in places.values())


def _is_for(place: Place, component: str) -> bool:
    # Each expert's file says "transformer" of the one that it is for.
    return place.component == component or (place.component, component) == ("dit", "dit_2")


def _fits(pair: _Pair, place: Place, shape: tuple[int, ...]) -> bool:
    whole, index = sum(place.slices), place.layers
    outputs = pair.up.shape[0]
    sizes = {outputs * size // whole for size in place.slices} if len(index) > 1 else {outputs}
    return shape[0] in sizes and prod(pair.down.shape[1:]) == prod(shape[1:])
