"""Holds names of layers against the checkpoint's headers, where they are on this disk; never asks the hub.

The plan's own code decides, so that what is said here and what a run does can't differ. Headers are read once for as
long as their files don't change, and each combination of settings is decided once, so that hundreds of configurations
of one checkpoint are judged quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from framework.errors import Fault, SourceError
from framework.hub import (
    REPOSITORY,
    ComponentFiles,
    ComponentHeaders,
    find_on_disk,
    read_headers,
)
from framework.inventory import read_file_header
from framework.judge.places import (
    Findings,
    nearest_entries,
    prepare_commands,
    source_fault,
)
from framework.plan.build import check_kind, run_residents
from framework.plan.component import ComponentBuilder
from framework.plan.native_names import check_contents
from framework.plan.types import LoraLayer
from framework.schema.families import FAMILIES
from framework.schema.model import ComponentConfig, LoraConfig
from framework.schema.run import RunConfig
from framework.schema.validate import Use

Signature = tuple[tuple[str, int, int], ...]

_NUM_NAMED = 3


@dataclass(frozen=True)
class ComponentCheck:
    """What a component's settings come to with its checkpoint: faults without `where`, and the layers that get LoRA."""

    faults: tuple[Fault, ...]
    lora_layers: tuple[LoraLayer, ...]


def check_layers(config: RunConfig, findings: Findings, *, use: Use) -> bool:
    """Note what doesn't fit the checkpoint. Returns whether every component that is used lies on this disk."""
    complete = True
    told: set[str] = set()
    for name in _needed(config, use):
        component = config.model.components[name]
        key = f"model.{name}.source" if component.source is not None else "model.source"
        source = component.source or config.model.source
        try:
            files = _files(config, name)
            if files is None:
                complete = False
                if source not in told:
                    told.add(source)
                    _not_here(source, key, findings)
                continue
            check = _check(files, config.model.family, name, _settings(component, use))
        except SourceError as error:
            complete = False
            if str(error) not in told:
                told.add(str(error))
                _note_source_error(error, source, key, findings)
            continue
        for fault in check.faults:
            findings.faults.append(replace(fault, where=findings.where(fault.path)))
        _warn_of_rank(name, component, check, findings)
    return complete


def resolved_lora_layers(
    config: RunConfig, name: str, component: ComponentConfig
) -> frozenset[str] | None:
    """Names of the layers that a component's adapter goes to; None where the checkpoint isn't on this disk."""
    try:
        files = _files(config, name)
        if files is None:
            return None
        check = _check(files, config.model.family, name, _settings(component, "train"))
    except SourceError:
        return None
    return frozenset(layer.name for layer in check.lora_layers)


def _needed(config: RunConfig, use: Use) -> list[str]:
    components = config.model.components
    if use == "generate":
        return list(components)
    held = {name for names in run_residents(config).values() for name in names}
    return [name for name in components if name in held]


def _files(config: RunConfig, name: str) -> ComponentFiles | None:
    source = config.model.components[name].source or config.model.source
    subfolder = FAMILIES[config.model.family].components[name].subfolder
    return find_on_disk(
        source,
        subfolder,
        revision=config.model.revision,
        config_source=config.model.source,
        variant=config.model.variant,
    )


def _settings(component: ComponentConfig, use: Use) -> ComponentConfig:
    """Only what decides about layers, so that configurations that differ in other things are decided together."""
    lora = component.lora or LoraConfig()
    trains = component.trainable
    if use == "generate":
        trains = "lora" if trains == "lora" and lora.init_from is not None else "none"
    return ComponentConfig(
        precision=component.precision,
        trainable=trains,
        fp8=component.fp8,
        lora=LoraConfig(target_modules=lora.target_modules),
    )


def _check(
    files: ComponentFiles, family: str, name: str, settings: ComponentConfig
) -> ComponentCheck:
    signature = signature_of(files.folder)
    if files.file is not None:
        signature += (_state_of(files.file),)
    return _decide(files, signature, family, name, settings)


