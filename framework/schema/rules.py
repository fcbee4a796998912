"""Rules across keys: each setting is allowed, the combination isn't."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from framework.schema.data_rules import check_data
from framework.schema.export_rules import check_adapters
from framework.schema.families import FAMILIES
from framework.schema.family_rules import check_family
from framework.schema.findings import Finding, Judged, Where
from framework.schema.run import RunConfig
from framework.schema.unwanted import check_unwanted

_WITHOUT_BETAS = ("adafactor", "sgd", "rmsprop", "adagrad")
_NEEDS_PACKAGE = {
    "adamw_8bit": ("bitsandbytes", "eightbit"),
    "paged_adamw_8bit": ("bitsandbytes", "eightbit"),
    "lion_8bit": ("bitsandbytes", "eightbit"),
    "prodigy": ("prodigyopt", "prodigy"),
}
_FACTORS = (
    "data.batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
)


def check_rules(
    config: RunConfig, values: Mapping[str, Any], where: Where, *, trains: bool
) -> tuple[list[Finding], list[Finding]]:
    """Return what is refused and what is warned of.

    values: the composed values, which say what was really written.   where: path -> what set it.
    trains: False for generation, where `trainable` and the trainer don't matter.
    """
    judged = Judged(config, values, where)
    errors = [
        *_device_rules(judged),
        *check_family(judged, trains=trains),
        *_size_rules(judged, trains),
        *_fp8_rules(judged),
        *_error_budget_rules(judged),
    ]
    if trains:
        errors += [
            *_trainable_rules(judged),
            *_offload_rules(judged),
            *_optim_rules(judged),
            *_process_rules(judged),
            *_batch_rules(judged),
            *check_data(judged),
            *_logger_rules(judged),
            *check_adapters(judged),
        ]
    return errors, list(check_unwanted(judged, trains=trains))


def _trainable_rules(judged: Judged) -> Iterator[Finding]:
    components = judged.config.model.components
    paths = tuple(f"model.{name}.trainable" for name in components)
    if all(component.trainable == "none" for component in components.values()):
        nothing = judged.finding(
            "model",
            f"nothing trains: {', '.join(paths)} are all none",
            hint="Set model.dit.trainable=lora (an adapter) or model.dit.trainable=full (every weight).",
            reads=paths,
            allowed="lora or full for at least one component",
        )
        yield replace(nothing, fault=replace(nothing.fault, where=judged.where(paths[-1])))
    for name, component in components.items():
        if component.trainable == "full" and component.precision == "fp8":
            path = f"model.{name}"
            yield judged.finding(
                f"{path}.precision",
                "fp8 can't be combined with trainable=full: an optimizer step is far smaller than the gap between "
                "neighbouring FP8 numbers (3 mantissa bits), so nearly every update would be rounded away",
                hint=f"Train an adapter on the FP8 weights with {path}.trainable=lora, "
                f"or train every weight with {path}.precision=bf16.",
                reads=(f"{path}.trainable",),
                allowed=f"bf16 with {path}.trainable=full",
            )


def _offload_rules(judged: Judged) -> Iterator[Finding]:
    for name, component in judged.config.model.components.items():
        if component.trainable == "full" and component.offload != "none":
            path = f"model.{name}"
            yield judged.finding(
                f"{path}.offload",
                f"offload={component.offload} can't be combined with trainable=full: every step changes all weights, "
                "so they must be where the optimizer is; only frozen weights are fetched and never written back",
                hint=f"Set {path}.offload=none, or train an adapter on the offloaded weights with {path}.trainable=lora.",
                reads=(f"{path}.trainable",),
                allowed=f"none with {path}.trainable=full",
            )


def _fp8_rules(judged: Judged) -> Iterator[Finding]:
    for name, component in judged.config.model.components.items():
        path = f"model.{name}.fp8.keep_high_precision"
        globs = component.fp8.keep_high_precision or ()
        if component.precision == "fp8" and "*" in globs:
            yield judged.finding(
                path,
                f'"*" keeps every layer of {name} in high precision, so model.{name}.precision=fp8 would store nothing in FP8',
                hint=f"Name the layers to keep, e.g. {path}=[norm_out], leave it out for the family's list, "
                f"or set model.{name}.precision=bf16.",
                reads=(f"model.{name}.precision",),
                allowed="patterns that leave some layers",
            )


def _error_budget_rules(judged: Judged) -> Iterator[Finding]:
    for name, component in judged.config.model.components.items():
        path = f"model.{name}.fp8.error_budget"
        if component.fp8.error_budget is not None and name != "dit":
            yield judged.finding(
                path,
                f"the error of the {name}'s output isn't measured, so a budget for it can't be kept",
                hint=f"Remove it ({path}=null); name layers to keep in model.{name}.fp8.keep_high_precision.",
                allowed=f"null for the {name}",
            )


def _device_rules(judged: Judged) -> Iterator[Finding]:
    if judged.config.model.compute_dtype == "fp16" and judged.config.model.device == "cpu":
        path = "model.compute_dtype"
        yield judged.finding(
            path,
            "fp16 can't be computed on the CPU (model.device=cpu)",
            hint=f"Use {path}=bf16 or {path}=fp32.",
            reads=("model.device",),
            allowed="bf16 or fp32 with model.device=cpu",
        )


def _process_rules(judged: Judged) -> Iterator[Finding]:
    device, trainer = judged.config.model.device, judged.config.trainer
    several = trainer.devices > 1 or trainer.num_nodes > 1
    if several and device == "mps":
        path = "trainer.devices" if trainer.devices > 1 else "trainer.num_nodes"
        yield judged.finding(
            path,
            "several processes can't share model.device=mps",
            hint="Set trainer.devices=1 and trainer.num_nodes=1, or model.device=cpu.",
            reads=("trainer.devices", "trainer.num_nodes", "model.device"),
            allowed="1 with model.device=mps",
        )
    if trainer.devices > 1 and device.startswith("cuda:"):
        path = "trainer.devices"
        yield judged.finding(
            path,
            f"{trainer.devices} processes can't share the one GPU that model.device={device} names",
            hint="Set model.device=cuda, or trainer.devices=1.",
            reads=("model.device",),
            allowed=f"1 with model.device={device}",
        )


def _batch_rules(judged: Judged) -> Iterator[Finding]:
    """The batch of one optimizer step, where it is stated, must be what its factors make."""
    path, wanted = "trainer.global_batch_size", judged.config.trainer.global_batch_size
    factors = {key: int(judged.value(key)) for key in _FACTORS}
    product = prod(factors.values())
    if wanted is None or wanted == product:
        return
    ways = [
        f"{key}={wanted // (product // factors[key])}"
        for key in ("trainer.accumulate_grad_batches", "data.batch_size", "trainer.devices")
        if wanted % (product // factors[key]) == 0
    ]
    product_words = " x ".join(f"{key} {value}" for key, value in factors.items())
    no_way = "" if ways else "No other value of a single factor makes that product. "
    yield judged.finding(
        path,
        f"{wanted} pictures per optimizer step were asked for, but the settings make {product} ({product_words})",
        hint=f"{no_way}Set {', '.join([*ways, f'{path}={product}'][:-1]) or f'{path}={product}'}"
        + (f" or {path}={product}." if ways else "."),
        reads=_FACTORS,
        allowed=str(product),
    )


def _size_rules(judged: Judged, trains: bool) -> Iterator[Finding]:
    family = judged.config.model.family
    divisor = FAMILIES[family].size_divisor_px
    sides = judged.config.sample.size_px
    fitting = [max(divisor, round(side / divisor) * divisor) for side in sides]
    for index, side in enumerate(sides):
        if side % divisor:
            below, above = side // divisor * divisor, (side // divisor + 1) * divisor
            yield judged.finding(
                f"sample.size_px[{index}]",
                f"{side} isn't a multiple of {divisor}, which {family} needs",
                nearest=tuple(str(size) for size in (below, above) if size),
                hint=f"Write sample.size_px=[{fitting[0]},{fitting[1]}], the nearest size that fits.",
                reads=("sample.size_px", "model.family"),
                allowed=f"a multiple of {divisor}",
            )
    if trains and judged.config.data.max_px < divisor * divisor:
        yield judged.finding(
            "data.max_px",
            f"{judged.config.data.max_px} px is less than the smallest picture, {divisor} x {divisor}",
            hint=f"Use at least {divisor * divisor}, e.g. data.max_px=1048576.",
            reads=("model.family",),
            allowed=f"at least {divisor * divisor}",
        )


def _optim_rules(judged: Judged) -> Iterator[Finding]:
    optim = judged.config.optim
    if optim.betas is not None and optim.name in _WITHOUT_BETAS:
        yield judged.finding(
            "optim.betas",
            f"the optimizer {optim.name} has no betas",
            hint="Remove it (optim.betas=null), or use optim.name=adamw.",
            reads=("optim.name",),
            allowed=f"null with optim.name={optim.name}",
        )
    package, extra = _NEEDS_PACKAGE.get(optim.name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        yield judged.finding(
            "optim.name",
            f"{optim.name} needs the package {package}, which isn't installed",
            hint=f"Run `pip install octavo[{extra}]`, or use optim.name=adamw.",
            allowed="an optimizer whose package is installed",
        )


def _logger_rules(judged: Judged) -> Iterator[Finding]:
    if judged.config.logger.wandb is not None and importlib.util.find_spec("wandb") is None:
        yield judged.finding(
            "logger.wandb",
            "Weights & Biases needs the package wandb, which isn't installed",
            hint="Run `pip install octavo[wandb]`, or set logger.wandb=null.",
            allowed="null without the package",
        )
