"""Rules on adapters: what a form of LoRA file can't carry, and what can't lie on one another."""

from __future__ import annotations

from collections.abc import Iterator

from framework.schema.findings import Finding, Judged
from framework.schema.lora_keys import FAMILY_NAMES, why_not
from framework.schema.model import LoraConfig


def check_adapters(judged: Judged) -> Iterator[Finding]:
    """What training would find out only when its result is written."""
    yield from _formats(judged)
    yield from _presets(judged)


def _formats(judged: Judged) -> Iterator[Finding]:
    names = FAMILY_NAMES.get(judged.config.model.family)
    for index, form in enumerate(judged.config.export.formats):
        for component, settings in judged.config.model.components.items():
            if settings.trainable != "lora":
                continue
            lora = settings.lora or LoraConfig()
            reason: str | None = "its layers have no names there"
            if names is not None:
                reason = why_not(names, component, {"": True} if lora.use_dora else (), form)
            elif form in ("peft", "diffusers"):
                reason = None
            if reason is not None:
                yield judged.finding(
                    f"export.formats[{index}]",
                    f"the adapter of {component} can't be written for {form}: {reason}",
                    hint="Leave it out: peft and diffusers carry every adapter, and `octavo export --merge` makes "
                    "weights that need none.",
                    reads=(f"model.{component}.trainable",),
                    allowed="peft, diffusers",
                )


def _presets(judged: Judged) -> Iterator[Finding]:
    for component, settings in judged.config.model.components.items():
        lora = settings.lora
        if settings.trainable != "lora" or lora is None or lora.preset is None or not lora.use_dora:
            continue
        path = f"model.{component}.lora.use_dora"
        yield judged.finding(
            path,
            "DoRA measures the lengths of the weight's rows without the preset that lies under it, so what is trained "
            "would mean something else once the preset is gone or merged",
            hint=f"Set {path}=false, or merge the preset first with `octavo export --merge`.",
            reads=(f"model.{component}.lora.preset",),
            allowed="false with a preset",
        )
