"""Which model ai-toolkit's settings name, what of it trains, and how its weights rest."""

from __future__ import annotations

from framework.migrate.given import Given
from framework.migrate.models import families, known_checkpoint, unknown_model

_ARCHS = {
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image_edit",
    "qwen_image_edit_plus": "qwen_image_edit",
    "flux": "flux",
    "zimage": "z_image",
    "z_image": "z_image",
    "wan21": "wan2_1",
    "wan22_14b": "wan2_2",
    "wan22_5b": "wan2_2",
    "sdxl": "sdxl",
}
_DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}


def set_model(given: Given, family: str) -> str:
    """Write family and source; returns the family, "" where none can be told, which is a fault."""
    draft, name = given.draft, given.text("model.name_or_path")
    arch = given.text("model.arch").partition(":")[0]
    if given.is_on("model.is_flux"):
        arch = arch or "flux"
    if given.is_on("model.is_xl"):
        arch = arch or "sdxl"
    known = known_checkpoint(name)
    found = family or _ARCHS.get(arch, "") or (known.family if known and not arch else "")
    if not name:
        hint = "Give model.name_or_path."
        message = "the job names no model, so that no recipe can be made"
        draft.refuse("model.name_or_path", message, hint=hint, where=given.where)
        return ""
    if found not in families() or (known is not None and known.refuse):
        unknown_model(draft, "model.name_or_path", given.where, name)
        return ""
    draft.set_("model.family", found, given.source("model.arch"))
    source = known.source if known is not None else name
    draft.set_("model.source", source, given.source("model.name_or_path"))
    if source != name:
        text = f"The checkpoint is {source} on the Hugging Face hub, the published layout of diffusers."
        draft.note("check", "model.name_or_path", text)
    return found


def set_trained(given: Given, family: str) -> None:
    """Write what trains and its adapters."""
    draft, kind = given.draft, given.text("network.type", "lora")
    has_network = any(name.startswith("network.") for name in given.values)
    if kind != "lora":
        draft.note(
            "lost", "network.type", f"'{kind}' isn't offered; an ordinary LoRA is written instead."
        )
    trained = ["dit"] if given.is_on("train.train_unet", True) else []
    if given.is_on("train.train_text_encoder"):
        trained.append("text_encoder")
    given.take("train.train_refiner")
    rank_name = "network.rank" if given.has("network.rank") else "network.linear"
    rank = given.whole(rank_name, 4) or 4
    alpha_name = "network.alpha" if given.has("network.alpha") else "network.linear_alpha"
    alpha = given.number(alpha_name, 1.0) or float(rank)
    given.taken |= {"network.rank", "network.linear", "network.alpha", "network.linear_alpha"}
    for component in trained:
        path = f"model.{component}"
        if not has_network:
            draft.set_(f"{path}.trainable", "full", "no network")
            continue
        draft.set_(f"{path}.trainable", "lora", given.source("network.type"))
        draft.set_(f"{path}.lora.rank", rank, given.source(rank_name))
        if family == "sdxl":
            draft.set_(f"{path}.lora.alpha", alpha, given.source(alpha_name))
        else:
            draft.set_(
                f"{path}.lora.alpha", float(rank), "alpha is the rank for transformers there"
            )
            if given.has(alpha_name) and alpha != rank:
                text = f"{alpha:g} is written there, but the rank is used."
                draft.note("changed", alpha_name, text)
    if family == "wan2_2" and "5B" not in str(draft.value("model.source")):
        text = (
            "Both experts train there, one in a run here: this recipe trains the high-noise expert. For the other "
            "write the same below model.dit_2 and model.dit.trainable: none."
        )
        draft.note("check", "model.arch", text)
    if has_network:
        text = "Layers are the family's list here, every linear layer of the blocks there."
        draft.note("check", "network", text)
    for name in ("model.assistant_lora_path", "model.lora_path"):
        if given.has(name) and has_network:
            draft.set_("model.dit.lora.preset", given.text(name), name)
            row = given.table.row(name)
            draft.note("changed", name, row.note if row else "")


def set_storage(given: Given) -> None:
    """Quantisation, offloading, checkpointing, number format."""
    draft = given.draft
    quantize = given.is_on("model.quantize")
    for name, component in (("model.quantize", "dit"), ("model.quantize_te", "text_encoder")):
        if not given.is_on(name, quantize if component == "text_encoder" else False):
            continue
        if draft.value(f"model.{component}.trainable") == "full":
            text = f"{component} trains in full, and what gradients update isn't stored in FP8."
            draft.note("lost", name, text)
            continue
        draft.set_(f"model.{component}.precision", "fp8", given.source(name))
        kind = given.text("model.qtype" if component == "dit" else "model.qtype_te", "qfloat8")
        if kind not in ("qfloat8", "float8"):
            draft.note(
                "changed",
                given.shown(name),
                f"'{kind}' becomes FP8, the only quantised storage here.",
            )
    given.taken |= {"model.qtype", "model.qtype_te"}
    if given.is_on("model.layer_offloading"):
        for component in ("dit", "text_encoder"):
            if draft.value(f"model.{component}.trainable") == "full":
                draft.note("lost", "model.layer_offloading", f"{component} trains in full.")
                continue
            draft.set_(f"model.{component}.offload", "host", "model.layer_offloading")
            draft.set_(f"model.{component}.granularity", "block", "model.layer_offloading")
    if given.is_on("train.gradient_checkpointing", True):
        source = given.source("train.gradient_checkpointing")
        draft.set_("model.dit.gradient_checkpointing", True, source)
    dtype = _DTYPES.get(given.text("train.dtype", "fp32"), "fp32")
    draft.set_("model.compute_dtype", dtype, given.source("train.dtype"))
