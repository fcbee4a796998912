"""Make pictures from prompts with the plan, the storage and the loading that training uses too."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from framework.errors import ConfigError, Fault, SourceError
from framework.hub import locate_extra
from framework.inference.sheet import save_png
from framework.models import Family, SampleSettings, TextConditioning, get_family
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
) -> list[Image.Image]:
    """Make one picture per prompt; prompt i starts from the noise of seed + i.

    The text encoder is loaded, used and dropped before the DiT and the VAE are loaded, so memory
    peaks at the larger phase.
    lora: a `.safetensors` file; used on each component that it has adapters for.
    on_progress: called with (steps done, steps in all).   watch: opened while a component's weights are read.
    Raises ConfigError (size, prompts), SourceError (checkpoint, LoRA) or PlanError before pictures
    are made.
    """
    family = get_family(model.family)
    _check_request(family, prompts, settings)
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
        return _generate(residency, family, prompts, settings, negative_prompt, lora, on_progress)
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
        guided=settings.guidance_scale > 1,
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
        guided=settings.guidance_scale > 1,
        device=device,
    )


def _generate(
    residency: Residency,
    family: Family,
    prompts: Sequence[str],
    settings: SampleSettings,
    negative_prompt: str,
    lora: Path | None,
    on_progress: StepCallback | None,
) -> list[Image.Image]:
    used_lora = _enter_(residency, "encode", lora)
    positive, negative = encode_prompts(
        family, residency.modules["text_encoder"], prompts, negative_prompt, settings
    )
    used_lora |= _enter_(residency, "sample", lora)
    if lora is not None and not used_lora:
        raise SourceError(
            "the LoRA has adapters for no component of this model",
            where=str(lora),
            hint="keys must start with transformer., text_encoder. or vae.",
        )
    return family.sample(positive, negative, residency.modules, settings, on_step=on_progress)


def _enter_(residency: Residency, phase: Phase, lora: Path | None) -> bool:
    """Load the phase's components and put the LoRA on those it is for; whether it is for any."""
    residency.enter(phase)
    if lora is None:
        return False
    names = residency.plan.phase(phase).components
    used = [load_lora_(residency.modules[name], lora, name) for name in names]
    return any(used)


def load_family_extras(family: Family, model: ModelConfig) -> None:
    """Find the checkpoint's tokenizer and scheduler folders and let the family read them."""
    family.load_extras(
        locate_extra(model.source, "tokenizer", revision=model.revision),
        locate_extra(model.source, "scheduler", revision=model.revision),
    )


def encode_prompts(
    family: Family,
    text_encoder: torch.nn.Module,
    prompts: Sequence[str],
    negative_prompt: str,
    settings: SampleSettings,
) -> tuple[TextConditioning, TextConditioning | None]:
    """Encode prompts one by one (so that none depends on the others' padding) and, if guided, the negative one."""
    with torch.no_grad(), evaluating([text_encoder]):
        positive = TextConditioning.collate(
            [family.encode_text([prompt], text_encoder) for prompt in prompts]
        )
        guided = settings.guidance_scale > 1
        negative = family.encode_text([negative_prompt], text_encoder) if guided else None
    return positive, negative


def write_images(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    out_dir: Path,
    *,
    settings: SampleSettings,
    source: str,
    lora: Path | None = None,
) -> list[Path]:
    """Write pictures as `0000.png`, `0001.png`, ... after the highest number in `out_dir`; none is overwritten.

    Each carries its prompt, seed, steps, guidance, model and LoRA as PNG text.
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
            save_png(image, path, text)
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
    for side in settings.size_px:
        if side <= 0 or side % divisor:
            lower = max(divisor, side // divisor * divisor)
            message = f"{side} px is no multiple of {divisor}"
            faults.append(Fault("size_px", message, nearest=(str(lower), str(lower + divisor))))
    if settings.num_inference_steps < 1:
        faults.append(Fault("num_inference_steps", "at least one step is needed"))
    if faults:
        raise ConfigError(faults)
