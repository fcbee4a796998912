"""What trains in DiffSynth-Studio's commands, and where each component's weights come from and rest."""

from __future__ import annotations

import json
import re
from typing import Any

from framework.migrate.given import Given
from framework.migrate.models import (
    ModelFile,
    component_of,
    known_checkpoint,
    layer_names,
    set_files,
    unknown_model,
)

_PIPELINE_PARTS = {
    "dit": "dit",
    "dit2": "dit_2",
    "unet": "dit",
    "text_encoder": "text_encoder",
    "text_encoder_1": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae": "vae",
}
_WAN = ("wan2_1", "wan2_2")
DEFAULT_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


def model_files(given: Given) -> list[ModelFile]:
    """The files that the two model flags name."""
    files = []
    for entry in given.words("model_id_with_origin_paths"):
        repository, colon, pattern = entry.rpartition(":")
        if not colon:
            repository, pattern = entry, ""
        files.append(ModelFile(repository, pattern, component_of(pattern) or "dit"))
    for item in json_list(given.text("model_paths")):
        first = item[0] if isinstance(item, list) and item else item
        files.append(ModelFile("", str(first), component_of(str(first))))
        if isinstance(item, list) and len(item) > 1:
            text = f"{len(item)} shards; give the folder that holds them, with their index."
            given.draft.note("check", "--model_paths", text)
    return files


