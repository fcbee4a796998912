"""Writes adapters in the form of each program that people open LoRA files with.

The scale is multiplied into `up`: ComfyUI reads no header, and takes 1 where no alpha lies beside the weights.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from framework.atomic import sync_path, write_text
from framework.errors import PlanError
from framework.runtime.lora_files import (
    COMPONENT_KEY,
    DIFFUSERS_SETTINGS,
    LORA_FILE,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Adapters,
)
from framework.runtime.lora_fusing import LayerAdapter, fuse, swap_halves
from framework.schema.lora_keys import (
    FamilyNames,
    FormatName,
    Naming,
    Rule,
    native_part,
    why_not,
)

RESULT_NAMES: Mapping[FormatName, str] = {
    "diffusers": LORA_FILE,
    "kohya": "lora_kohya.safetensors",
    "comfyui": "lora_comfyui.safetensors",
    "peft": "lora_peft",
}
"""What a run's folder calls each."""
Number = TypeVar("Number", int, float)
_LOW_NOISE = "_low_noise"
_PEFT_FOLDERS = {"dit": "transformer", "dit_2": "transformer_2"}


def planned_paths(path: Path, form: FormatName, components: list[str]) -> list[Path]:
    """Files that `write_lora` writes, or, for peft, folders.   components: that have adapters."""
    if form == "peft":
        return [path / _PEFT_FOLDERS.get(name, name) for name in components]
    first = [path] if any(name != "dit_2" for name in components) else []
    return [*first, *([second_path(path)] if "dit_2" in components else [])]


def second_path(path: Path) -> Path:
    """Name of the file for the second expert, beside that for the first: `lora_low_noise.safetensors`."""
    return path.with_name(f"{path.stem}{_LOW_NOISE}{path.suffix}")


def write_lora(
    path: Path,
    adapters: Adapters,
    *,
    form: FormatName,
    names: FamilyNames | None = None,
    metadata: Mapping[str, str] | None = None,
    scale_in_header: bool = False,
) -> list[Path]:
    """Write adapters in one format; each file appears whole or not at all, in place of an older one.

    path: of the file; for peft, of a folder with one for each component.   names: of the family; None where the modules
    belong to none, which only diffusers' and peft's forms allow.   metadata: for the header; its values are text.
    scale_in_header: with the form diffusers, leave the scale out of the weights, which are then read back bit for bit,
    but by programs other than diffusers at another strength.
    Returns what was written; two files where both experts have adapters.
    Raises PlanError for what the format can't carry, with the reason; ValueError where there is no adapter.
    """
    adapters = {name: layers for name, layers in adapters.items() if layers}
    if not adapters:
        raise ValueError("no component carries an adapter")
    _refuse_what_is_lost(adapters, form, names)
    said = {"format": "pt", "octavo.format": form, **(metadata or {})}
    written = planned_paths(path, form, list(adapters))
    if form == "peft":
        for folder, layers in zip(written, adapters.values(), strict=True):
            _write_peft(folder, layers, said)
        return written
    for file in written:
        second = file != path
        chosen = {n: layers for n, layers in adapters.items() if (n == "dit_2") == second}
        header = {**said, COMPONENT_KEY: "dit_2"} if second else said
        if form == "diffusers":
            tensors, settings = _diffusers(chosen, names, folded=not scale_in_header)
            header = {**header, DIFFUSERS_SETTINGS: json.dumps(settings, indent=2, sort_keys=True)}
        else:
            assert names is not None
            tensors = _foreign(chosen, form, names)
            header = {**header, **_foreign_header(tensors, form, names)}
        _save(file, tensors, header)
    return written


def _refuse_what_is_lost(adapters: Adapters, form: FormatName, names: FamilyNames | None) -> None:
    for component, layers in adapters.items():
        kinds = {layer: adapter.magnitude is not None for layer, adapter in layers.items()}
        if names is not None:
            reason = why_not(names, component, kinds, form)
        else:
            reason = (
                None if form in ("diffusers", "peft") else "the layers belong to no known family"
            )
        if reason is not None:
            raise PlanError(
                f"the adapter of {component} can't be written in the form {form}",
                found=reason,
                hint="use export.formats=[diffusers,peft], or `octavo export --merge`",
            )


def _diffusers(
    adapters: Adapters, names: FamilyNames | None, *, folded: bool
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors, and peft's settings as diffusers keeps them: one object, each field with the component's prefix."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component, layers in adapters.items():
        prefix = "transformer" if component in ("dit", "dit_2") else component
        if names is not None:
            prefix = names.components[component].diffusers
        tensors |= {
            f"{prefix}.{key}": value for key, value in peft_state(layers, folded=folded).items()
        }
        # `text_encoder.text_model` is how files call it; the settings are the component's.
        own = prefix.partition(".")[0]
        settings |= {
            f"{own}.{key}": value for key, value in _peft_settings(layers, folded=folded).items()
        }
    return tensors, settings


def peft_state(layers: Mapping[str, LayerAdapter], *, folded: bool = True) -> dict[str, Tensor]:
    """Adapters under the names of peft's state dicts.   folded: the scale is in `lora_B`."""
    state: dict[str, Tensor] = {}
    for layer, adapter in layers.items():
        state[f"{layer}.lora_A.weight"] = adapter.down
        state[f"{layer}.lora_B.weight"] = adapter.folded().up if folded else adapter.up
        if adapter.magnitude is not None:
            state[f"{layer}.lora_magnitude_vector"] = magnitude_as_peft(adapter)
    return state


def magnitude_as_peft(adapter: LayerAdapter) -> Tensor:
    """DoRA's magnitude in peft's shape: (O,), or (1, O, 1...) for a convolution."""
    assert adapter.magnitude is not None
    kernel = adapter.down.ndim - 2
    return adapter.magnitude.reshape(1, -1, *(1,) * kernel) if kernel else adapter.magnitude


def _peft_settings(layers: Mapping[str, LayerAdapter], *, folded: bool = True) -> dict[str, object]:
    """The few fields of peft's configuration that every version of it knows.

    folded: alpha is the rank of each layer; otherwise what the scale makes it.
    """
    ranks = {layer: adapter.rank for layer, adapter in layers.items()}
    alphas = {
        layer: adapter.rank if folded else adapter.scale * adapter.rank
        for layer, adapter in layers.items()
    }
    rank, alpha = _usual(ranks), _usual(alphas)
    patterns = {
        "rank_pattern": {_exactly(layer): own for layer, own in ranks.items() if own != rank},
        "alpha_pattern": {_exactly(layer): own for layer, own in alphas.items() if own != alpha},
    }
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": any(adapter.magnitude is not None for adapter in layers.values()),
        "target_modules": sorted(layers),
        **{key: pattern for key, pattern in patterns.items() if pattern},
    }


