"""ai-toolkit's YAML files as recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import yaml

from framework.migrate.ai_toolkit_model import set_model, set_storage, set_trained
from framework.migrate.draft import Draft
from framework.migrate.flags import read_table
from framework.migrate.given import Given
from framework.migrate.shared import (
    set_checkpoints,
    set_optimizer,
    set_prompts,
    set_run,
    set_schedule,
    set_sources,
    set_steps,
)

_LISTS = ("datasets",)
_CACHES = (
    "datasets.cache_latents", "datasets.cache_latents_to_disk", "datasets.cache_text_embeddings",
    "datasets.cache_tensors_to_disk", "datasets.cache_latents_num_workers",
)  # fmt: skip
_CONTROLS = (
    "datasets.control_path", "datasets.control_path_1", "datasets.control_path_2", "datasets.control_path_3",
    "datasets.control_from_same_folder", "datasets.full_size_control_images",
    "datasets.control_transparent_color", "datasets.controls",
)  # fmt: skip
_TIMESTEPS = {
    "sigmoid": ("logit_normal", 1.0),
    "linear": ("uniform", 1.0),
    "weighted": ("uniform", 1.0),
    "shift": ("uniform", "scheduler"),
    "flux_shift": ("uniform", "scheduler"),
    "lumina2_shift": ("uniform", "scheduler"),
}
_LOSSES = {"mse": "mse", "pseudo_huber": "huber"}


def migrate_yaml(text: str, *, where: str, family: str) -> list[Draft]:
    """Make a recipe of each process of a job.   text: the file's content, YAML or JSON.   where: for faults."""
    draft = Draft()
    config = _config(draft, text, where)
    if draft.faults:
        return [draft]
    processes = config["process"]
    return [_migrate_process(config, each, where, family) for each in processes]


def _config(draft: Draft, text: str, where: str) -> dict[str, Any]:
    content: Any = None
    message = "has no `config` with a list `process`, so it isn't a job of ai-toolkit"
    try:
        content = yaml.safe_load(_with_environment(text))
    except yaml.YAMLError as error:
        message = f"not readable as YAML: {' '.join(str(error).split())}"
    config = content.get("config") if isinstance(content, dict) else None
    if isinstance(config, dict):
        processes = config.get("process")
        if isinstance(processes, list) and all(isinstance(p, dict) for p in processes):
            return config
    draft.refuse(where, message, hint="Give the file that `run.py` takes.", where=where)
    return {}


def _with_environment(text: str) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], found[0]), text)


def _migrate_process(
    config: Mapping[str, Any], process: Mapping[str, Any], where: str, family: str
) -> Draft:
    table, draft = read_table("ai-toolkit"), Draft()
    listed = process.get("datasets")
    listed = listed if isinstance(listed, list) else []
    datasets = [each for each in listed if isinstance(each, dict)]
    values = {"name": config.get("name"), **_flattened(process)}
    for each in reversed(datasets):
        values |= {f"datasets.{key}": value for key, value in each.items()}
    given = Given(values, table, draft, where)
    family = set_model(given, family)
    if family:
        set_trained(given, family)
        set_storage(given)
        _set_objective(given, family)
        steps = _set_length(given)
        _set_data(given, datasets, family)
        _set_optim(given, steps)
        _set_rest(given, family)
    given.settle_rest()
    return draft


def _flattened(process: Mapping[str, Any]) -> dict[str, Any]:
    """Keys below a process with the name of their section in front, e.g. "train.steps"."""
    flat: dict[str, Any] = {}
    for key, value in process.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": each for name, each in value.items()}
        elif key not in _LISTS:
            flat[key] = value
    return flat


