"""LoRA adapters on loaded components, by peft: attaching them, and reading and writing their files.

Two may lie on a component: the one that trains, "default", and a frozen one under it, "preset", which is always active
and never saved.

Letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from framework.errors import SourceError
from framework.plan.preset_plan import PresetPlan
from framework.plan.types import LoraPlan
from framework.runtime.lora_files import BLOCKS_KEY, named_as_here, read_lora
from framework.runtime.lora_fusing import LayerAdapter
from framework.runtime.lora_writing import peft_state, write_lora
from framework.schema.lora_keys import FamilyNames, FormatName, families_of, family_names
from framework.storage.managed import described_weights

ADAPTER_NAME = "default"
PRESET_NAME = "preset"
_ADAPTER_PART = re.compile(r"\.lora_(A|B|magnitude_vector)\.")


@dataclass(frozen=True)
class LoraSettings:
    """What is needed to make an adapter's layers; `layers` are whole module names.

    ranks, alphas: of layers where they differ from `rank` and `alpha`.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    layers: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)


def is_adapter_name(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter and not to the component itself."""
    return _ADAPTER_PART.search(name) is not None


def attach_lora_(
    module: nn.Module, lora: LoraPlan | LoraSettings, *, component: str, seed: int, trains: bool
) -> None:
    """Put an adapter called "default" beside the chosen layers; float32, B zero, so that the output doesn't change yet.

    A is drawn for each layer from (seed, component, layer name) alone: start values are the same on every device, for
    every storage of the base and whatever other layers are chosen. The global random state isn't touched.
    A plan with a preset gets that as well, frozen and of zeros: `load_preset_` fills it.
    """
    settings = lora if isinstance(lora, LoraSettings) else _settings_of(lora)
    _inject_(module, settings, ADAPTER_NAME)
    for name, layer in lora_layers(module):
        _start_layer_(layer, _generator(seed, component, name))
    preset = lora.preset if isinstance(lora, LoraPlan) else None
    if preset is not None:
        _attach_preset_(module, preset)
    for name, parameter in module.named_parameters():
        if is_adapter_name(name):
            parameter.requires_grad_(trains and f".{PRESET_NAME}." not in f"{name}.")
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


def layer_adapters(module: nn.Module) -> dict[str, LayerAdapter]:
    """The adapter of each layer, sharing its memory; empty without an adapter. The preset isn't among them."""
    found = {}
    for name, layer in lora_layers(module):
        if ADAPTER_NAME not in layer.lora_A:
            continue
        magnitudes = layer.lora_magnitude_vector
        magnitude = magnitudes[ADAPTER_NAME].weight if ADAPTER_NAME in magnitudes else None
        found[name] = LayerAdapter(
            layer.lora_A[ADAPTER_NAME].weight.detach(),
            layer.lora_B[ADAPTER_NAME].weight.detach(),
            float(layer.scaling[ADAPTER_NAME]),
            None if magnitude is None else magnitude.detach().flatten(),
        )
    return found


def save_lora(
    path: Path,
    modules: Mapping[str, nn.Module],
    *,
    form: FormatName = "diffusers",
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
    scale_in_header: bool = True,
) -> list[Path]:
    """Write the adapters of several components in the form that one kind of program loads.

    path: of the `.safetensors` file; for peft, of a folder.   modules: component name -> module; those without an
    adapter are left out.   family: None finds it by the modules' classes.   metadata: for the header.
    scale_in_header: see `write_lora`; here it is kept apart by default, so that loading gives the same numbers.
    Returns and raises what `write_lora` does: PlanError for what the form can't carry.
    """
    adapters = {component: layer_adapters(module) for component, module in modules.items()}
    names = module_names({c: m for c, m in modules.items() if adapters[c]}, family)
    counts = [count for m in modules.values() if (count := layers_per_block(m)) is not None]
    if counts:
        metadata = {**(metadata or {}), BLOCKS_KEY: str(counts[0])}
    return write_lora(
        path,
        adapters,
        form=form,
        names=names,
        metadata=metadata,
        scale_in_header=scale_in_header,
    )


def module_names(modules: Mapping[str, nn.Module], family: str | None = None) -> FamilyNames | None:
    """The names of the family that these modules are of; None where they are of none.   family: if it is known."""
    for component, module in modules.items():
        found = [family] if family else _exact_families(component, module)
        if found:
            blocks = layers_per_block(module)
            return family_names(found[0], layers_per_block=blocks)
    return None


def layers_per_block(module: nn.Module) -> int | None:
    """Of a UNet, as its config says; None for anything else, and where blocks differ."""
    if type(module).__name__ != "UNet2DConditionModel":
        return None
    count = getattr(module, "config", {}).get("layers_per_block")
    return count if isinstance(count, int) else None


def load_lora_(module: nn.Module, path: Path, component: str, *, is_meant: bool = False) -> bool:
    """Load a component's adapter from a file: into the adapter that is attached, or attaching one for inference.

    path: a LoRA file in any form that `read_lora` knows, a folder of peft's, or of a run.
    is_meant: the file was named for this component; otherwise one that names none is the first denoiser's.
    An attached adapter must agree with the file in layers, rank and kind; where the scale is another, `lora_B` takes it
    up, so that the adapter does what it did.
    Returns False, with nothing changed, where the file has adapters for other components only.
    Raises SourceError for a file that can't be read, isn't a LoRA, or doesn't fit.
    """
    adapters = _read_for(module, path, component if is_meant else None, component)
    if not adapters:
        return False
    _check_layers_exist(module, adapters, path)
    if not hasattr(module, "peft_config"):
        settings = _settings_from(adapters)
        attach_lora_(module, settings, component=component, seed=0, trains=False)
    attached = layer_adapters(module)
    ready = {
        name: adapter.folded(attached[name].scale) if name in attached else adapter
        for name, adapter in adapters.items()
    }
    offered = peft_state(ready, folded=False)
    _check_same_keys(offered, lora_state_dict(module), path)
    _fill_(module, offered, ADAPTER_NAME)
    return True


def load_preset_(module: nn.Module, path: Path, component: str) -> None:
    """Fill the attached preset from its file.   Raises SourceError where the file changed since the plan was made."""
    adapters = _read_for(module, path, component, component, keep_rank=True)
    offered = peft_state(adapters)
    attached = {
        _file_key(name, PRESET_NAME): parameter
        for name, parameter in module.named_parameters()
        if is_adapter_name(name) and f".{PRESET_NAME}." in f"{name}."
    }
    _check_same_keys(offered, attached, path)
    _fill_(module, offered, PRESET_NAME)


def _read_for(
    module: nn.Module, path: Path, meant: str | None, component: str, *, keep_rank: bool = False
) -> dict[str, LayerAdapter]:
    content = read_lora(
        path,
        families=families_of(type(module).__name__, component) or ("qwen_image",),
        component=meant,
        keep_rank=keep_rank,
        layers_per_block=layers_per_block(module),
    )
    here = {name for name, _ in module.named_modules()}
    return named_as_here(content.adapters.get(component, {}), here)


def _exact_families(component: str, module: nn.Module) -> list[str]:
    name = type(module).__name__
    return [
        family
        for family in families_of(name, component)
        if name in family_names(family).components[component].classes
    ]


def _settings_of(plan: LoraPlan) -> LoraSettings:
    return LoraSettings(
        plan.rank,
        plan.alpha,
        plan.dropout,
        plan.use_rslora,
        plan.use_dora,
        tuple(layer.name for layer in plan.layers),
    )


def _settings_from(adapters: Mapping[str, LayerAdapter]) -> LoraSettings:
    """Settings with which the attached adapter has the ranks and scales of these."""
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(a.scale * a.rank for a in adapters.values()).most_common(1)[0][0]
    return LoraSettings(
        rank=rank,
        alpha=alpha,
        dropout=0.0,
        use_rslora=False,
        use_dora=any(adapter.magnitude is not None for adapter in adapters.values()),
        layers=tuple(sorted(adapters)),
        ranks={n: a.rank for n, a in adapters.items() if a.rank != rank},
        alphas={n: a.scale * a.rank for n, a in adapters.items() if a.scale * a.rank != alpha},
    )


def _inject_(module: nn.Module, settings: LoraSettings, adapter_name: str) -> None:
    """Make peft's layers, without a look at the weights."""
    config: Any = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft says int, and divides
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in settings.ranks.items()},
        alpha_pattern={f"^{re.escape(name)}": alpha for name, alpha in settings.alphas.items()},
        # As an expression, because peft takes a list for name endings, which may mean more layers than these.
        target_modules="|".join(re.escape(name) for name in settings.layers),
    )
    with torch.random.fork_rng(devices=[]), described_weights(), warnings.catch_warnings():
        # A preset beside the adapter that trains is what is wanted.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, module, adapter_name=adapter_name)
    # From here on the exact names, so that what is written to files can be read by others.
    config.target_modules = set(settings.layers)


