"""Reads LoRA files of every program into one form: component -> module name -> adapter.

The format is recognised by the keys. What a scale is comes, in this order, from `.alpha` beside the weights, from
peft's settings (in the header, as diffusers writes them, or in adapter_config.json), or is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from framework.errors import SourceError
from framework.runtime.lora_fusing import LayerAdapter, scale_of, split, swap_halves
from framework.schema.lora_keys import FAMILY_NAMES, Place, family_names, place_keys, split_key
from framework.schema.lora_keys.placing import KeyWord, other_method, written_form

DIFFUSERS_SETTINGS = "lora_adapter_metadata"
"""Header key under which diffusers keeps peft's settings."""
COMPONENT_KEY = "octavo.component"
"""Header key of a file that is for another component than its keys say (the second expert of Wan 2.2)."""
CONFIG_KEY = "octavo.config"
"""Header key for the whole configuration of the run, as JSON."""
BLOCKS_KEY = "octavo.layers_per_block"
"""Header key for a UNet's layers per block, on which native names depend."""
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
LORA_FILE = "lora.safetensors"
LORA_FILE_2 = "lora_low_noise.safetensors"
"""Of the second expert, which every program keeps in a file of its own."""

Adapters = dict[str, dict[str, LayerAdapter]]


@dataclass
class LoraContent:
    """What LoRA files hold.

    adapters: component -> module name -> adapter.   family: the one whose names the keys are; None where the keys name
    layers of no family.   form: of the file, for people.   metadata: its header.
    """

    adapters: Adapters
    family: str | None
    form: str
    metadata: dict[str, str] = field(default_factory=dict)


def read_lora(
    path: Path,
    *,
    families: Sequence[str] = tuple(FAMILY_NAMES),
    component: str | None = None,
    keep_rank: bool = False,
    layers_per_block: int | None = None,
) -> LoraContent:
    """Read a LoRA file, or a folder: of a run, of peft, or one with a folder of peft's for each component.

    families: those that come into question; the one that knows most of the names is taken.
    component: what keys are for that name no component, and those of the second denoiser in a file of its own; None
    means what header and folder say, or the first denoiser.
    keep_rank: see `split`.   layers_per_block: see `family_names`.
    Raises SourceError for files that can't be read, are no LoRA, or of a kind that no adapter here can hold.
    """
    found: LoraContent | None = None
    for file, meant in _files(path):
        one = _read_file(
            file,
            families=families,
            component=component or meant,
            keep_rank=keep_rank,
            layers_per_block=layers_per_block,
        )
        if found is None:
            found = one
            continue
        for name, layers in one.adapters.items():
            found.adapters.setdefault(name, {}).update(layers)
    assert found is not None
    return found


def named_as_here(
    adapters: Mapping[str, LayerAdapter], here: Collection[str]
) -> dict[str, LayerAdapter]:
    """Layers under the names that a model has for them: transformers has moved some below other modules.

    here: names of the model's modules.   A layer that isn't there under any name keeps its own.
    """
    renamed = {}
    for name in adapters:
        if name in here:
            continue
        close = [h for h in here if h.endswith(f".{name}") or name.endswith(f".{h}")]
        # Of `a.b.layers.0.q` also `q` may be a module: only a longer path counts.
        close = [h for h in close if h.count(".") > 1]
        if len(close) == 1:
            renamed[name] = close[0]
    return {renamed.get(name, name): adapter for name, adapter in adapters.items()}


def _files(path: Path) -> list[tuple[Path, str | None]]:
    """Files to read, and the component that the place of each says it is for."""
    if not path.is_dir():
        return [(path, None)]
    if (path / PEFT_WEIGHTS).is_file():
        return [(path / PEFT_WEIGHTS, None)]
    inside = [path / name for name in (LORA_FILE, LORA_FILE_2) if (path / name).is_file()]
    if inside:
        return [(file, None) for file in inside]
    folders = sorted([*path.glob(f"*/{PEFT_WEIGHTS}"), *path.glob(f"lora_peft/*/{PEFT_WEIGHTS}")])
    inside = sorted(path.glob("lora_comfyui*.safetensors")) or sorted(
        path.glob("lora_kohya*.safetensors")
    )
    if inside and not folders:
        return [(file, None) for file in inside]
    if folders:
        return [(file, _component_called(file.parent.name)) for file in folders]
    raise SourceError(
        "the folder holds no LoRA",
        where=str(path),
        found=", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing",
        hint=f"name a LoRA file, a run folder with {LORA_FILE}, or a folder of peft's with {PEFT_WEIGHTS}",
    )