def _set_length(given: Given) -> int:
    draft, steps = given.draft, given.whole("train.steps", 1000) or 1000
    source = given.source("train.steps")
    batches = given.whole("train.gradient_accumulation", 1) or 1
    old = given.whole("train.gradient_accumulation_steps", 1) or 1
    if old > 1:
        steps, source = -(-steps // old), f"{source} / gradient_accumulation_steps {old}"
    accumulation = max(batches, old, 1)
    if accumulation > 1:
        name = "gradient_accumulation_steps" if old > 1 else "gradient_accumulation"
        draft.set_("trainer.accumulate_grad_batches", accumulation, given.source(f"train.{name}"))
    set_steps(draft, steps, source)
    return max(1, steps)


def _set_data(given: Given, datasets: list[dict[str, Any]], family: str) -> None:
    draft, sources, areas = given.draft, [], []
    for each in datasets:
        place = each.get("folder_path") or each.get("dataset_path")
        if not place:
            continue
        if each.get("is_reg"):
            draft.note(
                "lost",
                f"datasets.is_reg {place}",
                "There are no regularisation pictures; it is left out.",
            )
            continue
        repeats = given.as_number("datasets.num_repeats", each.get("num_repeats") or 1)
        sources.append((str(place), int(repeats or 1)))
        sides = each.get("resolution", 512)
        sides = sides if isinstance(sides, list) else [sides]
        areas += [int(given.as_number("datasets.resolution", s) or 512) ** 2 for s in sides]
    given.taken |= {"datasets.folder_path", "datasets.dataset_path", "datasets.num_repeats"}
    given.taken |= {"datasets.is_reg", "datasets.resolution", "train.batch_size"}
    set_sources(draft, sources, "datasets.folder_path")
    source = given.source("datasets.resolution")
    if areas:
        draft.set_("data.max_px", max(areas), f"{source}, a side")
        row = given.table.row("datasets.resolution")
        draft.note("changed", "datasets.resolution", row.note if row else "")
        if len(set(areas)) > 1:
            text = f"Each picture trains at one size, at most {max(areas)} pixels."
            draft.note("lost", source, text)
    batch = given.whole("datasets.batch_size") or given.whole("train.batch_size", 1) or 1
    draft.set_("data.batch_size", batch, given.source("train.batch_size"))
    rate = given.number("datasets.caption_dropout_rate")
    if rate:
        draft.set_("data.caption_dropout", rate, given.source("datasets.caption_dropout_rate"))
    if any(given.is_on(name) for name in _CACHES):
        draft.set_("data.cache", True, "cache_latents")
    suffix = f".{given.text('datasets.caption_ext', '.txt').lstrip('.')}"
    if suffix not in (".txt", ".caption"):
        draft.note("check", "datasets.caption_ext", "Captions must lie in .txt files.")
    if any(given.has(name) for name in _CONTROLS):
        row = given.table.row("datasets.control_path")
        draft.note("check", "datasets.control_path", row.note if row else "")
    given.taken |= {*_CONTROLS, *_CACHES}
    _set_clips(given, family)


def _set_clips(given: Given, family: str) -> None:
    frames, rate = given.whole("datasets.num_frames"), given.number("datasets.fps")
    if family.startswith("wan"):
        given.draft.set_("data.num_frames", frames or 1, given.source("datasets.num_frames"))
        if rate:
            given.draft.set_("data.fps", rate, given.source("datasets.fps"))
    workers = given.whole("datasets.num_workers")
    if workers:
        given.draft.set_("data.num_workers", workers, given.source("datasets.num_workers"))


def _set_objective(given: Given, family: str) -> None:
    draft = given.draft
    given.take("train.noise_scheduler")
    if family == "sdxl":
        draft.set_("objective.name", "ddpm", "SDXL predicts noise")
        given.taken |= {"train.timestep_type", "train.linear_timesteps", "train.linear_timesteps2"}
        gamma = given.number("train.min_snr_gamma") or given.number("train.snr_gamma")
        if gamma:
            draft.set_("objective.min_snr_gamma", gamma, given.source("train.min_snr_gamma"))
        if offset := given.number("train.noise_offset"):
            draft.set_("objective.noise_offset", offset, given.source("train.noise_offset"))
    else:
        draft.set_("objective.name", "flow_matching", given.source("train.noise_scheduler"))
        _set_sampling(given)
        for name in ("train.min_snr_gamma", "train.snr_gamma", "train.noise_offset"):
            if given.number(name):
                draft.note("lost", name, "It is for models that predict noise.")
    loss = given.text("train.loss_type", "mse")
    if loss in _LOSSES:
        draft.set_("objective.loss", _LOSSES[loss], given.source("train.loss_type"))
        if loss != "mse":
            draft.set_("objective.huber_delta", 0.01, "the width of pseudo_huber")
    else:
        draft.note("lost", "train.loss_type", f"'{loss}' isn't offered; mse and huber are.")
    if given.text("train.content_or_style", "balanced") != "balanced":
        row = given.table.row("train.content_or_style")
        draft.note("lost", "train.content_or_style", row.note if row else "")
    _set_limits(given)


def _set_sampling(given: Given) -> None:
    draft, kind = given.draft, given.text("train.timestep_type", "sigmoid")
    source = given.source("train.timestep_type")
    if given.is_on("train.linear_timesteps") or given.is_on("train.linear_timesteps2"):
        kind, source = "weighted", "linear_timesteps"
    if kind not in _TIMESTEPS:
        draft.note("lost", "train.timestep_type", f"'{kind}' isn't offered; sigmoid is written.")
    sampling, shift = _TIMESTEPS.get(kind, _TIMESTEPS["sigmoid"])
    draft.set_("objective.timestep_sampling", sampling, source)
    draft.set_("objective.shift", shift, source)
    if kind == "weighted":
        draft.note(
            "lost", source, "Its weights of noise levels have no counterpart; all count alike."
        )


def _set_limits(given: Given) -> None:
    """Indices of the schedule, 0 the noisiest, as noise levels before a shift."""
    low, high = given.whole("train.min_denoising_steps"), given.whole("train.max_denoising_steps")
    if low:
        source = given.source("train.min_denoising_steps")
        given.draft.set_("objective.sigma_max", round(1 - low / 1000, 4), source)
    if high is not None and high < 999:
        source = given.source("train.max_denoising_steps")
        given.draft.set_("objective.sigma_min", round(1 - (high + 1) / 1000, 4), source)
    if low or (high is not None and high < 999):
        row = given.table.row("train.min_denoising_steps")
        given.draft.note("changed", "train.min_denoising_steps", row.note if row else "")


def _set_optim(given: Given, steps: int) -> None:
    draft = given.draft
    name = "train.unet_lr" if given.has("train.unet_lr") else "train.lr"
    rate = given.number(name, 1e-6)
    given.taken |= {"train.lr", "train.unet_lr"}
    optimizer = set_optimizer(given, "train.optimizer")
    if optimizer == "prodigy" and rate is not None and rate < 0.1:
        rate = 1.0
        draft.note("changed", name, "With prodigy a rate below 0.1 becomes 1 there.")
    draft.set_("optim.lr", rate, given.source(name))
    params = given.take("train.optimizer_params")
    for key, value in (params if isinstance(params, dict) else {}).items():
        if key == "weight_decay":
            decay = given.as_number(f"train.optimizer_params.{key}", value)
            draft.set_("optim.weight_decay", decay, f"optimizer_params.{key}")
        elif key == "betas" and isinstance(value, list) and len(value) == 2:
            betas = [given.as_number(f"train.optimizer_params.{key}", each) for each in value]
            draft.set_("optim.betas", betas, f"optimizer_params.{key}")
        else:
            draft.note("lost", f"train.optimizer_params.{key}", "It can't be set.")
    schedule = given.take("train.lr_scheduler_params")
    schedule = schedule if isinstance(schedule, dict) else {}
    default = 1000 if given.text("train.lr_scheduler") == "constant_with_warmup" else None
    warmup = Given(
        {"warmup": schedule.get("num_warmup_steps", default), "name": given.take("train.lr_scheduler")},
        given.table, draft, given.where,
    )  # fmt: skip
    set_schedule(warmup, "name", "warmup", steps)
    for key in schedule:
        if key != "num_warmup_steps":
            draft.note("lost", f"train.lr_scheduler_params.{key}", "It can't be set.")
    if given.is_on("train.max_grad_norm"):
        norm = given.number("train.max_grad_norm")
        draft.set_("trainer.gradient_clip_val", norm or None, given.source("train.max_grad_norm"))


def _set_rest(given: Given, family: str) -> None:
    draft = given.draft
    set_run(given, "training_folder", name="name")
    device = given.text("device", "cuda:0")
    if device not in ("cuda", "cuda:0"):
        draft.set_("model.device", device, given.source("device"))
    every, keep = given.whole("save.save_every"), given.whole("save.max_step_saves_to_keep")
    set_checkpoints(draft, every, given.source("save.save_every"), keep)
    draft.set_("export.formats", ["diffusers"], "the names that LoRA files have there")
    ema = given.take("train.ema_config")
    if isinstance(ema, dict) and ema.get("use_ema"):
        decay = given.as_number("train.ema_config", ema.get("ema_decay", 0.999))
        draft.set_("optim.ema.decay", decay, "train.ema_config")
    project = given.text("logging.project_name", "ai-toolkit")
    if given.is_on("logging.use_wandb"):
        draft.set_("logger.wandb.project", project, given.source("logging.project_name"))
    _set_samples(given, family)


def _set_samples(given: Given, family: str) -> None:
    draft = given.draft
    listed = given.take("sample.samples") or given.take("sample.prompts")
    listed = listed if isinstance(listed, list) else []
    given.taken |= {"sample.samples", "sample.prompts"}
    texts = [str(e.get("prompt", "")) if isinstance(e, dict) else str(e) for e in listed]
    texts = [text.partition(" --")[0].strip() for text in texts]
    texts = [text.replace("[trigger]", given.text("trigger_word")) for text in texts if text]
    if given.has("trigger_word"):
        given.taken.discard("trigger_word")
    off = given.is_on("train.disable_sampling")
    every = given.whole("sample.sample_every", 100)
    set_prompts(draft, [] if off else texts, every, family, source="sample.prompts")
    if draft.value("sample.prompts"):
        width, height = given.whole("sample.width", 512), given.whole("sample.height", 512)
        source = given.source("sample.width", "sample.height")
        draft.set_("sample.size_px", [width, height], source)
        if given.text("sample.neg"):
            draft.set_("sample.negative_prompt", given.text("sample.neg"), "sample.neg")
    given.taken |= {"sample.width", "sample.height", "sample.neg"}
    given.taken |= {"train.skip_first_sample", "train.force_first_sample"}
    if any(isinstance(e, dict) and len(e) > 1 for e in listed):
        draft.note(
            "lost",
            "sample.samples",
            "Options of single samples; all have the size, seed and steps of `sample`.",
        )
