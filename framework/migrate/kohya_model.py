"""Which model kohya's settings name, what of it trains, and how its weights rest."""

from __future__ import annotations

import re

from framework.migrate.given import Given
from framework.migrate.models import (
    families,
    family_facts,
    known_checkpoint,
    kohya_targets,
    unknown_model,
)

_OTHER_ADAPTERS = ("loha", "lokr", "oft", "dylora", "lycoris")
_TEXT_ENCODERS = {"sdxl": ("text_encoder", "text_encoder_2"), "flux": ("text_encoder",)}


def set_model(given: Given, trainer: str, script: str, family: str) -> str:
    """Write family and sources; returns the family, "" where none can be told, which is a fault."""
    draft = given.draft
    found = family or (_kohya_family if trainer == "kohya" else _musubi_family)(given, script)
    name = "pretrained_model_name_or_path" if trainer == "kohya" else "dit"
    value = given.text(name)
    if not value:
        draft.refuse(
            name,
            "the settings name no model, so that no recipe can be made",
            hint=f"Give {name}.",
            where=given.where,
        )
        return ""
    if found not in families():
        unknown_model(draft, name, given.where, script or value)
        return ""
    draft.set_("model.family", found, _reason(given, script))
    if trainer == "kohya":
        _kohya_sources(given, value, found)
    else:
        _musubi_sources(given, found)
    return found


def _reason(given: Given, script: str) -> str:
    if script:
        return script.rpartition("/")[2]
    names = [n for n in ("task", "model_version", "network_module") if given.has(n)]
    return given.source(*names)


def _kohya_family(given: Given, script: str) -> str:
    words = f"{script} {given.values.get('network_module') or ''}".lower()
    if str(given.take("model_type") or "flux") == "chroma":
        return "chroma"
    if "flux" in words or given.has("clip_l") or given.has("t5xxl"):
        return "flux"
    name = str(given.values.get("pretrained_model_name_or_path") or "")
    if "sdxl" in words or re.search(r"xl|pony|illustrious|noob", name, re.IGNORECASE):
        return "sdxl"
    known = known_checkpoint(name)
    return known.family if known is not None else ""


def _musubi_family(given: Given, script: str) -> str:
    words = f"{script.rpartition('/')[2]} {given.values.get('network_module') or ''}".lower()
    version = given.text("model_version", "original")
    is_edit = version.startswith("edit") or given.is_on("edit") or given.is_on("edit_plus")
    if "qwen" in words or version != "original":
        if version == "layered":
            return "layered"
        return "qwen_image_edit" if is_edit else "qwen_image"
    if "zimage" in words:
        return "z_image"
    if "wan" in words or given.has("task"):
        task = given.text("task", "t2v-14B")
        if not task.startswith(("t2v", "t2i")) or task.endswith("FC"):
            return task
        return "wan2_2" if "A14B" in task else "wan2_1"
    return ""


def _kohya_sources(given: Given, value: str, family: str) -> None:
    draft, name = given.draft, "pretrained_model_name_or_path"
    single = value.endswith((".safetensors", ".ckpt", ".sft"))
    if not single:
        known = known_checkpoint(value)
        draft.set_("model.source", known.source if known and known.source else value, name)
    else:
        default = str(family_facts(family)["default"])
        draft.set_("model.source", default, "tokenizers and configuration")
        parts = ("dit",)
        if family == "sdxl":
            parts = ("dit", "text_encoder", "text_encoder_2", "vae")  # type: ignore[assignment]
        for part in parts:
            draft.set_(f"model.{part}.source", value, name)
        draft.note("check", name, f"model.source is {default}, for tokenizers and configuration.")
    for theirs, part in (
        ("clip_l", "text_encoder"),
        ("t5xxl", "text_encoder_2"),
        ("ae", "vae"),
        ("vae", "vae"),
    ):
        if given.has(theirs):
            draft.set_(f"model.{part}.source", given.text(theirs), theirs)


def _musubi_sources(given: Given, family: str) -> None:
    draft = given.draft
    default = str(family_facts(family)["default"])
    if family == "wan2_1" and "1.3B" in given.text("task"):
        default = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    if family == "qwen_image_edit" and given.text("model_version") in ("edit", "edit-2511"):
        default = "Qwen/Qwen-Image-E" + given.text("model_version")[1:]
    draft.set_("model.source", default, "tokenizers and configuration")
    draft.note("check", "dit", f"model.source is {default}, for tokenizers and configuration.")
    file, high = given.text("dit"), given.text("dit_high_noise")
    if family != "wan2_2":
        draft.set_("model.dit.source", file, "dit")
    elif high:
        draft.set_("model.dit.source", high, "dit_high_noise")
        draft.set_("model.dit_2.source", file, "dit")
        row = given.table.row("dit_high_noise")
        draft.note("changed", "dit_high_noise", row.note if row else "")
    else:
        part = "dit" if "high" in file.lower() else "dit_2"
        draft.set_(f"model.{part}.source", file, "dit")
    for theirs, part in (("vae", "vae"), ("text_encoder", "text_encoder"), ("t5", "text_encoder")):
        if given.has(theirs):
            draft.set_(f"model.{part}.source", given.text(theirs), theirs)
            if given.text(theirs).endswith((".pth", ".pt", ".bin")):
                draft.note(
                    "check",
                    theirs,
                    "Pickles aren't read; without it the component of model.source is used.",
                )
                del draft.settings[f"model.{part}.source"]