def _component_called(folder: str) -> str:
    """Component of a folder that is named as in the published layout."""
    return {"transformer": "dit", "unet": "dit", "transformer_2": "dit_2"}.get(folder, folder)


def _read_file(
    path: Path,
    *,
    families: Sequence[str],
    component: str | None,
    keep_rank: bool,
    layers_per_block: int | None,
) -> LoraContent:
    tensors, metadata = _read_tensors(path)
    stems = _by_stem(tensors, path)
    if layers_per_block is None and metadata.get(BLOCKS_KEY, "").isdigit():
        layers_per_block = int(metadata[BLOCKS_KEY])
    family, places = recognise(stems, families, layers_per_block=layers_per_block)
    strange = [stem for stem, place in places.items() if place is None]
    if strange:
        raise SourceError(
            f"{len(strange)} of {len(stems)} layers in the LoRA file have names that {family} doesn't have",
            where=str(path),
            found=", ".join(strange[:3]),
            hint=_nearest(strange[0], family) or "the LoRA was made for another model",
        )
    settings = _Settings(path, metadata)
    meant = component or metadata.get(COMPONENT_KEY)
    adapters: Adapters = {}
    for stem, place in places.items():
        assert place is not None
        name = place.component
        if meant is not None and (place.bare or (name, meant) == ("dit", "dit_2")):
            name = meant
        layers = adapters.setdefault(name, {})
        for layer, adapter in _adapters_of(stems[stem], place, settings, keep_rank):
            layers[layer] = adapter
    named = any(place is not None and place.named for place in places.values())
    return LoraContent(adapters, family if named else None, written_form(stems), metadata)


def recognise(
    stems: Iterable[str], families: Sequence[str], *, layers_per_block: int | None = None
) -> tuple[str, dict[str, Place | None]]:
    """The family that knows most of these names, and what they mean in it; the first of several that know as many."""
    best: tuple[tuple[int, int], str, dict[str, Place | None]] | None = None
    listed = list(stems)
    for family in families:
        names = family_names(family, layers_per_block=layers_per_block)
        places = place_keys(listed, names)
        known = sum(place is not None and place.named for place in places.values())
        score = (known, -sum(place is None for place in places.values()))
        if best is None or score > best[0]:
            best = (score, family, places)
    assert best is not None, "there is always a family"
    return best[1], best[2]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise SourceError(
            "the LoRA file can't be read",
            where=str(path),
            found=str(error),
            hint="name a LoRA's .safetensors file, or a folder that holds one",
        ) from error


