"""LoRA adapters on loaded components, by peft: attaching them, and reading and writing their files.

Files have the form that diffusers' `load_lora_weights` reads: keys `<prefix>.<layer>.lora_A.weight`, and the adapter's
settings as JSON under `lora_adapter_metadata`.

Letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from framework.errors import SourceError
from framework.plan.types import LoraPlan
from framework.storage.managed import described_weights

ADAPTER_NAME = "default"
_METADATA_KEY = "lora_adapter_metadata"
_PREFIXES = {"dit": "transformer"}
_ADAPTER_PART = re.compile(r"\.lora_(A|B|magnitude_vector)\.")


@dataclass(frozen=True)
class LoraSettings:
    """What is needed to make an adapter's layers; `layers` are whole module names."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    layers: tuple[str, ...]


def is_adapter_name(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter and not to the component itself."""
    return _ADAPTER_PART.search(name) is not None


def attach_lora_(
    module: nn.Module, lora: LoraPlan | LoraSettings, *, component: str, seed: int, trains: bool
) -> None:
    """Put an adapter called "default" beside the chosen layers; float32, B zero, so that the output doesn't change yet.

    A is drawn for each layer from (seed, component, layer name) alone: start values are the same on every device, for
    every storage of the base and whatever other layers are chosen. The global random state isn't touched.
    """
    names = [layer if isinstance(layer, str) else layer.name for layer in lora.layers]
    config: Any = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and divides
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        # As an expression, because peft takes a list for name endings, which may mean more layers than these.
        target_modules="|".join(re.escape(name) for name in names),
    )
    with torch.random.fork_rng(devices=[]), described_weights():
        inject_adapter_in_model(config, module, adapter_name=ADAPTER_NAME)
    # From here on the exact names, so that what is written to files can be read by others.
    config.target_modules = set(names)
    for name, layer in lora_layers(module):
        _start_layer_(layer, _generator(seed, component, name))
    for name, parameter in module.named_parameters():
        if is_adapter_name(name):
            parameter.requires_grad_(trains)
    for _, layer in lora_layers(module):
        for part in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.lora_magnitude_vector):
            part.train(trains)


def lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of everything that carries an adapter."""
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def lora_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under peft's names (`<layer>.lora_A.weight`); empty without an adapter."""
    if not hasattr(module, "peft_config"):
        return {}
    state: dict[str, Tensor] = get_peft_model_state_dict(
        module, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return state


def save_lora(
    path: Path, modules: Mapping[str, nn.Module], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the adapters of several components into one `.safetensors` file that diffusers can load.

    path: written under a temporary name, synced and renamed, so that it never holds half a file.
    modules: component name -> module; those without an adapter are left out.   metadata: for the file's header.
    Raises ValueError where no module carries an adapter.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component, module in modules.items():
        prefix = _prefix(component)
        state = lora_state_dict(module)
        tensors |= {
            f"{prefix}.{key}": value.detach().cpu().contiguous() for key, value in state.items()
        }
        if state:
            settings |= {f"{prefix}.{key}": value for key, value in _settings_of(module).items()}
    if not tensors:
        raise ValueError("no component carries an adapter")
    header = {
        **(metadata or {}),
        "format": "pt",
        _METADATA_KEY: json.dumps(settings, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata=header)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_lora_(module: nn.Module, path: Path, component: str) -> bool:
    """Load a component's adapter from a file: into the adapter that is attached, or attaching one for inference.

    An attached adapter must agree with the file in layers, rank and kind.
    Returns False, with nothing changed, where the file has adapters for other components only.
    Raises SourceError for a file that can't be read, isn't a LoRA in diffusers' form, or doesn't fit.
    """
    tensors, metadata = _read_lora(path)
    prefix = _prefix(component)
    own = {
        k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")
    }
    if not own:
        return False
    if not hasattr(module, "peft_config"):
        settings = _settings_from_file(own, _component_metadata(metadata, prefix), path)
        _check_layers_exist(module, settings, path)
        attach_lora_(module, settings, component=component, seed=0, trains=False)
    _check_same_keys(own, lora_state_dict(module), path)
    # peft leaves the name of the adapter and, for DoRA's magnitude, `.weight` out of the file's keys.
    targets = {
        _file_key(name): parameter
        for name, parameter in module.named_parameters()
        if is_adapter_name(name)
    }
    with torch.no_grad():
        for key, value in own.items():
            targets[key].copy_(value)
    return True


def _prefix(component: str) -> str:
    return _PREFIXES.get(component, component)


def _file_key(parameter_name: str) -> str:
    key = parameter_name.replace(f".{ADAPTER_NAME}.", ".")
    return key.removesuffix(".weight") if ".lora_magnitude_vector" in key else key


def _generator(seed: int, component: str, layer: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{component}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _start_layer_(layer: Any, generator: torch.Generator) -> None:
    """Give one layer its start values in float32: A (R, I) uniform, B (O, R) zero; peft used the base's dtype."""
    a, b = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
    device = a.weight.device
    start = torch.empty(a.weight.shape, dtype=torch.float32)
    # Kaiming with this slope is the LoRA paper's choice in its reference code: U(-1/sqrt(I), 1/sqrt(I)).
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    a.weight = nn.Parameter(start.to(device))
    b.weight = nn.Parameter(torch.zeros(b.weight.shape, dtype=torch.float32, device=device))
    if ADAPTER_NAME in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[ADAPTER_NAME].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=a.weight,
            lora_B=b.weight,
            scaling=layer.scaling[ADAPTER_NAME],
        )


def _settings_of(module: nn.Module) -> dict[str, object]:
    """The few fields of peft's configuration that every version of it knows."""
    config: Any = module.peft_config[ADAPTER_NAME]  # type: ignore[index]
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "target_modules": sorted(config.target_modules),
    }


def _read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata.get(_METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise SourceError(
            "the LoRA file can't be read",
            where=str(path),
            found=str(error),
            hint="name a .safetensors file that was written by this program or by diffusers",
        ) from error
    strange = [
        key
        for key in tensors
        if not re.search(r"\.lora_(A|B)\.weight$|\.lora_magnitude_vector$", key)
    ]
    if strange or not tensors:
        raise SourceError(
            "the file isn't a LoRA in diffusers' form",
            where=str(path),
            found=f"keys such as {', '.join(strange[:3])}" if strange else "no tensors",
            hint="keys must be <component>.<layer>.lora_A.weight and .lora_B.weight",
        )
    return tensors, settings


def _component_metadata(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        k.removeprefix(f"{prefix}."): v for k, v in settings.items() if k.startswith(f"{prefix}.")
    }


def _settings_from_file(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], path: Path
) -> LoraSettings:
    """Settings from the header, or as diffusers takes them without one: rank from the shapes, alpha equal to it."""
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise SourceError(
            "the LoRA has layers of different rank", where=str(path), found=str(sorted(ranks))
        )
    rank = ranks.pop()
    layers = {key.split(".lora_")[0] for key in tensors}
    return LoraSettings(
        rank=rank,
        alpha=float(metadata.get("lora_alpha", rank)),
        dropout=0.0,
        use_rslora=bool(metadata.get("use_rslora", False)),
        use_dora=any(key.endswith(".lora_magnitude_vector") for key in tensors),
        layers=tuple(sorted(layers)),
    )


def _check_layers_exist(module: nn.Module, settings: LoraSettings, path: Path) -> None:
    names = {name for name, _ in module.named_modules()}
    unknown = [layer for layer in settings.layers if layer not in names]
    if unknown:
        raise SourceError(
            f"{len(unknown)} layers of the LoRA don't exist in the model: {', '.join(unknown[:3])}",
            where=str(path),
            hint="the LoRA was made for another model",
        )


def _check_same_keys(
    offered: Mapping[str, Tensor], attached: Mapping[str, Tensor], path: Path
) -> None:
    problems = [
        *(f"{key} is only in the file" for key in offered if key not in attached),
        *(f"{key} is not in the file" for key in attached if key not in offered),
        *(
            f"{key} is {list(offered[key].shape)} in the file, {list(value.shape)} in the model"
            for key, value in attached.items()
            if key in offered and offered[key].shape != value.shape
        ),
    ]
    if problems:
        raise SourceError(
            "the LoRA file doesn't fit the adapter",
            where=str(path),
            found="; ".join(problems[:4])
            + (f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""),
            hint="rank, target_modules and use_dora must be those that the file was made with",
        )
