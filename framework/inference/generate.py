"""Make pictures from prompts with the plan, the storage and the loading that training uses too."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageOps

from framework.errors import ConfigError, Fault, SourceError
from framework.hub import locate_extra
from framework.inference.sheet import save_sample
from framework.models import Family, Sample, SampleSettings, TextConditioning, get_family
from framework.models.base import StepCallback, evaluating
from framework.plan.build import build_inference_plan
from framework.plan.fit import fitting
from framework.plan.types import Phase, VramPlan
from framework.runtime.adapters import load_lora_
from framework.runtime.devices import resolve_compute_dtype, resolve_device
from framework.runtime.error_budget import resolve_error_budget
from framework.runtime.fitting import fit_inference
from framework.runtime.forecast import forecast_inference
from framework.runtime.residency import Residency, Watch
from framework.schema.families import FAMILIES
from framework.schema.model import ModelConfig


def generate(
    model: ModelConfig,
    *,
    prompts: Sequence[str],
    settings: SampleSettings,
    negative_prompt: str = " ",
    lora: Path | None = None,
    on_progress: StepCallback | None = None,
    watch: Watch | None = None,
) -> list[Sample]:
    """Make one picture, or clip, per prompt; prompt i starts from the noise of seed + i.

    Text encoders are loaded, used and dropped before denoisers and VAE are loaded, so memory peaks at the larger phase.
    lora: a `.safetensors` file; used on each component that it has adapters for.
    on_progress: called with (steps done, steps in all).   watch: opened while a component's weights are read.
    Raises ConfigError (size, prompts), SourceError (checkpoint, LoRA) or PlanError before pictures
    are made.
    """
    family = get_family(model.family)
    _check_request(family, prompts, settings)
    pictures = [read_control(path) for path in settings.control_images]
    place = resolve_device(model.device)
    compute_dtype = resolve_compute_dtype(model.compute_dtype, place)
    load_family_extras(family, model)
    tokens = family.count_text_tokens([*prompts, negative_prompt])
    model = _fitted(model, settings, num_tokens=tokens, device=str(place))
    build_inference_plan(model, device=str(place))  # its faults are told before weights are read
    model, _ = resolve_error_budget(model, family, device=place, compute_dtype=compute_dtype)
    plan = _planned(model, settings, num_tokens=tokens, device=str(place))
    residency = Residency(plan, family, place, compute_dtype, settings.seed, watch=watch)
    try:
        used_lora = _enter_(residency, "encode", lora)
        encoders = {name: residency.modules[name] for name in family.spec.text_encoders}
        rows = encode_prompts(family, encoders, prompts, negative_prompt, settings, pictures)
        used_lora |= _enter_(residency, "sample", lora)
        if lora is not None and not used_lora:
            raise SourceError(
                "the LoRA has adapters for no component of this model",
                where=str(lora),
                hint="the LoRA was made for another model",
            )
        return sample_rows(
            family, rows, residency.modules, settings, controls=pictures, on_step=on_progress
        )
    finally:
        residency.release()


def _fitted(
    model: ModelConfig, settings: SampleSettings, *, num_tokens: int, device: str
) -> ModelConfig:
    """The model section with what `model.fit` chooses. Raises PlanError where nothing fits."""
    if model.fit is None:
        return model
    found = fit_inference(
        model,
        size_px=settings.size_px,
        num_tokens=num_tokens,
        guided=FAMILIES[model.family].guides(settings.guidance_scale),
        num_frames=settings.num_frames,
        device=device,
    )
    return fitting(found)[0]


def _planned(
    model: ModelConfig, settings: SampleSettings, *, num_tokens: int, device: str
) -> VramPlan:
    """The plan; below a limit a traced one, so that weights aren't kept where activations need the room."""
    plan = build_inference_plan(model, device=device)
    moves = any(group.moves for part in plan.components for group in part.groups)
    if plan.vram_limit_bytes is None or not moves:
        return plan
    return forecast_inference(
        model,
        size_px=settings.size_px,
        num_tokens=num_tokens,
        guided=FAMILIES[model.family].guides(settings.guidance_scale),
        num_frames=settings.num_frames,
        device=device,
    )


def _enter_(residency: Residency, phase: Phase, lora: Path | None) -> bool:
    """Load the phase's components and put the LoRA on those it is for; whether it is for any."""
    residency.enter(phase)
    if lora is None:
        return False
    names = residency.plan.phase(phase).components
    used = [load_lora_(residency.modules[name], lora, name) for name in names]
    return any(used)


def load_family_extras(family: Family, model: ModelConfig) -> None:
    """Find the checkpoint's tokenizers, scheduler and the like, and let the family read them."""
    family.load_extras(
        {
            name: locate_extra(model.source, folder, revision=model.revision)
            for name, folder in family.spec.extras.items()
        }
    )