def _usual(values: Mapping[str, Number]) -> Number:
    return Counter(values.values()).most_common(1)[0][0]


def _exactly(layer: str) -> str:
    """A pattern of peft's, which are for endings of names, that only this layer fits."""
    return f"^{re.escape(layer)}"


def _write_peft(folder: Path, layers: Mapping[str, LayerAdapter], said: Mapping[str, str]) -> None:
    """A folder that `PeftModel.from_pretrained` reads; the settings come last, and complete it."""
    tensors = {f"base_model.model.{key}": value for key, value in peft_state(layers).items()}
    _save(folder / PEFT_WEIGHTS, tensors, said)
    settings = _peft_settings(layers)
    if any(not re.search(r"\d", layer) for layer in layers):
        # peft takes a list for endings of names, and `proj_out` alone would mean layers inside the blocks as well.
        settings["target_modules"] = "|".join(re.escape(layer) for layer in sorted(layers))
    config: Any = LoraConfig(
        **settings,  # type: ignore[arg-type]
        base_model_name_or_path=said.get("base_model") or None,
        inference_mode=True,
    )
    text = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    write_text(folder / PEFT_CONFIG, json.dumps(text, indent=2, sort_keys=True, default=str) + "\n")


def _foreign(adapters: Adapters, form: FormatName, names: FamilyNames) -> dict[str, Tensor]:
    """Tensors under the names of kohya or ComfyUI."""
    ready: list[tuple[Naming, str, LayerAdapter]] = []
    for component, layers in adapters.items():
        parts = names.components[component]
        naming = parts.kohya if form == "kohya" else parts.comfyui
        assert naming is not None
        written = _native(layers, parts.rules) if naming.native else dict(layers)
        ready += [(naming, name, adapter) for name, adapter in written.items()]
    highest = (
        max(adapter.rank for naming, _, adapter in ready if naming.flat)
        if any(naming.flat for naming, _, _ in ready)
        else 0
    )
    tensors: dict[str, Tensor] = {}
    for naming, name, adapter in ready:
        if naming.flat:
            alpha = highest if names.one_alpha else adapter.rank
            tensors |= _flat(naming, name, adapter, alpha)
        else:
            stem = f"{naming.prefix}.{name}"
            tensors[f"{stem}.lora_A.weight"] = adapter.down
            tensors[f"{stem}.lora_B.weight"] = adapter.folded().up
    return tensors


def _flat(naming: Naming, name: str, adapter: LayerAdapter, alpha: int) -> dict[str, Tensor]:
    """Kohya's three tensors of a layer.   alpha: scale is alpha / rank, the rest is in `up`."""
    stem = f"{naming.prefix}_{name.replace('.', '_')}"
    return {
        f"{stem}.lora_down.weight": adapter.down,
        f"{stem}.lora_up.weight": adapter.folded(alpha / adapter.rank).up,
        f"{stem}.alpha": adapter.down.new_tensor(float(alpha)),
    }


def _native(layers: Mapping[str, LayerAdapter], rules: tuple[Rule, ...]) -> dict[str, LayerAdapter]:
    """Native name -> adapter; those that share a native layer become one."""
    gathered: dict[str, dict[int, LayerAdapter]] = {}
    slices: dict[str, tuple[int, ...]] = {}
    for layer, adapter in layers.items():
        part = native_part(layer, rules)
        assert part is not None  # `why_not` refuses it
        turned = swap_halves(adapter) if part.rule.swapped else adapter
        gathered.setdefault(part.name, {})[part.rule.index] = turned
        slices[part.name] = part.rule.slices
    return {
        name: parts[0]
        if len(slices[name]) == 1
        else fuse([parts.get(i) for i in range(len(slices[name]))], slices[name])
        for name, parts in gathered.items()
    }


def _foreign_header(
    tensors: Mapping[str, Tensor], form: FormatName, names: FamilyNames
) -> dict[str, str]:
    """What other tools show of a file; all of it text."""
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{names.architecture}/lora",
    }
    if form != "kohya":
        return said
    ranks = {value.shape[0] for key, value in tensors.items() if "lora_down" in key}
    alphas = {float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    return {
        **said,
        "ss_v2": "False",
        "ss_base_model_version": names.base_version,
        "ss_network_module": names.network_module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": "{}",
    }


def _save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write under a temporary name, sync and rename, so that `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(ready, temporary, metadata=dict(header))
        sync_path(Path(temporary))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        sync_path(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)
