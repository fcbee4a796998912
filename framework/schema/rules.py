"""Rules across keys: each setting is allowed, the combination isn't, or is surely not what was meant."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from framework.errors import Fault
from framework.schema.families import FAMILIES
from framework.schema.model import ComponentConfig
from framework.schema.run import ObjectiveConfig, RunConfig

Where = Callable[[str], str]

_WITHOUT_BETAS = ("adafactor", "sgd", "rmsprop", "adagrad")
_NEEDS_PACKAGE = {
    "adamw_8bit": ("bitsandbytes", "eightbit"),
    "paged_adamw_8bit": ("bitsandbytes", "eightbit"),
    "lion_8bit": ("bitsandbytes", "eightbit"),
    "prodigy": ("prodigyopt", "prodigy"),
}
# Learning rates beyond ten times the usual range; the usual ranges are a guess from published recipes.
_USUAL_LR = {
    "sgd": (1e-4, 1e-1),
    "adagrad": (1e-4, 1e-1),
    "prodigy": (0.1, 2.0),
    "lion_8bit": (1e-7, 3e-4),
}
_USUAL_LR_ADAM = (1e-6, 2e-3)


@dataclass(frozen=True)
class Finding:
    """What a rule found. reads: paths that the rule looked at; it is void where one of them is faulty itself."""

    fault: Fault
    reads: tuple[str, ...]


def check_rules(
    config: RunConfig, values: Mapping[str, Any], where: Where, *, trains: bool
) -> tuple[list[Finding], list[Finding]]:
    """Return what is refused and what is warned of.

    values: the composed values, which say what was really written.   where: path -> what set it.
    trains: False for generation, where `trainable` and the trainer don't matter.
    """
    errors = [*_device_rules(config, where), *_size_rules(config, where, trains)]
    warnings = [*_fp8_warnings(config, where)]
    if trains:
        errors += [
            *_trainable_rules(config, where),
            *_optim_rules(config, where),
            *_process_rules(config, where),
            *_logger_rules(config, where),
        ]
        warnings += [
            *_unused_lora(config, values, where),
            *_unused_settings(config, where),
            *_unusual_lr(config, where),
            *_long_warmup(config, where),
        ]
    return errors, warnings


def _trainable_rules(config: RunConfig, where: Where) -> Iterator[Finding]:
    paths = tuple(f"model.{name}.trainable" for name in config.model.components)
    if all(component.trainable == "none" for component in config.model.components.values()):
        message = f"nothing trains: {', '.join(paths)} are all `none`"
        hint = (
            "Set model.dit.trainable=lora (an adapter) or model.dit.trainable=full (every weight)."
        )
        yield Finding(Fault("model", message, where(paths[-1]), hint=hint), paths)
    for name, component in config.model.components.items():
        if component.trainable == "full" and component.precision == "fp8":
            path = f"model.{name}"
            message = (
                "fp8 can't be combined with trainable=full: an optimizer step is far smaller than the gap between "
                "neighbouring FP8 numbers (3 mantissa bits), so nearly every update would be rounded away"
            )
            hint = (
                f"Train an adapter on the FP8 weights with {path}.trainable=lora, "
                f"or train every weight with {path}.precision=bf16."
            )
            reads = (f"{path}.precision", f"{path}.trainable")
            yield Finding(
                Fault(f"{path}.precision", message, where(f"{path}.precision"), hint=hint), reads
            )


def _device_rules(config: RunConfig, where: Where) -> Iterator[Finding]:
    if config.model.compute_dtype == "fp16" and config.model.device == "cpu":
        path = "model.compute_dtype"
        message = "fp16 can't be computed on the CPU (model.device=cpu)"
        fault = Fault(path, message, where(path), hint=f"Use {path}=bf16 or {path}=fp32.")
        yield Finding(fault, (path, "model.device"))


def _process_rules(config: RunConfig, where: Where) -> Iterator[Finding]:
    device, trainer = config.model.device, config.trainer
    several = trainer.devices > 1 or trainer.num_nodes > 1
    if several and device == "mps":
        path = "trainer.devices" if trainer.devices > 1 else "trainer.num_nodes"
        hint = "Set trainer.devices=1 and trainer.num_nodes=1, or model.device=cpu."
        fault = Fault(
            path, "several processes can't share model.device=mps", where(path), hint=hint
        )
        yield Finding(fault, ("trainer.devices", "trainer.num_nodes", "model.device"))
    if trainer.devices > 1 and device.startswith("cuda:"):
        path = "trainer.devices"
        message = (
            f"{trainer.devices} processes can't share the one GPU that model.device={device} names"
        )
        fault = Fault(
            path, message, where(path), hint="Set model.device=cuda, or trainer.devices=1."
        )
        yield Finding(fault, (path, "model.device"))


def _size_rules(config: RunConfig, where: Where, trains: bool) -> Iterator[Finding]:
    divisor = FAMILIES[config.model.family].size_divisor_px
    for index, side in enumerate(config.sample.size_px):
        if side % divisor:
            path = f"sample.size_px[{index}]"
            below, above = side // divisor * divisor, (side // divisor + 1) * divisor
            message = f"{side} isn't a multiple of {divisor}, which {config.model.family} needs"
            nearest = tuple(str(size) for size in (below, above) if size)
            yield Finding(
                Fault(path, message, where(path), nearest), ("sample.size_px", "model.family")
            )
    if trains and config.data.max_px < divisor * divisor:
        path = "data.max_px"
        message = (
            f"{config.data.max_px} px is less than the smallest picture, {divisor} x {divisor}"
        )
        fault = Fault(
            path, message, where(path), hint=f"Use at least {divisor * divisor}, e.g. 1048576."
        )
        yield Finding(fault, (path, "model.family"))


def _optim_rules(config: RunConfig, where: Where) -> Iterator[Finding]:
    optim = config.optim
    if optim.betas is not None and optim.name in _WITHOUT_BETAS:
        path = "optim.betas"
        message = f"the optimizer {optim.name} has no betas"
        fault = Fault(
            path,
            message,
            where(path),
            hint="Remove it (optim.betas=null), or use optim.name=adamw.",
        )
        yield Finding(fault, (path, "optim.name"))
    package, extra = _NEEDS_PACKAGE.get(optim.name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        path = "optim.name"
        message = f"{optim.name} needs the package {package}, which isn't installed"
        hint = f"Run `pip install octavo[{extra}]`, or use optim.name=adamw."
        yield Finding(Fault(path, message, where(path), hint=hint), (path,))


def _logger_rules(config: RunConfig, where: Where) -> Iterator[Finding]:
    if config.logger.wandb is not None and importlib.util.find_spec("wandb") is None:
        path = "logger.wandb"
        message = "Weights & Biases needs the package wandb, which isn't installed"
        fault = Fault(
            path,
            message,
            where(path),
            hint="Run `pip install octavo[wandb]`, or set logger.wandb=null.",
        )
        yield Finding(fault, (path,))


def _fp8_warnings(config: RunConfig, where: Where) -> Iterator[Finding]:
    for name, component in config.model.components.items():
        if component.precision == "fp8" and component.fp8.scaling == "none":
            path = f"model.{name}.fp8.scaling"
            message = "without scales, weights below 0.002 lose most of their digits or become 0"
            hint = f"Use {path}=row unless the checkpoint is published as a plain FP8 cast."
            yield Finding(
                Fault(path, message, where(path), hint=hint), (path, f"model.{name}.precision")
            )


def _unused_lora(config: RunConfig, values: Mapping[str, Any], where: Where) -> Iterator[Finding]:
    for name, component in config.model.components.items():
        path = f"model.{name}.lora"
        if component.trainable == "lora" or component.lora is None:
            continue
        keys = ", ".join(_written_keys(values, ("model", name, "lora"))) or "defaults"
        message = (
            f"is set ({keys}) but not used, because model.{name}.trainable={component.trainable}"
        )
        hint = f"Set model.{name}.trainable=lora to use it, or {path}=null to remove it."
        yield Finding(
            Fault(path, message, where(path), hint=hint), (path, f"model.{name}.trainable")
        )


def _unused_settings(config: RunConfig, where: Where) -> Iterator[Finding]:
    """Settings that were changed although nothing reads them in this combination."""
    objective = config.objective
    unused: list[tuple[str, str]] = []
    if objective.loss != "huber":
        unused.append(("huber_delta", f"objective.loss={objective.loss}"))
    if objective.timestep_sampling != "logit_normal":
        reason = f"objective.timestep_sampling={objective.timestep_sampling}"
        unused += [("logit_mean", reason), ("logit_std", reason)]
    if config.model.vae.trainable == "none":
        unused.append(("vae_kl_weight", "model.vae.trainable=none"))
    for key, reason in unused:
        if getattr(objective, key) != ObjectiveConfig.model_fields[key].default:
            path = f"objective.{key}"
            fault = Fault(path, f"is set but not used, because {reason}", where(path))
            yield Finding(fault, (path, reason.partition("=")[0]))
    if config.model.dit.gradient_checkpointing and not _trains_through_dit(config):
        path = "model.dit.gradient_checkpointing"
        message = "is set but not used, because no gradient passes through the dit"
        yield Finding(Fault(path, message, where(path)), (path,))


def _trains_through_dit(config: RunConfig) -> bool:
    components: tuple[ComponentConfig, ...] = (config.model.dit, config.model.text_encoder)
    return any(component.trainable != "none" for component in components)


def _long_warmup(config: RunConfig, where: Where) -> Iterator[Finding]:
    """A short try of a long recipe is legitimate, so this is no fault."""
    steps, max_steps = config.optim.warmup_steps, config.trainer.max_steps
    if steps > max_steps:
        path = "optim.warmup_steps"
        message = f"{steps} steps of warm-up don't fit into trainer.max_steps={max_steps}"
        hint = f"Lower it, or raise trainer.max_steps: the rate only reaches {max_steps / steps:.0%} of optim.lr."
        yield Finding(Fault(path, message, where(path), hint=hint), (path, "trainer.max_steps"))


def _unusual_lr(config: RunConfig, where: Where) -> Iterator[Finding]:
    low, high = _USUAL_LR.get(config.optim.name, _USUAL_LR_ADAM)
    lr = config.optim.lr
    if not low / 10 <= lr <= high * 10:
        message = f"{lr:g} is unusual for {config.optim.name}; usual are {low:g} to {high:g}"
        yield Finding(Fault("optim.lr", message, where("optim.lr")), ("optim.lr", "optim.name"))


def _written_keys(values: Mapping[str, Any], pieces: tuple[str, ...]) -> list[str]:
    node: Any = values
    for piece in pieces:
        node = node.get(piece) if isinstance(node, Mapping) else None
    return (
        [str(key) for key, value in node.items() if value is not None]
        if isinstance(node, Mapping)
        else []
    )