def encode_prompts(
    family: Family,
    encoders: Mapping[str, torch.nn.Module],
    prompts: Sequence[str],
    negative_prompt: str,
    settings: SampleSettings,
    controls: Sequence[Image.Image] = (),
) -> list[tuple[TextConditioning, TextConditioning | None]]:
    """Encode prompts one by one, so that none depends on the others' padding, and, if guided, what leads away.

    controls: one per prompt, or none.   Returns (positive, negative) of each prompt.
    """
    guided = family.spec.guides(settings.guidance_scale)
    with torch.no_grad(), evaluating(list(encoders.values())):
        if not controls:
            negative = family.encode_text([negative_prompt], encoders) if guided else None
            return [(family.encode_text([prompt], encoders), negative) for prompt in prompts]
        rows = []
        for prompt, picture in zip(prompts, controls, strict=True):
            shown = [[picture]]
            positive = family.encode_text([prompt], encoders, controls=shown)
            negative = (
                family.encode_text([negative_prompt], encoders, controls=shown) if guided else None
            )
            rows.append((positive, negative))
        return rows


def sample_rows(
    family: Family,
    rows: Sequence[tuple[TextConditioning, TextConditioning | None]],
    modules: Mapping[str, torch.nn.Module],
    settings: SampleSettings,
    *,
    controls: Sequence[Image.Image] = (),
    on_step: StepCallback | None = None,
) -> list[Sample]:
    """Make one picture or clip of each encoded prompt; number i starts from the noise of seed + i.

    controls: one picture per prompt, or none.
    """
    if not controls:
        positive = TextConditioning.collate([row for row, _ in rows])
        return list(family.sample(positive, rows[0][1], modules, settings, on_step=on_step))
    made: list[Sample] = []
    for index, ((positive, negative), picture) in enumerate(zip(rows, controls, strict=True)):
        with torch.no_grad(), evaluating([modules["vae"]]):
            latents = (family.encode_control(picture, modules["vae"]),)
        done = index * settings.num_inference_steps

        def report(steps: int, total: int, done: int = done) -> None:
            if on_step is not None:
                on_step(done + steps, total * len(rows))

        made += family.sample(
            replace(positive, controls=latents),
            None if negative is None else replace(negative, controls=latents),
            modules,
            replace(settings, seed=settings.seed + index),
            on_step=report,
        )
    return made


def read_control(path: Path | str) -> Image.Image:
    """A control picture as RGB, turned upright. Raises SourceError for a file that is no picture."""
    file = Path(path).expanduser()
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError) as error:
        raise SourceError(
            "the control picture can't be read", where=str(file), found=str(error)
        ) from error


def write_images(
    images: Sequence[Sample],
    prompts: Sequence[str],
    out_dir: Path,
    *,
    settings: SampleSettings,
    source: str,
    lora: Path | None = None,
) -> list[Path]:
    """Write pictures as `0000.png`, `0001.png`, ... after the highest number in `out_dir`; none is overwritten.

    Each carries its prompt, seed, steps, guidance, model and LoRA as PNG text. Of a clip the PNG shows some
    frames, and the film itself lies beside it, `0000.webp`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        path = _reserve_next(out_dir)
        text = {
            "prompt": prompt,
            "seed": str(settings.seed + index),
            "num_inference_steps": str(settings.num_inference_steps),
            "guidance_scale": str(settings.guidance_scale),
            "model": source,
            "lora": str(lora or ""),
        }
        try:
            save_sample(image, path, text)
        except BaseException:
            path.unlink()
            raise
        paths.append(path)
    return paths


def _reserve_next(folder: Path) -> Path:
    """Create the next free numbered file, empty, so that a run beside this one takes another number."""
    numbers = [int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"(\d+)\.png", p.name))]
    number = max(numbers, default=-1) + 1
    while True:
        path = folder / f"{number:04d}.png"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            number += 1
        else:
            return path


def _check_request(family: Family, prompts: Sequence[str], settings: SampleSettings) -> None:
    faults = []
    divisor = family.spec.size_divisor_px
    if not prompts:
        faults.append(Fault("prompts", "there is no prompt"))
    wanted = len(prompts) if family.spec.num_controls else 0
    given = len(settings.control_images)
    if given != wanted:
        message = f"{given} control pictures for {len(prompts)} prompts; {family.spec.name} takes {wanted}"
        faults.append(Fault("control_images", message))
    for side in settings.size_px:
        if side <= 0 or side % divisor:
            lower = max(divisor, side // divisor * divisor)
            message = f"{side} px is no multiple of {divisor}"
            faults.append(Fault("size_px", message, nearest=(str(lower), str(lower + divisor))))
    if settings.num_inference_steps < 1:
        faults.append(Fault("num_inference_steps", "at least one step is needed"))
    if faults:
        raise ConfigError(faults)