def _by_stem(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[KeyWord, Tensor]]:
    """Stem -> what lies under it; refuses files of other methods, and halves of pairs."""
    stems: dict[str, dict[KeyWord, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        parted = split_key(key)
        if parted is None:
            strange.append(key)
        else:
            stems.setdefault(parted[0], {})[parted[1]] = tensor
    if strange or not stems:
        method = next((m for key in strange if (m := other_method(key))), None)
        raise SourceError(
            f"the file holds {method}, not LoRA"
            if method
            else "the file isn't a LoRA in diffusers' form or another that is known",
            where=str(path),
            found=f"keys such as {', '.join(strange[:3])}" if strange else "no tensors",
            hint="forms that are read: diffusers (<component>.<layer>.lora_A.weight), peft, kohya "
            "(lora_unet_<layer>.lora_down.weight), ComfyUI (diffusion_model.<layer>.lora_A.weight), DiffSynth-Studio",
        )
    halves = [stem for stem, parts in stems.items() if not {"down", "up"} <= parts.keys()]
    if halves:
        held = ", ".join(sorted(stems[halves[0]]))
        raise SourceError(
            f"the LoRA file doesn't hold both matrices of {len(halves)} of {len(stems)} layers",
            where=str(path),
            found=f"of {halves[0]} only: {held}",
            hint="the file is damaged, or not a LoRA",
        )
    return stems


def _adapters_of(
    parts: Mapping[KeyWord, Tensor], place: Place, settings: _Settings, keep_rank: bool
) -> Iterable[tuple[str, LayerAdapter]]:
    down, up = parts["down"], parts["up"]
    if down.shape[0] != up.shape[1]:
        settings.refuse(
            f"the two matrices of {place.layers[0]} have different ranks",
            f"{list(down.shape)} and {list(up.shape)}",
        )
    scale = (
        float(parts["alpha"]) / down.shape[0]
        if "alpha" in parts
        else settings.scale(place, down.shape[0])
    )
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if magnitude is not None:
        if magnitude.numel() != up.shape[0]:
            settings.refuse(
                f"the DoRA of {place.layers[0]} isn't over its outputs",
                f"{list(magnitude.shape)} for {up.shape[0]} outputs",
            )
        magnitude = magnitude.flatten()
    adapter = LayerAdapter(down, up, scale, magnitude)
    if place.swapped:
        adapter = swap_halves(adapter)
    if len(place.slices) == 1:
        yield place.layers[0], adapter
        return
    try:
        split_up = split(adapter, place.slices, keep_rank=keep_rank)
    except ValueError as error:
        settings.refuse(f"{place.layers[0]}: {error}", "a layer of another model")
        return
    for layer, part in zip(place.layers, split_up, strict=True):
        if part is not None:
            yield layer, part


class _Settings:
    """What peft's settings say of the scale, where a file comes with them."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        beside = path.parent / PEFT_CONFIG
        try:
            if DIFFUSERS_SETTINGS in metadata:
                self._values = json.loads(metadata[DIFFUSERS_SETTINGS])
            elif path.name == PEFT_WEIGHTS and beside.is_file():
                self._values = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.refuse("the LoRA's settings can't be read", str(error))

    def scale(self, place: Place, rank: int) -> float:
        """Of a layer.   rank: from its shape."""
        values = self._of(place.component)
        layer = place.layers[0]
        alpha = _by_pattern(values.get("alpha_pattern"), layer, values.get("lora_alpha", rank))
        return scale_of(
            alpha=float(alpha), rank=rank, use_rslora=bool(values.get("use_rslora", False))
        )

    def _of(self, component: str) -> Mapping[str, Any]:
        prefixes = ("transformer", "unet") if component == "dit" else (component, "transformer")
        for prefix in prefixes:
            own = {
                key.removeprefix(f"{prefix}."): value
                for key, value in self._values.items()
                if key.startswith(f"{prefix}.")
            }
            if own:
                return own
        return self._values if "lora_alpha" in self._values else {}

    def refuse(self, message: str, found: str) -> None:
        """Raise SourceError."""
        raise SourceError(
            message,
            where=str(self._path),
            found=found,
            hint="the file is damaged, or was made for another model",
        )


def _by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """What peft takes for a layer: patterns are regular expressions for the end of a name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _nearest(stem: str, family: str) -> str:
    """A hint with names that the family does have, in the stem's own writing."""
    names = family_names(family)
    flat = "." not in stem
    known = [
        (f"{naming.prefix}_{written.replace('.', '_')}" if flat else f"{naming.prefix}.{written}")
        for parts in names.components.values()
        for naming in (parts.kohya, parts.comfyui)
        if naming is not None and naming.flat == flat
        for rule in parts.rules
        for written in (rule.native if naming.native else rule.ours,)
    ]
    near = get_close_matches(re.sub(r"\d+", "#", stem), known, n=2, cutoff=0.6)
    return f"nearest names there: {', '.join(near)} (# is a number)" if near else ""
