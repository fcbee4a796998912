"""Rules that follow from what a model family is: which components it has, what it makes, what it was trained with."""

from __future__ import annotations

from collections.abc import Iterator

from framework.schema.families import FAMILIES, FamilySpec
from framework.schema.findings import Finding, Judged


def check_family(judged: Judged, *, trains: bool) -> Iterator[Finding]:
    """What the family of the model doesn't have or can't do.   trains: False for generation."""
    spec = FAMILIES[judged.config.model.family]
    yield from _foreign_sections(judged, spec)
    yield from _frames(judged, spec)
    yield from _controls(judged, spec)
    if trains:
        yield from _experts(judged, spec)
        yield from _objective(judged, spec)


def _foreign_sections(judged: Judged, spec: FamilySpec) -> Iterator[Finding]:
    for name in judged.config.model.foreign_sections:
        yield judged.finding(
            f"model.{name}",
            f"{spec.name} has no component {name}",
            nearest=tuple(n for n in spec.components if name.startswith(n)),
            hint=f"Remove the section (model.{name}=null); the components of {spec.name} are {', '.join(spec.components)}.",
            reads=("model.family",),
            allowed=f"null for {spec.name}",
        )


def _experts(judged: Judged, spec: FamilySpec) -> Iterator[Finding]:
    components = judged.config.model.components
    trained = [name for name in spec.denoisers if components[name].trainable != "none"]
    if len(trained) > 1:
        path = f"model.{trained[-1]}.trainable"
        yield judged.finding(
            path,
            f"{' and '.join(trained)} can't train in one run: each sees its own noise levels only, so a batch would have "
            "to be split between them and both be held in memory",
            hint=f"Make two runs, one with {path}=none and one with model.{trained[0]}.trainable=none.",
            reads=tuple(f"model.{name}.trainable" for name in trained),
            allowed="one denoiser per run",
        )


def _objective(judged: Judged, spec: FamilySpec) -> Iterator[Finding]:
    objective = judged.config.objective
    found = objective.name
    fitting = ("ddpm",) if spec.objective == "ddpm" else ("flow_matching", "direct_distill")
    if found not in fitting:
        yield judged.finding(
            "objective.name",
            f"{spec.name} was trained with {spec.objective}, not with {found}",
            nearest=fitting[:1],
            hint=f"Take the group that fits: objective={fitting[0]}.",
            reads=("model.family",),
            allowed=" or ".join(fitting),
        )
    if objective.sigma_min >= objective.sigma_max:
        yield judged.finding(
            "objective.sigma_min",
            f"no noise level is above {objective.sigma_min:g} and below objective.sigma_max={objective.sigma_max:g}",
            hint="Make it smaller than objective.sigma_max.",
            reads=("objective.sigma_max",),
            allowed=f"less than {objective.sigma_max:g}",
        )


def _frames(judged: Judged, spec: FamilySpec) -> Iterator[Finding]:
    frames = judged.config.sample.num_frames
    if spec.media == "image" and frames != 1:
        yield judged.finding(
            "sample.num_frames",
            f"{spec.name} makes pictures, not clips",
            hint="Remove it (sample.num_frames=1).",
            reads=("model.family",),
            allowed=f"1 for {spec.name}",
        )
    if spec.media == "video" and frames % spec.frame_divisor != 1 % spec.frame_divisor:
        below = (frames - 1) // spec.frame_divisor * spec.frame_divisor + 1
        yield judged.finding(
            "sample.num_frames",
            f"{frames} isn't a multiple of {spec.frame_divisor} plus one, which {spec.name} needs",
            nearest=(str(below), str(below + spec.frame_divisor)),
            hint=f"Write sample.num_frames={below}.",
            reads=("model.family",),
            allowed=f"a multiple of {spec.frame_divisor}, plus one",
        )


def _controls(judged: Judged, spec: FamilySpec) -> Iterator[Finding]:
    sample = judged.config.sample
    wanted = len(sample.prompts) if spec.num_controls else 0
    if len(sample.control_images) == wanted:
        return
    if not wanted:
        message, hint = (
            f"{spec.name} takes no control pictures"
            if sample.prompts
            else "there is no prompt to go with them",
            "Remove them (sample.control_images=[]).",
        )
    else:
        message = f"{len(sample.control_images)} control pictures for {wanted} prompts; {spec.name} needs one for each"
        hint = "List one file per prompt, in the order of sample.prompts."
    yield judged.finding(
        "sample.control_images",
        message,
        hint=hint,
        reads=("sample.prompts", "model.family"),
        allowed=f"{wanted} files",
    )