@lru_cache(maxsize=1024)
def _decide(
    files: ComponentFiles, signature: Signature, family: str, name: str, settings: ComponentConfig
) -> ComponentCheck:
    """Resolve the patterns of one component as the plan does.   Raises SourceError for headers that can't be used."""
    spec = FAMILIES[family].components[name]
    builder = ComponentBuilder(
        name=name,
        config=settings,
        spec=spec,
        headers=_headers(files, signature, family, name),
        compute_dtype="bf16",
        purpose="train",
    )
    plan = builder.build(str(files.file or files.folder), None)
    if settings.precision == "fp8" and "*" in (settings.fp8.keep_high_precision or ()):
        # The rules have said that nothing would be stored in FP8.
        builder.faults = [f for f in builder.faults if f.path != f"model.{name}.precision"]
    return ComponentCheck(tuple(builder.faults), plan.lora.layers if plan.lora else ())


@lru_cache(maxsize=64)
def _headers(
    files: ComponentFiles, signature: Signature, family: str, name: str
) -> ComponentHeaders:
    spec = FAMILIES[family].components[name]
    check_kind(str(files.folder), spec, family)
    headers = read_headers(files)
    check_contents(headers, spec, name)
    return headers


def signature_of(folder: Path) -> Signature:
    """What changes whenever a header in this folder may have: names, times and sizes of its files."""
    found = []
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".json"):
            try:
                found.append(_state_of(file))
            except OSError:
                continue  # a link to nothing; reading it says so
    return tuple(sorted(found))


def _state_of(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return file.name, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=64)
def lora_file_ranks(file: Path, mtime_ns: int) -> dict[str, int]:
    """Component prefix -> rank of the adapters that a LoRA file holds.   Raises SourceError for a damaged file."""
    ranks: dict[str, int] = {}
    for key, tensor in read_file_header(file).items():
        if key.endswith(".lora_A.weight") and tensor.shape:
            ranks.setdefault(key.partition(".")[0], tensor.shape[0])
    return ranks


def _warn_of_rank(
    name: str, component: ComponentConfig, check: ComponentCheck, findings: Findings
) -> None:
    """An adapter of a rank above the smaller side of its layer has more parameters than the layer itself."""
    rank = (component.lora or LoraConfig()).rank
    small = [layer for layer in check.lora_layers if min(layer.shape[:2]) < rank]
    if not small:
        return
    outputs, inputs = small[0].shape[:2]
    least = min(min(layer.shape[:2]) for layer in small)
    findings.warn(
        f"model.{name}.lora.rank",
        f"rank {rank} is more than the smaller side of {len(small)} of {len(check.lora_layers)} layers that get an "
        f"adapter, e.g. {small[0].name} ({outputs} x {inputs}), whose update no higher rank can make richer",
        hint=f"Use model.{name}.lora.rank={least} or less, or target_modules without these layers.",
    )


def _not_here(source: str, key: str, findings: Findings) -> None:
    """A hub id whose files aren't here. Said only where a folder was probably meant."""
    if Path(source).expanduser().is_file():
        return  # a single file, whose config the hub has
    near = nearest_entries(source, (Path.cwd(), REPOSITORY), keep=Path.is_dir)
    made = prepare_commands(findings.where(key), source)
    if made:
        findings.missing(
            key,
            f'the model folder "{source}" does not exist',
            hint="",
            value=source,
            allowed="a folder in the published layout, or a hub id",
        )
    elif near:
        findings.warn(
            key,
            f'there is no folder "{source}" here, so it is taken for a repository on the hub',
            hint=f"If a folder was meant, write {key}={near[0]}.",
            code="file",
            nearest=near,
        )


def _note_source_error(error: SourceError, source: str, key: str, findings: Findings) -> None:
    """A checkpoint that can't be used is a fault; one that isn't here may be on another machine."""
    folder = Path(source).expanduser()
    here = any((base / folder).exists() for base in (Path.cwd(), REPOSITORY))
    if here:
        findings.faults.append(source_fault(key, error, findings.where, source))
        return
    is_file = folder.suffix == ".safetensors"
    hint = "a folder in the published layout, or a hub id such as Qwen/Qwen-Image."
    findings.missing(
        key,
        error.message,
        hint=error.hint if is_file else f"Correct it: {hint}",
        value=source,
        nearest=nearest_entries(
            source, (Path.cwd(), REPOSITORY), keep=Path.is_file if is_file else Path.is_dir
        ),
        allowed="a folder in the published layout, a hub id, or a .safetensors file",
    )