def set_trained(given: Given, trainer: str, family: str) -> list[str]:
    """Write what trains and its adapters; returns the components."""
    draft, module = given.draft, given.text("network_module").lower()
    low = family == "wan2_2" and not given.has("dit_high_noise")
    denoiser = "dit_2" if low and draft.value("model.dit_2.source") else "dit"
    if any(other in module for other in _OTHER_ADAPTERS):
        text = f"{module} isn't offered; an ordinary LoRA is written instead."
        draft.note("lost", "network_module", text)
    if not module and not given.has("network_dim"):
        draft.set_(f"model.{denoiser}.trainable", "full", given.source("network_module"))
        trained = [denoiser]
        if given.is_on("train_text_encoder"):
            trained.append("text_encoder")
            draft.set_("model.text_encoder.trainable", "full", "train_text_encoder")
        return trained
    trained = [] if given.is_on("network_train_text_encoder_only") else [denoiser]
    if trainer == "kohya" and not given.is_on("network_train_unet_only"):
        trained += _TEXT_ENCODERS.get(family, ())
    for component in trained:
        _set_lora(given, component, denoiser)
    targets = kohya_targets(family)
    if targets and denoiser in trained:
        path = f"model.{denoiser}.lora.target_modules"
        draft.set_(path, targets, "the linear layers of its blocks, as there")
    return trained


def _set_lora(given: Given, component: str, denoiser: str) -> None:
    draft, path = given.draft, f"model.{component}"
    source = given.source("network_module")
    if component != denoiser:
        source = "network_train_unet_only not given"
    draft.set_(f"{path}.trainable", "lora", source)
    rank = given.whole("network_dim", 4) or 4
    alpha = given.number("network_alpha", 1.0)
    draft.set_(f"{path}.lora.rank", rank, given.source("network_dim"))
    draft.set_(f"{path}.lora.alpha", float(alpha or rank), given.source("network_alpha"))
    if dropout := given.number("network_dropout"):
        draft.set_(f"{path}.lora.dropout", dropout, given.source("network_dropout"))
    if component != denoiser:
        return
    if given.has("network_weights"):
        draft.set_(f"{path}.lora.init_from", given.text("network_weights"), "network_weights")
    weights = given.take("base_weights")
    if weights:
        files = weights if isinstance(weights, list) else [weights]
        draft.set_(f"{path}.lora.preset", str(files[0]), "base_weights")
        if len(files) > 1:
            draft.note("lost", "base_weights", f"Only the first of {len(files)} is used.")


def set_storage(given: Given, components: list[str], family: str) -> None:
    """FP8, block swap, number format."""
    draft = given.draft
    denoiser = next((c for c in components if c.startswith("dit")), "dit")
    encoders = ("text_encoder", "text_encoder_2") if family in ("flux", "sdxl") else ()
    for name, parts in (
        ("fp8_base", (denoiser, *encoders) if given.table.row("fp8_base_unet") else (denoiser,)),
        ("fp8_base_unet", (denoiser,)),
        ("fp8_scaled", (denoiser,)),
        ("fp8_vl", ("text_encoder",)),
        ("fp8_llm", ("text_encoder",)),
        ("fp8_t5", ("text_encoder",)),
    ):
        if given.table.row(name) is None or not given.is_on(name):
            continue
        for part in parts:
            if draft.value(f"model.{part}.trainable") == "full":
                draft.note(
                    "lost",
                    name,
                    f"{part} trains in full, and what gradients update isn't stored in FP8.",
                )
            else:
                draft.set_(f"model.{part}.precision", "fp8", name)
        row = given.table.row(name)
        draft.note("changed", name, row.note if row else "")
    if given.whole("blocks_to_swap"):
        row = given.table.row("blocks_to_swap")
        if draft.value(f"model.{denoiser}.trainable") == "full":
            draft.note(
                "lost",
                "blocks_to_swap",
                "Only frozen weights are offloaded, and it trains in full.",
            )
        else:
            draft.set_(f"model.{denoiser}.offload", "host", given.source("blocks_to_swap"))
            draft.set_(f"model.{denoiser}.granularity", "block", given.source("blocks_to_swap"))
            draft.note("changed", "blocks_to_swap", row.note if row else "")
    default = "no" if given.table.row("fp8_base_unet") else "bf16"
    precision = given.text("mixed_precision", default)
    dtype = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(precision, "bf16")
    draft.set_("model.compute_dtype", dtype, given.source("mixed_precision"))
    for name in ("cpu_offload_checkpointing", "gradient_checkpointing_cpu_offload"):
        if given.table.row(name) is not None and given.is_on(name):
            draft.set_(f"model.{denoiser}.gradient_checkpointing", True, name)
            row = given.table.row(name)
            draft.note("changed", name, row.note if row else "")
    if given.is_on("gradient_checkpointing"):
        draft.set_(f"model.{denoiser}.gradient_checkpointing", True, "gradient_checkpointing")