def _attach_preset_(module: nn.Module, preset: PresetPlan) -> None:
    """Put the frozen adapter under the one that trains; zeros, float32, and both active."""
    here = {name for name, _ in module.named_modules()}
    layers = [layer for layer in preset.layers if layer.name in here]
    if not layers:
        return
    rank = layers[0].rank
    settings = LoraSettings(
        rank=rank,
        alpha=rank,
        dropout=0.0,
        use_rslora=False,
        use_dora=preset.use_dora,
        layers=tuple(layer.name for layer in layers),
        ranks={layer.name: layer.rank for layer in layers},
        alphas={layer.name: layer.rank for layer in layers},
    )
    _inject_(module, settings, PRESET_NAME)
    for _, layer in lora_layers(module):
        if PRESET_NAME in layer.lora_A:
            for part in (layer.lora_A[PRESET_NAME], layer.lora_B[PRESET_NAME]):
                part.weight = nn.Parameter(torch.zeros_like(part.weight, dtype=torch.float32))
            if PRESET_NAME in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[PRESET_NAME]
                magnitude.weight = nn.Parameter(torch.ones_like(magnitude.weight).float())
        layer.set_adapter([n for n in (PRESET_NAME, ADAPTER_NAME) if n in layer.lora_A])


def _file_key(parameter_name: str, adapter_name: str = ADAPTER_NAME) -> str:
    key = parameter_name.replace(f".{adapter_name}.", ".").removesuffix(f".{adapter_name}")
    return key.removesuffix(".weight") if ".lora_magnitude_vector" in key else key


def _fill_(module: nn.Module, values: Mapping[str, Tensor], adapter_name: str) -> None:
    # peft leaves the name of the adapter and, for DoRA's magnitude, `.weight` out of the file's keys.
    targets = {
        _file_key(name, adapter_name): parameter
        for name, parameter in module.named_parameters()
        if is_adapter_name(name) and f".{adapter_name}." in f"{name}."
    }
    with torch.no_grad():
        for key, value in values.items():
            targets[key].copy_(value)


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


def _check_layers_exist(module: nn.Module, layers: Iterable[str], path: Path) -> None:
    names = {name for name, _ in module.named_modules()}
    unknown = [layer for layer in layers if layer not in names]
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
