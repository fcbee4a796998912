"""Builds the VRAM plan, for training and inference: configuration and file headers in, frozen data out."""

from __future__ import annotations

from collections.abc import Mapping

from framework.errors import ConfigError, Fault, SourceError
from framework.hub import ComponentHeaders, locate_headers, read_component_config
from framework.plan.component import ComponentBuilder
from framework.plan.native_names import check_contents
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
    """Plan a generation: text encoders are used and dropped before denoisers and VAE are loaded; all is frozen."""
    resident = inference_residents(model)
    return build_plan(
        model,
        purpose="infer",
        phases=tuple(resident),
        resident=resident,
        device=device,
    )


def inference_residents(model: ModelConfig) -> dict[Phase, tuple[str, ...]]:
    """Phase -> components that it holds in a generation."""
    spec = FAMILIES[model.family]
    return {
        "encode": _ordered(set(spec.text_encoders), model.components),
        "sample": _ordered({*spec.denoisers, "vae"}, model.components),
    }


def run_residents(config: RunConfig) -> dict[Phase, tuple[str, ...]]:
    """Phase -> components that it holds, in the order of the run; phases that the run doesn't have are left out.

    encode: with `data.cache`, the frozen encoders (a trained one gives other results after each step and is never
    cached).   train: what trains, a denoiser if it or a text encoder trains, and without cache the encoders.
    sample: denoisers and VAE, and text encoders that train; frozen ones have encoded the prompts by then.
    """
    components, spec = config.model.components, FAMILIES[config.model.family]
    trained = {name for name, part in components.items() if part.trainable != "none"}
    text_encoders = set(spec.text_encoders)
    trains_flow = bool(trained & {*spec.denoisers, *text_encoders})
    samples = bool(config.sample.prompts)
    # Training the VAE alone needs neither captions nor latents; samples need their prompts encoded.
    encoders = text_encoders if trains_flow or samples else set()
    if trains_flow:
        encoders = encoders | {"vae"}
    train = set(trained)
    if trains_flow:
        train.add(trained_denoiser(config.model))
    if not config.data.cache:
        train |= encoders
    # Captions are encoded by all text encoders together: one that trains needs the others at its side.
    if trained & text_encoders:
        train |= text_encoders
        encoders = encoders - text_encoders
    resident: dict[Phase, tuple[str, ...]] = {}
    if config.data.cache and encoders - trained:
        resident["encode"] = _ordered(encoders - trained, components)
    resident["train"] = _ordered(train, components)
    if samples:
        live_text = text_encoders if text_encoders & train else set()
        resident["sample"] = _ordered({*spec.denoisers, "vae"} | live_text, components)
    return resident


def trained_denoiser(model: ModelConfig) -> str:
    """The denoiser that a run's loss goes through: the one that trains, else the first."""
    names = FAMILIES[model.family].denoisers
    return next((n for n in names if model.components[n].trainable != "none"), names[0])


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
        part = spec.components[name]
        try:
            headers[name] = locate_headers(
                _source_of(model, name),
                part.subfolder,
                revision=model.revision,
                config_source=model.source,
                variant=model.variant,
            )
            check_kind(headers[name].place, part, model.family)
            check_contents(headers[name], part, name)
        except SourceError as error:
            own = model.components[name].source is not None
            errors.setdefault(
                str(error), (f"model.{name}.source" if own else "model.source", error)
            )
    if len(errors) == 1:
        raise next(iter(errors.values()))[1]
    if errors:
        raise ConfigError([_as_fault(path, error) for path, error in errors.values()])
    if model.variant is not None and all(found.variant is None for found in headers.values()):
        raise ConfigError([_unused_variant(model.variant)])
    return headers


def _unused_variant(variant: str) -> Fault:
    return Fault(
        path="model.variant",
        message=f'no component was published in a variant, so there is no "{variant}"',
        hint="Set it to null.",
        code="file",
        value=variant,
    )


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