def json_list(text: str) -> list[Any]:
    """A JSON list; a text with commas where it is none, as a shell leaves it that took the quotes away."""
    if not text:
        return []
    try:
        content = json.loads(text)
    except ValueError:
        return [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    return content if isinstance(content, list) else [content]


def set_model(given: Given, family: str) -> str:
    """Write family and sources; returns the family, "" where none can be told, which is a fault."""
    draft, files = given.draft, model_files(given)
    name = "--model_paths" if given.has("model_paths") else "--model_id_with_origin_paths"
    if not files:
        draft.refuse(
            name,
            "the command names no model, so that no recipe can be made",
            hint="Give the whole command, with --model_id_with_origin_paths or --model_paths.",
            where=given.where,
        )
        return ""
    found = set_files(draft, files, name, family=family)
    if not found:
        main = next((f for f in files if f.component in ("dit", "dit_2")), files[0])
        unknown_model(draft, name, given.where, main.repository or main.pattern)
        return ""
    is_edit = "edit_image" in given.words("extra_inputs")
    if is_edit and found == "qwen_image":
        found = "qwen_image_edit"
        draft.set_("model.family", found, "--extra_inputs edit_image")
        draft.note(
            "check",
            name,
            "model.source must be an editing checkpoint, e.g. Qwen/Qwen-Image-Edit-2509.",
        )
    if any(known_checkpoint(f.repository) is None for f in files if f.repository):
        draft.note(
            "check", name, "The ids are ModelScope's; an id may be missing on the Hugging Face hub."
        )
    dtype = "fp32" if found == "sdxl" else "bf16"
    draft.set_("model.compute_dtype", dtype, "the pipeline's type there")
    return found


def set_trained(given: Given, family: str) -> list[str]:
    """Write what trains; returns the components."""
    draft, full = given.draft, given.words("trainable_models")
    lora = given.words("lora_base_model")
    low_noise = any(f.component == "dit_2" for f in model_files(given))
    trained = []
    for name, kind, flag in [
        *((n, "full", "trainable_models") for n in full),
        *((n, "lora", "lora_base_model") for n in lora),
    ]:
        component = _PIPELINE_PARTS.get(name.split(".")[0], "")
        if not component or "." in name:
            text = f"'{name}' isn't a component of the family; only whole components train."
            draft.note("lost", given.shown(flag), text)
            continue
        if component == "dit" and family == "wan2_2" and low_noise:
            component = "dit_2"
            draft.note("changed", given.shown(flag), "The low-noise expert is the component dit_2.")
        draft.set_(f"model.{component}.trainable", kind, given.source(flag))
        trained.append(component)
        if kind == "lora":
            _set_lora(given, component, family)
    if given.has("lora_base_model") and not lora:
        draft.note(
            "lost", "--lora_base_model", "An empty text means the whole pipeline; name a component."
        )
    if not trained:
        draft.refuse(
            "--trainable_models, --lora_base_model",
            f"nothing that the family {family} has is trained, so that no recipe can be made",
            hint="Components are dit, text_encoder and vae; ControlNets and other adapters can't be trained.",
            where=given.where,
        )
    for component in trained:
        path = f"model.{component}.gradient_checkpointing"
        _set_checkpointing(given, path, family, component)
    return trained


def _set_lora(given: Given, component: str, family: str) -> None:
    draft, path = given.draft, f"model.{component}.lora"
    rank = given.whole("lora_rank", 32)
    draft.set_(f"{path}.rank", rank, given.source("lora_rank"))
    draft.set_(f"{path}.alpha", float(rank or 32), "alpha is the rank there")
    given.take("lora_target_modules")
    if given.text("lora_target_modules", "-") == "":
        draft.note(
            "changed",
            "--lora_target_modules",
            "Empty means every large Linear there, the family's list here.",
        )
    else:
        names = given.words("lora_target_modules") or list(DEFAULT_TARGETS)
        here = layer_names(names, family)
        draft.set_(f"{path}.target_modules", here, given.source("lora_target_modules"))
        if here != names:
            draft.note(
                "changed",
                "--lora_target_modules",
                "Layers have diffusers' names here; they are translated.",
            )
        if len(names) == 1:
            text = "A single name is a regular expression over whole names there; here it is a name ending."
            draft.note("check", "--lora_target_modules", text)
    if given.has("lora_checkpoint"):
        draft.set_(f"{path}.init_from", given.text("lora_checkpoint"), "--lora_checkpoint")
    if given.has("preset_lora_path"):
        preset = _PIPELINE_PARTS.get(given.text("preset_lora_model", "dit"), component)
        draft.set_(
            f"model.{preset}.lora.preset", given.text("preset_lora_path"), "--preset_lora_path"
        )
        if preset != component:
            text = f"It lies under the LoRA of {preset}, which must train one itself here."
            draft.note("check", "--preset_lora_model", text)
    given.take("preset_lora_model")


def _set_checkpointing(given: Given, path: str, family: str, component: str) -> None:
    plain = given.is_on("use_gradient_checkpointing")
    offload = given.is_on("use_gradient_checkpointing_offload")
    if component not in ("dit", "dit_2"):
        return
    if offload:
        row = given.table.row("use_gradient_checkpointing_offload")
        given.draft.note("changed", "--use_gradient_checkpointing_offload", row.note if row else "")
    if plain or offload or family in _WAN:
        used = "use_gradient_checkpointing" if plain else "use_gradient_checkpointing_offload"
        source = given.source(used) if plain or offload else "always on for Wan there"
        given.draft.set_(path, True, source)


def set_storage(given: Given) -> None:
    """FP8, quantisation, offloading and weights to start from."""
    draft, files = given.draft, {f.text: f.component for f in model_files(given)}
    for name in ("fp8_models", "offload_models"):
        for text in given.words(name):
            component = files.get(text, "")
            if not component:
                draft.note(
                    "lost",
                    f"--{name}",
                    f"'{text}' is none of the models, so it has no effect there either.",
                )
            elif name == "fp8_models":
                _set_fp8(given, component, "--fp8_models")
            elif _may_offload(given, component, "--offload_models"):
                draft.set_(f"model.{component}.offload", "disk", "--offload_models")
                draft.set_(f"model.{component}.granularity", "layer", "--offload_models")
    for entry in filter(None, given.text("quant_options").split(";")):
        model, _, method = entry.strip().rpartition(":")
        method, *excluded = re.split(r"[/,]", method)
        component = files.get(model, "dit")
        _set_fp8(given, component, "--quant_options")
        if excluded:
            path = f"model.{component}.fp8.keep_high_precision"
            draft.set_(path, [name.strip() for name in excluded], "--quant_options")
        draft.note(
            "changed", "--quant_options", f"{method} becomes FP8, the only quantised storage here."
        )
    _set_cpu_offload(given, sorted({c for c in files.values() if c}))
    if given.has("resume_from_checkpoint"):
        file = given.text("resume_from_checkpoint")
        component = next(
            (c for c in ("dit", "dit_2") if draft.value(f"model.{c}.trainable")), "dit"
        )
        draft.set_(f"model.{component}.source", file, "--resume_from_checkpoint")
        draft.note(
            "check",
            "--resume_from_checkpoint",
            "It gives weights only; the file must hold the whole component.",
        )


def _set_cpu_offload(given: Given, components: list[str]) -> None:
    flag, threshold = "--enable_model_cpu_offload", given.has("cpu_offload_split_threshold")
    given.take("cpu_offload_split_threshold")
    if not given.is_on("enable_model_cpu_offload"):
        if threshold:
            text = "Read with --enable_model_cpu_offload only."
            given.draft.note("unneeded", "--cpu_offload_split_threshold", text)
        return
    source = f"{flag}, --cpu_offload_split_threshold" if threshold else flag
    for component in components:
        if _may_offload(given, component, flag):
            given.draft.set_(f"model.{component}.offload", "host", source)
            unit = "block" if threshold else "layer"
            given.draft.set_(f"model.{component}.granularity", unit, source)


def _set_fp8(given: Given, component: str, flag: str) -> None:
    if given.draft.value(f"model.{component}.trainable") == "full":
        given.draft.note(
            "lost",
            flag,
            f"{component} trains in full, and what gradients update isn't stored in FP8.",
        )
        return
    given.draft.set_(f"model.{component}.precision", "fp8", flag)
    row = given.table.row("fp8_models")
    if row is not None and flag == "--fp8_models":
        given.draft.note("changed", flag, row.note)


def _may_offload(given: Given, component: str, flag: str) -> bool:
    if given.draft.value(f"model.{component}.trainable") != "full":
        return True
    given.draft.note(
        "lost", flag, f"{component} trains in full; only frozen weights are offloaded."
    )
    return False
