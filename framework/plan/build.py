"""Builds the VRAM plan, for training and inference: configuration and file headers in, frozen data out."""

from __future__ import annotations

from collections.abc import Mapping

from framework.errors import ConfigError, Fault, SourceError
from framework.hub import ComponentHeaders, locate_headers, read_component_config
from framework.plan.component import ComponentBuilder
from framework.plan.phases import plan_phases
from framework.plan.types import Phase, Purpose, VramPlan
from framework.schema.families import FAMILIES, ComponentSpec
from framework.schema.model import ModelConfig
from framework.schema.run import OptimConfig, RunConfig


def build_plan(
    model: ModelConfig,
    *,
    purpose: Purpose,
    phases: tuple[Phase, ...],
    resident: Mapping[Phase, tuple[str, ...]],
    device: str,
    optim: OptimConfig | None = None,
) -> VramPlan:
    """Say where every weight of `model` will rest, in which form it computes, and what each phase holds.

    phases: in the order of the run.   resident: the components that each of them needs.
    device: "cpu", "cuda:0", ... as a label; nothing is asked of it.   optim: counts optimizer state and EMA.
    Reads headers only.   Raises SourceError for files that can't be used and ConfigError for settings that don't
    fit the checkpoint; where several things are wrong, all are in one ConfigError.
    """
    spec = FAMILIES[model.family]
    needed = [name for name in model.components if any(name in resident[phase] for phase in phases)]
    headers = _locate_all(model, needed)
    faults: list[Fault] = []
    components = []
    for name in needed:
        builder = ComponentBuilder(
            name=name,
            config=model.components[name],
            spec=spec.components[name],
            headers=headers[name],
            compute_dtype=model.compute_dtype,
            purpose=purpose,
            converted_dir=model.converted_dir,
        )
        components.append(builder.build(_source_of(model, name), optim))
        faults += builder.faults
    if faults:
        raise ConfigError(faults)
    vram_limit_bytes = None if model.vram_limit is None else int(model.vram_limit * 2**30)
    return VramPlan(
        purpose=purpose,
        family=model.family,
        compute_dtype=model.compute_dtype,
        device=device,
        vram_limit_bytes=vram_limit_bytes,
        components=tuple(components),
        phases=plan_phases(
            phases, resident, components, device=device, vram_limit_bytes=vram_limit_bytes
        ),
    )


def build_run_plan(config: RunConfig, *, device: str) -> VramPlan:
    """Plan a training run: which phases it has and which components each of them holds."""
    resident = run_residents(config)
    return build_plan(
        config.model,
        purpose="train",
        phases=tuple(resident),
        resident=resident,
        device=device,
        optim=config.optim,
    )


def build_inference_plan(model: ModelConfig, *, device: str) -> VramPlan:
    """Plan a generation: the text encoder is used and dropped before DiT and VAE are loaded; everything is frozen."""
    return build_plan(
        model,
        purpose="infer",
        phases=("encode", "sample"),
        resident={"encode": ("text_encoder",), "sample": ("dit", "vae")},
        device=device,
    )


def run_residents(config: RunConfig) -> dict[Phase, tuple[str, ...]]:
    """Phase -> components that it holds, in the order of the run; phases that the run doesn't have are left out.

    encode: with `data.cache`, the frozen encoders (a trained one gives other results after each step and is never
    cached).   train: what trains, the DiT if it or the text encoder trains, and without cache the encoders.
    sample: DiT and VAE, and a text encoder that trains; a frozen one has encoded the prompts by then.
    """
    components = config.model.components
    trained = {name for name, part in components.items() if part.trainable != "none"}
    trains_flow = bool(trained & {"dit", "text_encoder"})
    samples = bool(config.sample.prompts)
    # Training the VAE alone needs neither captions nor latents; samples need their prompts encoded.
    encoders = {
        name
        for name, used in (("text_encoder", trains_flow or samples), ("vae", trains_flow))
        if used
    }
    train = set(trained)
    if trains_flow:
        train.add("dit")
    if not config.data.cache:
        train |= encoders
    resident: dict[Phase, tuple[str, ...]] = {}
    if config.data.cache and encoders - trained:
        resident["encode"] = _ordered(encoders - trained, components)
    resident["train"] = _ordered(train, components)
    if samples:
        live_text = "text_encoder" in train
        resident["sample"] = _ordered(
            {"dit", "vae"} | ({"text_encoder"} if live_text else set()), components
        )
    return resident


def _ordered(names: set[str], components: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(name for name in components if name in names)


def _source_of(model: ModelConfig, name: str) -> str:
    return model.components[name].source or model.source


def _locate_all(model: ModelConfig, names: list[str]) -> dict[str, ComponentHeaders]:
    """Headers of every component; several different source errors become one report."""
    spec = FAMILIES[model.family]
    headers: dict[str, ComponentHeaders] = {}
    errors: dict[str, tuple[str, SourceError]] = {}
    for name in names:
        try:
            headers[name] = locate_headers(
                _source_of(model, name), spec.components[name].subfolder, revision=model.revision
            )
            check_kind(headers[name].place, spec.components[name], model.family)
        except SourceError as error:
            own = model.components[name].source is not None
            errors.setdefault(
                str(error), (f"model.{name}.source" if own else "model.source", error)
            )
    if len(errors) == 1:
        raise next(iter(errors.values()))[1]
    if errors:
        raise ConfigError([_as_fault(path, error) for path, error in errors.values()])
    return headers


def check_kind(place: str, spec: ComponentSpec, family: str) -> None:
    """Refuse another model before its weights are fetched; what its config doesn't say, the family checks later."""
    key, expected = spec.kind
    found = read_component_config(place).get(key, expected)
    if found != expected:
        raise SourceError(
            f"this is no {expected}",
            where=place,
            found=f"{key}: {found!r}",
            hint=f"`source` must be a checkpoint of the family {family}",
        )


def _as_fault(path: str, error: SourceError) -> Fault:
    details = "; ".join(part for part in (error.where, error.found) if part)
    return Fault(
        path=path,
        message=f"{error.message} ({details})" if details else error.message,
        hint=error.hint,
        code="file",
    )
