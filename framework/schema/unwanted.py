"""Warnings: what is allowed but surely not meant. A warning never stops a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt, prod

from framework.schema.families import FAMILIES
from framework.schema.findings import Finding, Judged
from framework.schema.model import ComponentConfig, DitConfig
from framework.schema.paths import value_at
from framework.schema.run import ObjectiveConfig
from framework.schema.wording import number_text

# Usual learning rates; a guess from published recipes. A rate is warned of only ten times outside of them.
# Adam and its relatives: 1e-4 is what most LoRA recipes start from and 1e-5 what most full fine-tunes do.
_USUAL_LR = {"lora": (2e-5, 1e-3), "full": (1e-6, 3e-4)}
_USUAL_LR_OF = {
    "sgd": (1e-4, 1e-1),
    "adagrad": (1e-4, 1e-1),
    "prodigy": (0.1, 2.0),  # a factor on the rate that it finds itself
    "lion_8bit": (
        1e-7,
        3e-4,
    ),  # about a third to a tenth of Adam's (Chen et al. 2023, arXiv:2302.06675)
}
_FAR = 10
_MAX_LORA_SCALE = 8.0
_SMALL_PICTURE_PX = 2048
_MUCH_LARGER = 4
_NEARLY_ALL = 0.5


def check_unwanted(judged: Judged, *, trains: bool) -> Iterator[Finding]:
    """Yield everything that a person would want to be told of before waiting for it."""
    yield from _plain_fp8_cast(judged)
    yield from _unused_error_budget(judged)
    yield from _unused_offload_settings(judged)
    if trains:
        yield from _unused_lora(judged)
        yield from _unused_settings(judged)
        yield from _unusual_lr(judged)
        yield from _long_warmup(judged)
        yield from _more_repeats_than_steps(judged)
        yield from _lora_scale(judged)
        yield from _picture_sizes(judged)
        yield from _dropped_captions(judged)


def _plain_fp8_cast(judged: Judged) -> Iterator[Finding]:
    for name, component in judged.config.model.components.items():
        if component.precision == "fp8" and component.fp8.scaling == "none":
            path = f"model.{name}.fp8.scaling"
            yield judged.finding(
                path,
                "without scales, weights below 0.002 lose most of their digits or become 0",
                hint=f"Use {path}=row unless the checkpoint is published as a plain FP8 cast.",
                code="unusual",
                reads=(f"model.{name}.precision",),
                allowed="row or tensor for weights that aren't FP8 yet",
            )


def _unused_error_budget(judged: Judged) -> Iterator[Finding]:
    dit, fit = judged.config.model.dit, judged.config.model.fit
    # `fit` may choose FP8.
    if dit.fp8.error_budget is not None and dit.precision != "fp8" and fit is None:
        yield judged.finding(
            "model.dit.fp8.error_budget",
            f"is set but not used, because model.dit.precision={dit.precision}",
            hint="Set model.dit.precision=fp8 to use it, or leave it out.",
            code="unused",
            reads=("model.dit.precision", "model.fit"),
        )


def _unused_offload_settings(judged: Judged) -> Iterator[Finding]:
    model = judged.config.model
    for name, component in model.components.items():
        default = ComponentConfig.model_fields["granularity"].default
        if component.offload == "none" and component.granularity != default and model.fit is None:
            yield judged.finding(
                f"model.{name}.granularity",
                f"is set but not used, because model.{name}.offload=none",
                hint=f"Set model.{name}.offload=host to use it, or leave it out.",
                code="unused",
                reads=(f"model.{name}.offload",),
            )
    offloads = {f"model.{name}.offload": c.offload for name, c in model.components.items()}
    if model.vram_limit is not None and set(offloads.values()) == {"none"} and model.fit is None:
        yield judged.finding(
            "model.vram_limit",
            "is set but has no effect, because no component is offloaded: all weights stay on the device whatever it says",
            hint="Set model.dit.offload=host, so that layers are fetched where they don't fit below the limit.",
            code="unused",
            reads=tuple(offloads),
        )
    if model.fit_host is not None and model.fit is None:
        yield judged.finding(
            "model.fit_host",
            "is set but not used, because model.fit isn't set",
            hint="Give the size of the device with model.fit=24GiB, or leave it out.",
            code="unused",
            reads=("model.fit",),
        )


def _unused_lora(judged: Judged) -> Iterator[Finding]:
    for name, component in judged.config.model.components.items():
        path = f"model.{name}.lora"
        if component.trainable == "lora" or component.lora is None:
            continue
        written = value_at(judged.values, ("model", name, "lora"))
        keys = (
            [str(k) for k, v in written.items() if v is not None]
            if isinstance(written, Mapping)
            else []
        )
        yield judged.finding(
            path,
            f"is set ({', '.join(keys) or 'defaults'}) but not used, because model.{name}.trainable={component.trainable}",
            hint=f"Set model.{name}.trainable=lora to use it, or {path}=null to remove it.",
            code="unused",
            reads=(f"model.{name}.trainable",),
            allowed=f"null with model.{name}.trainable={component.trainable}",
        )


def _unused_settings(judged: Judged) -> Iterator[Finding]:
    """Settings that were changed although nothing reads them in this combination."""
    config, objective = judged.config, judged.config.objective
    unused: list[tuple[str, str, str]] = []
    if objective.loss != "huber":
        unused.append(("huber_delta", f"objective.loss={objective.loss}", "objective.loss=huber"))
    if objective.name != "flow_matching":
        reason, remedy = f"objective.name={objective.name}", "objective.name=flow_matching"
        unused += [(k, reason, remedy) for k in ("timestep_sampling", "weighting")]
    if objective.name != "ddpm":
        reason, remedy = f"objective.name={objective.name}", "objective.name=ddpm"
        unused += [(key, reason, remedy) for key in ("min_snr_gamma", "noise_offset")]
    if objective.name != "direct_distill":
        reason, remedy = f"objective.name={objective.name}", "objective.name=direct_distill"
        unused.append(("distill_steps", reason, remedy))
    if objective.timestep_sampling != "logit_normal":
        reason = f"objective.timestep_sampling={objective.timestep_sampling}"
        remedy = "objective.timestep_sampling=logit_normal"
        unused += [("logit_mean", reason, remedy), ("logit_std", reason, remedy)]
    if config.model.vae.trainable == "none":
        unused.append(("vae_kl_weight", "model.vae.trainable=none", "model.vae.trainable=full"))
    for key, reason, remedy in unused:
        default = ObjectiveConfig.model_fields[key].default
        if getattr(objective, key) != default:
            path = f"objective.{key}"
            yield judged.finding(
                path,
                f"is set but not used, because {reason}",
                hint=f"Set {remedy} to use it, or leave it out.",
                code="unused",
                reads=(reason.partition("=")[0],),
            )
    yield from _unused_checkpointing(judged)
    if config.sample.every_n_steps and not config.sample.prompts:
        yield judged.finding(
            "sample.every_n_steps",
            "is set but not used, because sample.prompts is empty, so that no samples are made",
            hint="Give prompts, e.g. 'sample.prompts=[\"a red apple\"]', or leave it out.",
            code="unused",
            reads=("sample.prompts",),
        )


def _unused_checkpointing(judged: Judged) -> Iterator[Finding]:
    model, spec = judged.config.model, FAMILIES[judged.config.model.family]
    trained = [name for name, part in model.components.items() if part.trainable != "none"]
    through = [name for name in spec.denoisers if name in trained]
    if not through and set(trained) & set(spec.text_encoders):
        through = list(spec.denoisers[:1])
    for name in spec.denoisers:
        part = model.components[name]
        if isinstance(part, DitConfig) and part.gradient_checkpointing and name not in through:
            yield judged.finding(
                f"model.{name}.gradient_checkpointing",
                f"is set but not used, because no gradient passes through the {name}",
                hint=f"Leave it out, or train the {name} or the text encoder.",
                code="unused",
            )


def _long_warmup(judged: Judged) -> Iterator[Finding]:
    """A short try of a long recipe is legitimate, so this is no fault."""
    steps, max_steps = judged.config.optim.warmup_steps, judged.config.trainer.max_steps
    if steps > max_steps:
        yield judged.finding(
            "optim.warmup_steps",
            f"{steps} steps of warm-up don't fit into trainer.max_steps={max_steps}",
            hint=f"Lower it, or raise trainer.max_steps: the rate only reaches {max_steps / steps:.0%} of optim.lr.",
            code="unusual",
            reads=("trainer.max_steps",),
            allowed=f"at most {max_steps} with trainer.max_steps={max_steps}",
        )


def _unusual_lr(judged: Judged) -> Iterator[Finding]:
    name, lr = judged.config.optim.name, judged.config.optim.lr
    kinds = sorted({c.trainable for c in judged.config.model.components.values()} - {"none"})
    ranges = [_USUAL_LR_OF[name]] if name in _USUAL_LR_OF else [_USUAL_LR[kind] for kind in kinds]
    if not ranges:
        return
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if low / _FAR <= lr <= high * _FAR:
        return
    method = "" if name in _USUAL_LR_OF else f" and trainable={' and '.join(kinds)}"
    far = (
        f"{lr / high:.0f} times the highest"
        if lr > high
        else f"{low / lr:.0f} times below the lowest"
    )
    yield judged.finding(
        "optim.lr",
        f"{number_text(lr)} is {far} usual rate; usual for {name}{method} are {number_text(low)} to {number_text(high)}",
        hint=f"Check the exponent; a rate to start from is optim.lr={number_text(_start_lr(low, high))}.",
        code="unusual",
        reads=("optim.name", *(f"model.{c}.trainable" for c in judged.config.model.components)),
        allowed=f"usually {number_text(low)} to {number_text(high)}",
    )


def _start_lr(low: float, high: float) -> float:
    """The power of ten next to the middle of a range, on a logarithmic scale."""
    middle = (low * high) ** 0.5
    return min(
        (10.0**power for power in range(-8, 2)), key=lambda lr: max(lr / middle, middle / lr)
    )


def _more_repeats_than_steps(judged: Judged) -> Iterator[Finding]:
    repeats, max_steps = judged.config.data.repeats, judged.config.trainer.max_steps
    if repeats > max_steps:
        yield judged.finding(
            "data.repeats",
            f"each picture stands {repeats} times in an epoch, but the run has only {max_steps} steps, so it never gets "
            "through one; repeats don't make a run longer",
            hint="Leave data.repeats out, and set the length of the run by trainer.max_steps.",
            code="unusual",
            reads=("trainer.max_steps",),
            allowed=f"at most {max_steps} with trainer.max_steps={max_steps}",
        )


def _lora_scale(judged: Judged) -> Iterator[Finding]:
    """An adapter whose output is scaled far up or down; usually only one of rank and alpha was changed."""
    for name, component in judged.config.model.components.items():
        lora = component.lora
        if component.trainable != "lora" or lora is None:
            continue
        ratio = lora.alpha / lora.rank
        if 1 / _MAX_LORA_SCALE <= ratio <= _MAX_LORA_SCALE:
            continue
        path = f"model.{name}.lora.alpha"
        by = f"{ratio:g} times" if ratio > 1 else f"1/{1 / ratio:g} of"
        yield judged.finding(
            path,
            f"alpha {lora.alpha:g} with rank {lora.rank} lets the adapter act with {by} its own strength (alpha / rank), "
            "as if its learning rate were changed as much",
            hint=f"Use {path}={lora.rank} for a scale of 1; alpha is usually the rank or twice that.",
            code="unusual",
            reads=(f"model.{name}.lora.rank", f"model.{name}.trainable"),
            allowed=f"usually {lora.rank} to {2 * lora.rank} with rank {lora.rank}",
        )


def _picture_sizes(judged: Judged) -> Iterator[Finding]:
    max_px = judged.config.data.max_px
    side = isqrt(max_px)
    if max_px <= _SMALL_PICTURE_PX:
        yield judged.finding(
            "data.max_px",
            f"{max_px} is the number of pixels of a picture of {side} x {side}; it isn't the length of a side",
            hint=f"For pictures of about {max_px} x {max_px} write data.max_px={max_px * max_px}.",
            code="unusual",
            allowed="width x height in pixels, e.g. 1048576",
        )
    sample = judged.config.sample
    if (
        sample.prompts
        and prod(sample.size_px) > _MUCH_LARGER * max_px > _MUCH_LARGER * _SMALL_PICTURE_PX
    ):
        width, height = sample.size_px
        fitting = side // 16 * 16
        yield judged.finding(
            "sample.size_px",
            f"samples of {width} x {height} have {width * height / max_px:.0f} times the pixels of a training picture "
            f"(data.max_px={max_px}, about {side} x {side})",
            hint=f"Sample at the size that is trained, e.g. sample.size_px=[{fitting},{fitting}].",
            code="unusual",
            reads=("data.max_px", "sample.prompts"),
            allowed=f"about {max_px} pixels in all",
        )


def _dropped_captions(judged: Judged) -> Iterator[Finding]:
    rate = judged.config.data.caption_dropout
    if rate > _NEARLY_ALL:
        yield judged.finding(
            "data.caption_dropout",
            f"{rate:.0%} of the captions are dropped, so that the model hardly learns from text",
            hint="For guidance, data.caption_dropout=0.1 is usual.",
            code="unusual",
            allowed="usually 0 to 0.2",
        )
